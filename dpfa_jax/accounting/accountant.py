"""One accountant for every release of this library.

Convention. An event's ``noise_multiplier`` is z = σ/Δ with Δ the sensitivity under the
stated adjacency, so that one Gaussian release with z = 1 has μ = 1 (ε = 4.38 at
δ = 1e-5) under either adjacency. ``dp_accounting``'s PLD accountant reads z as σ/C under
``REPLACE_ONE``, where C bounds one record and Δ = 2C (its RDP accountant reads it as
σ/Δ: the two differ by a factor of 2 there). The multipliers are translated here, in one
place.
"""

import functools
import math
from collections.abc import Callable

import dp_accounting
import scipy.optimize
from dp_accounting import pld, rdp

from dpfa_jax.mechanisms import adjacency_factor

_METHODS = ("pld", "rdp")
# Width of the bins of a privacy loss distribution.
_INTERVAL = 1e-4


def check_budget(epsilon: float, delta: float) -> None:
    """Raises ValueError unless ε > 0 is finite and 0 < δ < 1."""
    if not (isinstance(epsilon, int | float) and math.isfinite(epsilon) and epsilon > 0):
        raise ValueError(f"epsilon={epsilon!r}: allowed is a finite number > 0.")
    if not (isinstance(delta, int | float) and 0 < delta < 1):
        raise ValueError(f"delta={delta!r}: allowed is a number between 0 and 1, both excluded.")


def _to_replace_one(event: dp_accounting.DpEvent) -> dp_accounting.DpEvent:
    """``event`` with its multipliers in units of C = Δ/2 (see the module's docstring)."""
    match event:
        case dp_accounting.GaussianDpEvent(noise_multiplier=z):
            return dp_accounting.GaussianDpEvent(2 * z)
        case dp_accounting.PoissonSampledDpEvent(sampling_probability=q, event=inner):
            return dp_accounting.PoissonSampledDpEvent(q, _to_replace_one(inner))
        case dp_accounting.TruncatedSubsampledGaussianDpEvent():
            return dp_accounting.TruncatedSubsampledGaussianDpEvent(
                event.dataset_size,
                event.sampling_probability,
                event.truncated_batch_size,
                2 * event.noise_multiplier,
            )
        case dp_accounting.SelfComposedDpEvent(event=inner, count=count):
            return dp_accounting.SelfComposedDpEvent(_to_replace_one(inner), count)
        case dp_accounting.ComposedDpEvent(events=events):
            return dp_accounting.ComposedDpEvent([_to_replace_one(e) for e in events])
        case dp_accounting.NoOpDpEvent() | dp_accounting.NonPrivateDpEvent():
            return event
    raise dp_accounting.UnsupportedEventError(
        f"{event}: not supported under adjacency='replace_one'."
    )


class Accountant:
    """Composes events and answers ε for a δ.

    Args:
        adjacency: ``'add_remove'`` or ``'replace_one'``.
        method: ``'pld'`` (privacy loss distributions: tight) or ``'rdp'`` (Rényi: for
            events that PLD does not support; ``'add_remove'`` only, because the two
            accountants of ``dp_accounting`` mean different things by ``REPLACE_ONE``).
        interval: width of the bins of the privacy loss (PLD). Wider is faster and answers
            a larger ε, never a smaller one.

    Raises:
        ValueError: for another word.
        dp_accounting.UnsupportedEventError: from :meth:`compose`, for an event that the
            method does not support. Nothing is ever approximated silently.

    Example:
        >>> accountant = Accountant("add_remove").compose(dp_accounting.GaussianDpEvent(1.0))
        >>> round(accountant.epsilon(1e-5), 2)
        4.38
    """

    def __init__(self, adjacency: str, method: str = "pld", *, interval: float = _INTERVAL):
        self._is_replace = adjacency_factor(adjacency) == 2
        if method not in _METHODS:
            raise ValueError(f"method={method!r}: allowed are {_METHODS}.")
        if method == "rdp" and self._is_replace:
            raise ValueError("method='rdp': allowed with adjacency='add_remove' only.")
        self.adjacency = adjacency
        self.method = method
        relation = dp_accounting.NeighboringRelation
        if method == "rdp":
            self._inner = rdp.RdpAccountant(neighboring_relation=relation.ADD_OR_REMOVE_ONE)
        else:
            self._inner = pld.PLDAccountant(
                relation.REPLACE_ONE if self._is_replace else relation.ADD_OR_REMOVE_ONE,
                value_discretization_interval=interval,
            )

    @property
    def name(self) -> str:
        """For reports: method and the package that does the work."""
        return {
            "pld": "privacy loss distributions (dp_accounting)",
            "rdp": "Rényi differential privacy (dp_accounting)",
        }[self.method]

    def compose(self, event: dp_accounting.DpEvent, count: int = 1) -> "Accountant":
        """Adds ``count`` releases of ``event``; returns the accountant itself."""
        if not isinstance(event, dp_accounting.DpEvent):
            raise ValueError(f"event is a {type(event).__name__}: a DpEvent is needed.")
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            raise ValueError(f"count={count!r}: allowed is a whole number >= 0.")
        if count:
            self._inner.compose(_to_replace_one(event) if self._is_replace else event, count)
        return self

    def epsilon(self, delta: float) -> float:
        """The least ε known to hold at ``delta`` for everything composed so far."""
        check_budget(1.0, delta)
        return float(self._inner.get_epsilon(delta))

    def delta(self, epsilon: float) -> float:
        """The least δ known to hold at ``epsilon`` for everything composed so far."""
        check_budget(epsilon, 0.5)
        return float(self._inner.get_delta(epsilon))


def calibrate_noise_multiplier(
    make_event: Callable[[float], dp_accounting.DpEvent],
    *,
    epsilon: float,
    delta: float,
    adjacency: str,
    method: str = "pld",
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
    def excess(log_z: float, interval: float = _INTERVAL) -> float:
        """log(ε of the plan / target), a smooth falling function of log z."""
        accountant = Accountant(adjacency, method, interval=interval)
        value = accountant.compose(make_event(math.exp(log_z))).epsilon(delta)
        return math.log(min(max(value, 1e-12), 1e12) / epsilon)

    # Coarse intervals are fast, and pessimistic (over thousands of steps by far): they
    # give a first answer that fits. It is then lowered with the default interval. Small
    # multipliers cost most time and memory, so the search comes from above.
    coarse = max(_INTERVAL, min(5e-3, epsilon))
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
