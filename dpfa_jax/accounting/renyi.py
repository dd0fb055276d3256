"""Rényi costs of single events, and the filter and odometer that are sums of them.

The (approximate) Rényi cost of an event at order α is a pair (ρ, δ₀): outside an event of
probability at most δ₀, the divergence of order α between neighbours is at most ρ.

Filter and odometer. Let ρ_t be the sum of the costs charged up to step t, each chosen with
full knowledge of the releases before it, its own cost fixed before its own release. Then
exp((α−1)(L_t − ρ_t)) is a non-negative supermartingale, L_t being the privacy loss, and by
Ville's inequality P(some t has L_t > ρ_t + log(1/δ)/(α−1)) <= δ. So

    ε_t = ρ_t + log(1/δ)/(α−1)

holds at every time at once: reported it is an odometer, and stopping before ε_t passes a
limit is a filter. With several orders, each gets a share of δ (union bound) and the least
ε_t counts.

Sources: V. Feldman and T. Zrnic, Individual privacy accounting via a Rényi filter (NeurIPS
2021), theorem 4.5 (fixed order, adaptive costs); M. Lécuyer, Practical privacy filters and
odometers with Rényi differential privacy (2021), section 4; J. Whitehouse, A. Ramdas, R.
Rogers, S. Wu, Fully-adaptive composition in differential privacy (ICML 2023), section 3 (Ville's
inequality). docs/budget.md has the proof.
"""

import functools
import math
from typing import NamedTuple

import dp_accounting
import numpy as np
from dp_accounting import pld, rdp
from scipy.special import logsumexp

from dpfa_jax.accounting.convention import to_replace_one
from dpfa_jax.mechanisms import adjacency_factor

# Relative; sums of many floats err by less, and the error must be on the safe side.
_CUSHION = 1 + 1e-9
# Width of the bins of a privacy loss distribution.
INTERVAL = 1e-4


class RenyiCost(NamedTuple):
    """ρ at each order, and δ₀.

    Attributes:
        rho: float64[orders].
        delta: probability outside which ``rho`` holds.
    """

    rho: np.ndarray
    delta: float

    def plus(self, other: "RenyiCost", count: int = 1) -> "RenyiCost":
        """The cost of this and of ``count`` times ``other``."""
        return RenyiCost(self.rho + count * other.rho, self.delta + count * other.delta)

    def largest(self, other: "RenyiCost") -> "RenyiCost":
        """A bound on both, order by order: what one record pays in disjoint partitions."""
        return RenyiCost(np.maximum(self.rho, other.rho), max(self.delta, other.delta))


def nothing(orders: tuple[float, ...]) -> RenyiCost:
    """The cost of no release."""
    return RenyiCost(np.zeros(len(orders)), 0.0)


@functools.lru_cache(maxsize=65536)
def renyi_cost(leaf: dp_accounting.DpEvent, adjacency: str, orders: tuple[float, ...]) -> RenyiCost:
    """The cost of one event that is no composition.

    Exact formulas of ``dp_accounting``'s Rényi accountant where it has the event; otherwise
    from the event's privacy loss distribution, a pair (P, Q) of which the event is
    post-processing: with P′ = P given a finite loss, exp((α−1)ρ) = E_P′[(P′/Q)^(α−1)], and δ₀
    is P's mass at infinity.

    Args:
        leaf: an event other than ``ComposedDpEvent`` and ``SelfComposedDpEvent``.
        adjacency: ``'add_remove'`` or ``'replace_one'``; multipliers are σ/Δ under it.
        orders: α > 1, each.

    Raises:
        dp_accounting.UnsupportedEventError: if neither accountant has the event.

    Example:
        >>> cost = renyi_cost(dp_accounting.GaussianDpEvent(2.0), "replace_one", (3.0,))
        >>> round(float(cost.rho[0]), 6)
        0.375
    """
    is_replace = adjacency_factor(adjacency) == 2
    relation = dp_accounting.NeighboringRelation
    # A Gaussian's multiplier is σ/Δ in this accountant, whatever the relation.
    if not is_replace or isinstance(leaf, dp_accounting.GaussianDpEvent):
        renyi = rdp.RdpAccountant(list(orders), relation.ADD_OR_REMOVE_ONE)
        if renyi.supports(leaf):
            rho = np.asarray(renyi.compose(leaf).rdp, float) * _CUSHION
            # Its series for fractional orders does not always converge; it says inf then.
            if np.isfinite(rho).all() or not _has_distribution(leaf, is_replace):
                return RenyiCost(rho, 0.0)
    accountant = pld.PLDAccountant(
        relation.REPLACE_ONE if is_replace else relation.ADD_OR_REMOVE_ONE, INTERVAL
    )
    accountant.compose(to_replace_one(leaf) if is_replace else leaf)
    if math.isinf(accountant.get_epsilon(0.5)):
        return RenyiCost(np.full(len(orders), math.inf), 0.0)
    # No public accessor: dp_accounting is pinned, and a test holds these to closed forms.
    both = (accountant._pld._pmf_remove, accountant._pld._pmf_add)
    costs = [_from_pmf(pmf.to_dense_pmf(), orders) for pmf in both]
    return costs[0].largest(costs[1])


