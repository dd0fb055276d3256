"""Spending a fixed total unevenly: by a plan, or by looking at what is already released."""

import itertools
from collections.abc import Callable, Sequence

import dp_accounting

from dpfa_jax.accounting.accountant import calibrate_noise_multiplier, check_budget
from dpfa_jax.accounting.events import leaves
from dpfa_jax.accounting.renyi import Orders, nothing, renyi_cost
from dpfa_jax.mechanisms import adjacency_factor

MakeEvent = Callable[[float], dp_accounting.DpEvent]


def planned_multipliers(
    make_event: MakeEvent,
    factors: Sequence[float],
    *,
    epsilon: float,
    delta: float,
    adjacency: str,
) -> list[float]:
    """Noise multipliers z·f for each of ``factors``, all together at most (ε, δ).

    The plan stands before the first release, so the composition is the tight one.

    Args:
        make_event: the event of one entry of ``factors`` (a step, a block of steps) for z.
        factors: relative noise, entry by entry, such as 1.2 early and 0.8 late.
        epsilon: target ε.
        delta: target δ.
        adjacency: ``'add_remove'`` or ``'replace_one'``.

    Raises:
        ValueError: for factors that are none, or a target that no noise fits.

    Example:
        >>> zs = planned_multipliers(dp_accounting.GaussianDpEvent, [2.0, 1.0], epsilon=4.38,
        ...                          delta=1e-5, adjacency="add_remove")
        >>> round(zs[0] / zs[1], 6), round(zs[0]**-2 + zs[1]**-2, 2)
        (2.0, 1.0)
    """
    if not factors or not all(isinstance(f, int | float) and 0 < f < 1e6 for f in factors):
        raise ValueError(f"factors={factors!r}: allowed are numbers between 0 and 1e6, at least 1.")
    counts = {f: sum(f == g for g in factors) for f in factors}

    def whole(z: float) -> dp_accounting.DpEvent:
        return dp_accounting.ComposedDpEvent(
            [dp_accounting.SelfComposedDpEvent(make_event(z * f), n) for f, n in counts.items()]
        )

    z = calibrate_noise_multiplier(whole, epsilon=epsilon, delta=delta, adjacency=adjacency)
    return [z * f for f in factors]


class AdaptiveSchedule:
    """Goes down a ladder of noise multipliers when a released statistic says so.

    Guarantee. If the statistic is a function of what was released before, everything together is
    (ε, δ)-differentially private: each block is let through by a Rényi filter (``renyi.py``).

    Args:
        make_event: the event of one block, as a function of its noise multiplier.
        ladder: the multipliers to choose from, falling.
        epsilon: the total ε.
        delta: the total δ.
        adjacency: ``'add_remove'`` or ``'replace_one'``.
        threshold: a statistic below it asks for less noise: the next rung.

    Example:
        >>> schedule = AdaptiveSchedule(dp_accounting.GaussianDpEvent, [20.0, 9.0], epsilon=1.0,
        ...                             delta=1e-5, adjacency="add_remove", threshold=0.5)
        >>> schedule.next(None), schedule.next(0.9), schedule.next(0.1)
        (20.0, 20.0, 9.0)
        >>> schedule.epsilon <= 1.0
        True
    """

    def __init__(
        self,
        make_event: MakeEvent,
        ladder: Sequence[float],
        *,
        epsilon: float,
        delta: float,
        adjacency: str,
        threshold: float,
    ):
        check_budget(epsilon, delta)
        adjacency_factor(adjacency)
        falling = all(a > b for a, b in itertools.pairwise(ladder))
        if not ladder or not falling or not ladder[-1] > 0:
            raise ValueError(f"ladder={ladder!r}: allowed are falling numbers > 0, at least one.")
        self._make_event = make_event
        self._ladder = tuple(ladder)
        self._limit, self._delta, self._adjacency = epsilon, delta, adjacency
        self._threshold = threshold
        self._orders = Orders.for_budget(epsilon, delta)
        self._cost = nothing(self._orders.alphas)
        self._rung = 0

    @property
    def epsilon(self) -> float:
        """ε of all blocks so far; it holds whenever one stops."""
        return self._orders.epsilon(self._cost, self._delta)

    def next(self, statistic: float | None) -> float | None:
        """The next block's noise multiplier, which counts as spent; None when nothing fits.

        Args:
            statistic: a function of earlier releases, or None to stay on the rung.
        """
        wanted = self._rung
        if statistic is not None and statistic < self._threshold:
            wanted = min(wanted + 1, len(self._ladder) - 1)
        # What does not fit gives way to the rung above it: more noise, until nothing is left.
        for rung in range(wanted, -1, -1):
            cost = self._cost
            for leaf, count in leaves(self._make_event(self._ladder[rung])):
                more = renyi_cost(leaf, self._adjacency, self._orders.alphas)
                cost = cost.plus(more, count)
            if self._orders.epsilon(cost, self._delta) <= self._limit:
                self._cost, self._rung = cost, rung
                return self._ladder[rung]
        return None
