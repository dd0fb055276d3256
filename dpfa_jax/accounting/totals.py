"""What a scope has spent, kept so that the next charge is decided in microseconds.

Two kinds of composition, for two kinds of adversary:

* :class:`FixedTotal`: the list of events does not depend on what they release (stopping early
  may). Tight: privacy loss distributions.
* Adaptive choices: sums of Rényi costs (``renyi.py``); :class:`dpfa_jax.ledger.Ledger` keeps them
  for each scope.

Every shortcut here is an upper bound on ε, never a guess.
"""

import functools
import math
from collections.abc import Iterable

import dp_accounting

from dpfa_jax.accounting.accountant import Accountant
from dpfa_jax.accounting.merge import MOST_KINDS, sampled_kinds
from dpfa_jax.accounting.renyi import (
    FIXED_ORDERS,
    RenyiCost,
    fixed_epsilon,
    nothing,
    renyi_cost,
)

Added = Iterable[tuple[dp_accounting.DpEvent, int]]

_COARSE, _FINE = 1e-3, 1e-4
# A certificate says: these counts were composed, and fit.
_CERTIFICATES = 8


class FixedTotal:
    """Counts of events fixed beforehand, under one adjacency and one δ.

    Args:
        adjacency: ``'add_remove'`` or ``'replace_one'``.
        delta: δ of the budget.

    Example:
        >>> total = FixedTotal("add_remove", 1e-5)
        >>> event = dp_accounting.GaussianDpEvent(1.0)
        >>> total.fits([(event, 1)], 4.4), total.fits([(event, 2)], 4.4)
        (True, False)
        >>> total.add([(event, 1)])
        >>> round(total.epsilon(), 2)
        4.38
    """

    def __init__(self, adjacency: str, delta: float):
        self._adjacency = adjacency
        self._delta = delta
        self._counts: dict[dp_accounting.DpEvent, int] = {}
        self._cost = nothing(FIXED_ORDERS)
        self._certificates: list[tuple[float, dict[dp_accounting.DpEvent, int]]] = []

    def add(self, added: Added) -> None:
        """Counts ``added``: it was charged."""
        added = list(added)
        for leaf, n in added:
            self._counts[leaf] = self._counts.get(leaf, 0) + n
        self._cost = self._bound(added)

    def epsilon(self, added: Added = (), *, fine: bool = True) -> float:
        """ε of everything counted and ``added``; without ``fine`` faster, and never less."""
        added = list(added)
        counts = self._with(added)
        bound = fixed_epsilon(self._bound(added), self._delta)
        interval = _FINE if fine else _COARSE
        return min(bound, _composed(frozenset(counts.items()), self._delta, self._adjacency,
                                    interval))  # fmt: skip

    def at(self, delta: float) -> "FixedTotal":
        """The same counts under another δ."""
        other = FixedTotal(self._adjacency, delta)
        other.add(self._counts.items())
        return other

    def renyi(self, orders: tuple[float, ...]) -> RenyiCost:
        """The sum of the Rényi costs, for an odometer."""
        cost = nothing(orders)
        for leaf, n in self._counts.items():
            cost = cost.plus(renyi_cost(leaf, self._adjacency, orders), n)
        return cost

    def fits(self, added: Added, limit: float) -> bool:
        """Whether ε with ``added`` is at most ``limit``."""
        added = [(leaf, n) for leaf, n in added if n]
        if not added:
            return True
        counts = self._with(added)
        # Merged kinds answer a bound that need not grow with the counts: no certificates then.
        merged = sampled_kinds(counts) > MOST_KINDS
        for certified, known in self._certificates:
            # Fewer releases are post-processing of more.
            if (
                not merged
                and certified <= limit
                and all(known.get(e, 0) >= n for e, n in counts.items())
            ):
                return True
        if fixed_epsilon(self._bound(added), self._delta) <= limit:
            return True
        found = self._exact(counts, limit)
        if found > limit:
            return False
        if not merged:
            self._certify(counts, added[-1][0], found, limit)
        return True

    def _certify(
        self,
        counts: dict[dp_accounting.DpEvent, int],
        leaf: dp_accounting.DpEvent,
        found: float,
        limit: float,
    ) -> None:
        """Keeps ``counts`` as known to fit, with as many more of ``leaf`` as a few trials find."""
        best, more = (found, counts), 0
        step = max(1, counts[leaf])
        for _ in range(4):
            trial = counts | {leaf: counts[leaf] + more + step}
            epsilon = self._exact(trial, limit, _COARSE)
            if epsilon <= limit:
                best, more = (epsilon, trial), more + step
            step //= 4
            if not step:
                break
        self._certificates = [*self._certificates[-_CERTIFICATES + 1 :], best]

    def _exact(
        self, counts: dict[dp_accounting.DpEvent, int], limit: float, finest: float = _FINE
    ) -> float:
        key = frozenset(counts.items())
        coarse = _composed(key, self._delta, self._adjacency, _COARSE)
        if coarse <= limit or finest == _COARSE:
            return coarse
        return _composed(key, self._delta, self._adjacency, _FINE)

    def _with(self, added: Added) -> dict[dp_accounting.DpEvent, int]:
        counts = dict(self._counts)
        for leaf, n in added:
            counts[leaf] = counts.get(leaf, 0) + n
        return counts

    def _bound(self, added: Added) -> RenyiCost:
        cost = self._cost
        for leaf, n in added:
            cost = cost.plus(renyi_cost(leaf, self._adjacency, FIXED_ORDERS), n)
        return cost


@functools.lru_cache(maxsize=4096)
def _composed(
    counts: frozenset[tuple[dp_accounting.DpEvent, int]],
    delta: float,
    adjacency: str,
    interval: float,
) -> float:
    """ε of a composition by privacy loss distributions."""
    if not counts:
        return 0.0
    accountant = Accountant(adjacency, "pld", interval=interval)
    # In one order, so that equal contents give equal answers to the last digit.
    for leaf, count in sorted(counts, key=lambda item: (repr(item[0]), item[1])):
        accountant.compose(leaf, count)
    found = accountant.epsilon(delta)
    return found if not math.isnan(found) else math.inf