def _has_distribution(leaf: dp_accounting.DpEvent, is_replace: bool) -> bool:
    relation = dp_accounting.NeighboringRelation
    return pld.PLDAccountant(
        relation.REPLACE_ONE if is_replace else relation.ADD_OR_REMOVE_ONE
    ).supports(leaf)


def _from_pmf(pmf: object, orders: tuple[float, ...]) -> RenyiCost:
    probs = np.asarray(pmf._probs)  # type: ignore[attr-defined]
    losses = (np.arange(probs.size) + pmf._lower_loss) * pmf._discretization  # type: ignore[attr-defined]
    infinite = max(float(pmf._infinity_mass), 0.0)  # type: ignore[attr-defined]
    keep = probs > 0
    losses, log_probs = losses[keep], np.log(probs[keep])
    rho = [
        (float(logsumexp(log_probs + (a - 1) * losses)) - a * math.log1p(-infinite)) / (a - 1)
        for a in orders
    ]
    return RenyiCost(np.maximum(rho, 0.0) * _CUSHION, infinite)


class Orders(NamedTuple):
    """Orders α and the share of δ that each gets.

    Attributes:
        alphas: orders, each above 1.
        shares: positive, summing to 1.
    """

    alphas: tuple[float, ...]
    shares: tuple[float, ...]

    @classmethod
    def for_budget(cls, epsilon: float, delta: float) -> "Orders":
        """Five orders that suit a budget; a function of it alone, so fixed beforehand.

        With L = log(2/δ), the first maximises what a Gaussian may spend, (ε − L/(α−1))/α, and
        has half of δ: α − 1 = (L + √(L² + εL))/ε. Two are nearer to 1, for sampled Gaussians,
        whose cost at high orders explodes; two are farther, for reports of a budget of which
        little is spent. Whole numbers above 2: their formulas are exact.

        Example:
            >>> [round(a) for a in Orders.for_budget(1.0, 1e-5).alphas]
            [26, 13, 7, 51, 101]
        """
        log = math.log(2 / delta)
        best = (log + math.sqrt(log * log + epsilon * log)) / epsilon
        factors = (1, 1 / 2, 1 / 4, 2, 4)
        exact = (1 + best * f for f in factors)
        alphas = tuple(float(round(a)) if a > 2 else a for a in exact)
        return cls(alphas, (0.5, 0.15, 0.1, 0.15, 0.1))

    def epsilon(self, cost: RenyiCost, delta: float) -> float:
        """The odometer: ε_t that holds at ``delta``, at all times at once.

        Example:
            >>> orders = Orders.for_budget(1.0, 1e-5)
            >>> round(orders.epsilon(nothing(orders.alphas), 1e-5), 3)
            0.0
        """
        if not np.any(cost.rho) and cost.delta == 0:
            return 0.0
        left = delta - cost.delta * _CUSHION
        if not left > 0:
            return math.inf
        return min(
            float(rho) + math.log(1 / (share * left)) / (alpha - 1)
            for rho, alpha, share in zip(cost.rho, self.alphas, self.shares, strict=True)
        )


# For events fixed beforehand: no union bound is needed, the least ε over the orders holds.
FIXED_ORDERS = (1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0, 16.0, 20.0, 24.0, 32.0,
                48.0, 64.0, 128.0, 512.0, 4096.0)  # fmt: skip


def fixed_epsilon(cost: RenyiCost, delta: float) -> float:
    """An upper bound on ε of a list of events fixed beforehand; ``cost`` at FIXED_ORDERS."""
    if not np.any(cost.rho) and cost.delta == 0:
        return 0.0
    left = delta - cost.delta * _CUSHION
    if not left > 0 or np.isinf(cost.rho).any():
        return math.inf
    return float(rdp.compute_epsilon(list(FIXED_ORDERS), cost.rho, left)[0])
