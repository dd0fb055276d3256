"""Rényi costs of single events, and the filter and odometer that are sums of them.

The (approximate) Rényi cost of an event at order α is a pair (ρ, δ₀): outside an event of
probability at most δ₀, the divergence of order α between neighbours is at most ρ.

Filter and odometer. Let ρ_t be the sum of the costs charged up to step t, each chosen with
full knowledge of the releases before it, its own cost fixed before its own release, and L_t the
privacy loss of everything up to t. Then exp((α−1)(L_t − ρ_t)) is a non-negative supermartingale
that starts at 1, so its mean at any stopping time T is at most 1. With max(0, 1 − e^(−x)) <=
c·e^((α−1)x), c = (α−1)^(α−1)/α^α, it follows that

    ε_t = ρ_t + log(c/δ)/(α−1)     has     E max(0, 1 − exp(ε_T − L_T)) <= δ

at every stopping time T, whatever chose it by looking at the releases. Reported, ε_t is an
odometer; stopping before it passes a limit ε is a filter, and everything together is
(ε, δ)-differentially private. With several orders, each gets a share of δ and the least ε_t counts.

Sources: V. Feldman and T. Zrnic, Individual privacy accounting via a Rényi filter (NeurIPS
2021), theorem 4.5 (fixed order, adaptive costs); M. Lécuyer, Practical privacy filters and
odometers with Rényi differential privacy (2021), section 4; C. Canonne, G. Kamath, T. Steinke, The
discrete Gaussian for differential privacy (2020), proposition 12 (the constant c). docs/budget.md
has the proof.
"""

import functools
import math
from typing import Any, NamedTuple

import dp_accounting
import numpy as np
from dp_accounting import pld, rdp
from scipy.special import gammaln, logsumexp

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
    if not is_replace and (quick := _sampled_gaussian(leaf, orders)) is not None:
        return RenyiCost(quick * _CUSHION, 0.0)
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


@functools.lru_cache(maxsize=64)
def _binomials(orders: tuple[float, ...]) -> tuple[np.ndarray, ...] | None:
    """i, α, log C(α, i) for all i from 2 to each α, one α after the other, and where each starts.

    None unless every order is a whole number above 1.
    """
    if any(a != int(a) or a < 2 for a in orders):
        return None
    sizes = [int(a) - 1 for a in orders]
    i = np.concatenate([np.arange(2.0, a + 1) for a in orders])
    alpha = np.repeat(np.array(orders, float), sizes)
    log_choose = gammaln(alpha + 1) - gammaln(i + 1) - gammaln(alpha - i + 1)
    return i, alpha, log_choose, np.concatenate([[0], np.cumsum(sizes)[:-1]]), np.array(sizes)


def _sampled_gaussian(leaf: dp_accounting.DpEvent, orders: tuple[float, ...]) -> np.ndarray | None:
    """ρ of a Poisson-sampled Gaussian under ``add_remove``; None for others, and other orders.

    ρ = log(A)/(α−1), A = Σ_i C(α, i) (1−q)^(α−i) q^i e^(x_i), x_i = (i²−i)/2z². The probabilities
    sum to 1 and x_0 = x_1 = 0, so A − 1 = Σ_{i≥2} … (e^(x_i) − 1), all terms positive. The package
    has the same sum as a loop, which takes half a millisecond.

    Source: I. Mironov, K. Talwar, L. Zhang, Rényi differential privacy of the sampled Gaussian
    mechanism (2019), section 3.3.
    """
    if not isinstance(leaf, dp_accounting.PoissonSampledDpEvent):
        return None
    q, inner, layout = leaf.sampling_probability, leaf.event, _binomials(orders)
    if layout is None or not isinstance(inner, dp_accounting.GaussianDpEvent):
        return None
    if not (0 < q < 1 and 1e-3 < inner.noise_multiplier < math.inf):
        return None
    i, alpha, log_choose, starts, sizes = layout
    x = i * (i - 1) / (2 * inner.noise_multiplier**2)
    terms = log_choose + i * math.log(q) + (alpha - i) * math.log1p(-q) + x + np.log(-np.expm1(-x))
    top = np.maximum.reduceat(terms, starts)
    rest = np.log(np.add.reduceat(np.exp(terms - np.repeat(top, sizes)), starts))
    return np.logaddexp(0.0, top + rest) / (np.array(orders) - 1)


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

        The first lets Gaussians spend most, (ε − log(c/δ)/(α−1))/α, and has half of δ. Two are
        nearer to 1, for sampled Gaussians, whose cost at high orders explodes; two are farther, for
        reports of a budget of which little is spent. Whole numbers above 2: their formulas are
        exact.

        Example:
            >>> [round(a) for a in Orders.for_budget(1.0, 1e-5).alphas]
            [19, 10, 6, 37, 73]
        """
        grid = np.concatenate([np.arange(1.02, 2.0, 0.02), np.arange(2.0, 5000.0)])
        may_spend = (epsilon - _conversion(grid, delta / 2)) / grid
        best = float(grid[np.argmax(may_spend)]) - 1
        exact = (1 + best * f for f in (1, 1 / 2, 1 / 4, 2, 4))
        alphas = tuple(float(round(a)) if a > 2 else a for a in exact)
        return cls(alphas, (0.5, 0.15, 0.1, 0.15, 0.1))

    def epsilon(self, cost: RenyiCost, delta: float) -> float:
        """The odometer: ε_t that holds at ``delta``, at whatever time one stops.

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
        found = min(
            float(rho + _conversion(alpha, share * left))
            for rho, alpha, share in zip(cost.rho, self.alphas, self.shares, strict=True)
        )
        return max(0.0, found)


def _conversion(alpha: Any, delta: float) -> Any:
    """log(c/δ)/(α−1): what turns a Rényi cost of order α into ε at δ."""
    return np.log((alpha - 1) / alpha) - (math.log(delta) + np.log(alpha)) / (alpha - 1)


# For events fixed beforehand: no union bound is needed, the least ε over the orders holds.
# Whole numbers: their formulas are exact and fast.
FIXED_ORDERS = (2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0, 16.0, 20.0, 24.0, 32.0,
                48.0, 64.0, 128.0, 512.0)  # fmt: skip


def fixed_epsilon(cost: RenyiCost, delta: float) -> float:
    """An upper bound on ε of a list of events fixed beforehand; ``cost`` at FIXED_ORDERS."""
    if not np.any(cost.rho) and cost.delta == 0:
        return 0.0
    left = delta - cost.delta * _CUSHION
    if not left > 0 or np.isinf(cost.rho).any():
        return math.inf
    return float(rdp.compute_epsilon(list(FIXED_ORDERS), cost.rho, left)[0])
