"""One accountant for every release of this library.

Noise multipliers follow one convention, σ/Δ (``dpfa_jax/accounting/convention.py``).
"""

import functools
import math
from collections.abc import Callable

import dp_accounting
import numpy as np
import scipy.optimize
from dp_accounting import pld, rdp

from dpfa_jax.accounting.convention import to_replace_one
from dpfa_jax.accounting.events import leaves
from dpfa_jax.accounting.merge import (
    MOST_KINDS,
    merge_gaussians,
    merge_sampled,
    sampled_kinds,
    wide_interval,
)
from dpfa_jax.accounting.renyi import INTERVAL, nothing, renyi_cost
from dpfa_jax.mechanisms import adjacency_factor

# Of an event repeated this often the distribution is dense.
_MANY = 10_000
_METHODS = ("auto", "pld", "rdp")


def check_budget(epsilon: float, delta: float) -> None:
    """Raises ValueError unless ε > 0 is finite and 0 < δ < 1."""
    if not (isinstance(epsilon, int | float) and math.isfinite(epsilon) and epsilon > 0):
        raise ValueError(f"epsilon={epsilon!r}: allowed is a finite number > 0.")
    if not (isinstance(delta, int | float) and 0 < delta < 1):
        raise ValueError(f"delta={delta!r}: allowed is a number between 0 and 1, both excluded.")


class Accountant:
    """Composes events and answers ε for a δ.

    The list of events must not depend on what they release; stopping early may (docs/budget.md,
    "Adaptive choices"). Equal events are counted and Gaussians merged before anything is
    composed: 10⁶ equal events cost what one costs. More than 16 kinds of sampled events are
    counted as a few kinds that cost at least as much (``accounting/merge.py``), with bins that suit
    them; :attr:`name` says so. That is an upper bound, and takes a second.

    Args:
        adjacency: ``'add_remove'`` or ``'replace_one'``.
        method: ``'pld'`` (privacy loss distributions: tight), ``'rdp'`` (Rényi; with
            ``'add_remove'`` only, because the two accountants of ``dp_accounting`` mean different
            things by ``REPLACE_ONE``), or ``'auto'``: PLD, unless an event is composed that it
            lacks and Rényi has; then all events by Rényi.
        interval: width of the bins of the privacy loss (PLD). Wider is faster and answers
            a larger ε, never a smaller one.
        most_kinds: more kinds of sampled events than this are merged, to at most as many (PLD).

    Raises:
        ValueError: for another word.
        dp_accounting.UnsupportedEventError: from :meth:`compose`, for an event that the
            method does not support. Nothing is ever approximated silently.

    Example:
        >>> accountant = Accountant("add_remove").compose(dp_accounting.GaussianDpEvent(1.0))
        >>> round(accountant.epsilon(1e-5), 2)
        4.38
    """

    def __init__(
        self,
        adjacency: str,
        method: str = "auto",
        *,
        interval: float = INTERVAL,
        most_kinds: int = MOST_KINDS,
    ):
        self._is_replace = adjacency_factor(adjacency) == 2
        if method not in _METHODS:
            raise ValueError(f"method={method!r}: allowed are {_METHODS}.")
        if method == "rdp" and self._is_replace:
            raise ValueError("method='rdp': allowed with adjacency='add_remove' only.")
        if not isinstance(most_kinds, int) or isinstance(most_kinds, bool) or most_kinds < 1:
            raise ValueError(f"most_kinds={most_kinds!r}: allowed is a whole number >= 1.")
        self.adjacency = adjacency
        self.method = "pld" if method == "auto" else method
        self._may_change = method == "auto" and not self._is_replace
        self._interval = interval
        self._most_kinds = most_kinds
        self._counts: dict[dp_accounting.DpEvent, int] = {}
        self._composed: _Composed | None = None

    @property
    def name(self) -> str:
        """For reports: method and the package that does the work."""
        if self.method == "rdp":
            return "Rényi differential privacy (dp_accounting)"
        kinds = sampled_kinds(self._counts)
        merged = "" if kinds <= self._most_kinds else f"; {kinds} kinds of events, bounded by fewer"
        return f"privacy loss distributions (dp_accounting{merged})"

    def compose(self, event: dp_accounting.DpEvent, count: int = 1) -> "Accountant":
        """Adds ``count`` releases of ``event``; returns the accountant itself."""
        if not isinstance(event, dp_accounting.DpEvent):
            raise ValueError(f"event is a {type(event).__name__}: a DpEvent is needed.")
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            raise ValueError(f"count={count!r}: allowed is a whole number >= 0.")
        added = list(leaves(event, count))
        method = self.method
        for leaf, _ in added:
            # Once by Rényi, 'auto' takes what either has (renyi_cost).
            either = self._may_change and method == "rdp" and _has("pld", leaf, False)
            if _has(method, leaf, self._is_replace) or either:
                continue
            if not (self._may_change and _has("rdp", leaf, False)):
                raise dp_accounting.UnsupportedEventError(
                    f"{leaf}: not supported by method={self.method!r} under "
                    f"adjacency={self.adjacency!r}."
                )
            method = "rdp"
        self.method = method
        for leaf, n in added:
            self._counts[leaf] = self._counts.get(leaf, 0) + n
        self._composed = None
        return self

    def epsilon(self, delta: float) -> float:
        """The least ε known to hold at ``delta`` for everything composed so far."""
        check_budget(1.0, delta)
        return self._answers().epsilon(delta)

    def delta(self, epsilon: float) -> float:
        """The least δ known to hold at ``epsilon`` for everything composed so far."""
        check_budget(epsilon, 0.5)
        return self._answers().delta(epsilon)

    def _answers(self) -> "_Composed":
        if self._composed is None:
            if self.method == "rdp":
                self._composed = _Renyi(self._counts, self.adjacency)
            else:
                counts, interval = merge_gaussians(self._counts), self._interval
                if sampled_kinds(counts) > self._most_kinds:
                    counts = merge_sampled(counts, self._most_kinds)
                    interval = wide_interval(counts, interval)
                self._composed = _Distribution(counts, self._is_replace, interval)
        return self._composed


class _Distribution:
    """A composition by privacy loss distributions."""

    def __init__(self, counts: dict[dp_accounting.DpEvent, int], is_replace: bool, interval: float):
        relation = dp_accounting.NeighboringRelation
        self._inner = pld.PLDAccountant(
            relation.REPLACE_ONE if is_replace else relation.ADD_OR_REMOVE_ONE, interval
        )
        for leaf, count in counts.items():
            self._compose(to_replace_one(leaf) if is_replace else leaf, count, interval)

    def _compose(self, leaf: dp_accounting.DpEvent, count: int, interval: float) -> None:
        match leaf:
            case dp_accounting.PoissonSampledDpEvent(
                sampling_probability=q, event=dp_accounting.GaussianDpEvent(noise_multiplier=z)
            ) if count >= _MANY and q > 0 and z > 0:
                # The package would first compute size^count, a number of millions of digits, to
                # choose between two forms of a distribution. It would choose the dense one.
                one = pld.privacy_loss_distribution.from_gaussian_mechanism(
                    standard_deviation=z,
                    value_discretization_interval=interval,
                    sampling_prob=q,
                    neighboring_relation=self._inner.neighboring_relation,
                )
                add = None if one._symmetric else one._pmf_add.to_dense_pmf()
                dense = type(one)(one._pmf_remove.to_dense_pmf(), add)
                self._inner._pld = self._inner._pld.compose(dense.self_compose(count))
            case _:
                self._inner.compose(leaf, count)

    def epsilon(self, delta: float) -> float:
        return float(self._inner.get_epsilon(delta))

    def delta(self, epsilon: float) -> float:
        return float(self._inner.get_delta(epsilon))


class _Renyi:
    """A composition by Rényi divergences, of events that either accountant has."""

    def __init__(self, counts: dict[dp_accounting.DpEvent, int], adjacency: str):
        self._orders = rdp.RdpAccountant().orders
        total = nothing(tuple(self._orders))
        for leaf, count in counts.items():
            total = total.plus(renyi_cost(leaf, adjacency, tuple(self._orders)), count)
        self._cost = total

    def epsilon(self, delta: float) -> float:
        if not delta > self._cost.delta or np.isinf(self._cost.rho).any():
            return math.inf
        if not np.any(self._cost.rho):
            return 0.0
        return float(rdp.compute_epsilon(self._orders, self._cost.rho, delta - self._cost.delta)[0])

    def delta(self, epsilon: float) -> float:
        if np.isinf(self._cost.rho).any():
            return 1.0
        found = rdp.rdp_privacy_accountant.compute_delta(self._orders, self._cost.rho, epsilon)[0]
        return min(1.0, float(found) + self._cost.delta)


_Composed = _Distribution | _Renyi


def _has(method: str, leaf: dp_accounting.DpEvent, is_replace: bool) -> bool:
    if type(leaf) is dp_accounting.GaussianDpEvent:
        return True  # In all of them; by far the most frequent.
    relation = dp_accounting.NeighboringRelation
    if method == "rdp":
        return rdp.RdpAccountant(neighboring_relation=relation.ADD_OR_REMOVE_ONE).supports(leaf)
    if is_replace:
        try:
            leaf = to_replace_one(leaf)
        except dp_accounting.UnsupportedEventError:
            return False
    return pld.PLDAccountant(
        relation.REPLACE_ONE if is_replace else relation.ADD_OR_REMOVE_ONE
    ).supports(leaf)


def calibrate_noise_multiplier(
    make_event: Callable[[float], dp_accounting.DpEvent],
    *,
    epsilon: float,
    delta: float,
    adjacency: str,
    method: str = "auto",
    tolerance: float = 1e-3,
) -> float:
    """The least noise multiplier at which a whole plan costs at most (ε, δ).

    Args:
        make_event: the plan's event as a function of z; its ε falls as z grows.
        epsilon: target ε.
        delta: target δ.
        adjacency: ``'add_remove'`` or ``'replace_one'``.
        method: see :class:`Accountant`.
        tolerance: relative precision of z. The answer always errs towards more noise.

    Returns:
        z such that the plan's ε at ``delta`` is at most ``epsilon``.

    Raises:
        ValueError: for an impossible target, or a plan that no noise below z = 10⁹ fits.

    Example:
        >>> z = calibrate_noise_multiplier(dp_accounting.GaussianDpEvent, epsilon=4.3772,
        ...                                delta=1e-5, adjacency="add_remove")
        >>> round(z, 2)
        1.0
    """
    check_budget(epsilon, delta)

    @functools.cache
    def excess(log_z: float, interval: float = INTERVAL) -> float:
        """log(ε of the plan / target), a smooth falling function of log z."""
        accountant = Accountant(adjacency, method, interval=interval)
        value = accountant.compose(make_event(math.exp(log_z))).epsilon(delta)
        return math.log(min(max(value, 1e-12), 1e12) / epsilon)

    # Coarse intervals are fast, and pessimistic (over thousands of steps by far): they
    # give a first answer that fits. It is then lowered with the default interval. Small
    # multipliers cost most time and memory, so the search comes from above.
    coarse = max(INTERVAL, min(5e-3, epsilon))
    high, step = math.log(1024), math.log(4)
    while excess(high, coarse) > 0:
        high += step
        if high > math.log(1e9):
            raise ValueError(f"epsilon={epsilon}, delta={delta}: no multiplier below 1e9 fits.")
    while excess(high - step, coarse) <= 0:
        high -= step
        if high < math.log(1e-6):
            return math.exp(high)
    high = scipy.optimize.brentq(lambda x: excess(x, coarse), high - step, high, xtol=tolerance / 4)
    while excess(high) > 0:
        high += tolerance / 4
    step = tolerance
    while excess(high - step) <= 0:
        high, step = high - step, 2 * step
    log_z = scipy.optimize.brentq(excess, high - step, high, xtol=tolerance / 4)
    while excess(log_z) > 0:
        log_z += tolerance / 4
    return math.exp(log_z)
