"""A budget that survives its process: charge first, then release.

One SQLite file holds budgets, one for each scope, and the charges against them. A charge
is one transaction that is on disk before :meth:`Ledger.charge` returns, and it is
refused if everything charged so far together with it would pass the budget. A crash
between charge and release wastes budget and never forgets it.
"""

import functools
import json
import math
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import dp_accounting

from dpfa_jax.accounting import Accountant
from dpfa_jax.accounting.accountant import check_budget
from dpfa_jax.accounting.events import event_from_json, event_to_json
from dpfa_jax.mechanisms import adjacency_factor

_SCHEMA = """
CREATE TABLE IF NOT EXISTS budgets (
    scope TEXT PRIMARY KEY,
    epsilon REAL NOT NULL,
    delta REAL NOT NULL,
    adjacency TEXT NOT NULL,
    unit TEXT NOT NULL,
    created REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS charges (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    scope TEXT NOT NULL REFERENCES budgets (scope),
    label TEXT NOT NULL,
    event TEXT NOT NULL,
    time REAL NOT NULL,
    released INTEGER NOT NULL DEFAULT 0,
    UNIQUE (scope, label)
);
"""


class LedgerError(ValueError):
    """The ledger refuses. Nothing was charged, nothing may be released."""


class BudgetExceededError(LedgerError):
    """A charge would pass its budget."""


class AlreadyReleasedError(LedgerError):
    """What a charge paid for was released before; a second release needs its own charge."""


class Charge(NamedTuple):
    """One entry: label, event, time (seconds since 1970), and whether it was released."""

    label: str
    event: dp_accounting.DpEvent
    time: float
    released: bool


class Ledger:
    """Budgets and charges in one SQLite file.

    Args:
        path: the file; created if it does not exist.

    Example:
        >>> import tempfile
        >>> ledger = Ledger(Path(tempfile.mkdtemp()) / "ledger.sqlite")
        >>> ledger.open_budget("run 1", epsilon=4.4, delta=1e-5, adjacency="add_remove",
        ...                    unit="user")
        >>> ledger.charge("run 1", "step 0", dp_accounting.GaussianDpEvent(1.0))
        True
        >>> round(ledger.spent("run 1"), 2)
        4.38
        >>> ledger.charge("run 1", "step 1", dp_accounting.GaussianDpEvent(1.0))
        Traceback (most recent call last):
        ...
        dpfa_jax.ledger.sqlite.BudgetExceededError: run 1: 'step 1' would bring ε to 6.57...
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        with self._transaction() as database:
            for statement in _SCHEMA.split(";"):
                database.execute(statement)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """An exclusive transaction: on disk when it ends, undone if it raises."""
        database = sqlite3.connect(self.path, timeout=30, isolation_level=None)
        try:
            database.execute("PRAGMA journal_mode = WAL")
            # FULL: the commit is on the disk, not in a cache, before it returns.
            database.execute("PRAGMA synchronous = FULL")
            database.execute("BEGIN IMMEDIATE")
            try:
                yield database
            except BaseException:
                database.execute("ROLLBACK")
                raise
            database.execute("COMMIT")
        finally:
            database.close()

    def open_budget(
        self, scope: str, *, epsilon: float, delta: float, adjacency: str, unit: str
    ) -> None:
        """Opens a budget; opening the same one again changes nothing.

        Raises:
            ValueError: for an impossible budget, or if ``scope`` has another one.
        """
        check_budget(epsilon, delta)
        adjacency_factor(adjacency)
        asked = (float(epsilon), float(delta), adjacency, unit)
        with self._transaction() as database:
            found = self._budget(database, scope)
            if found is None:
                database.execute(
                    "INSERT INTO budgets VALUES (?, ?, ?, ?, ?, ?)", (scope, *asked, time.time())
                )
            elif found != asked:
                raise LedgerError(
                    f"scope={scope!r}: has the budget (epsilon, delta, adjacency, unit) = {found}; "
                    f"{asked} was asked. A budget does not change."
                )

    @staticmethod
    def _budget(database: sqlite3.Connection, scope: str) -> tuple[float, float, str, str] | None:
        return database.execute(
            "SELECT epsilon, delta, adjacency, unit FROM budgets WHERE scope = ?", (scope,)
        ).fetchone()

    @classmethod
    def _need_budget(
        cls, database: sqlite3.Connection, scope: str
    ) -> tuple[float, float, str, str]:
        budget = cls._budget(database, scope)
        if budget is None:
            raise LedgerError(f"scope={scope!r}: no budget was opened for it.")
        return budget

    @staticmethod
    def _charges(database: sqlite3.Connection, scope: str) -> list[Charge]:
        rows = database.execute(
            "SELECT label, event, time, released FROM charges WHERE scope = ? ORDER BY number",
            (scope,),
        )
        return [
            Charge(label, event_from_json(json.loads(event)), at, bool(released))
            for label, event, at, released in rows
        ]

    def charge(self, scope: str, label: str, event: dp_accounting.DpEvent) -> bool:
        """Charges ``event``; call it before the release that ``event`` describes.

        Args:
            scope: an opened budget.
            label: names the release within its scope. A label is charged once. Charging it
                again, before :meth:`mark_released`, charges nothing and returns False:
                a crash came between charge and release, and the release may be made.
            event: what the release costs.

        Returns:
            True if this call charged it, False if it was charged before.

        Raises:
            BudgetExceededError: if it does not fit; nothing is charged.
            AlreadyReleasedError: if the label was charged and released.
            ValueError: for an unknown scope, or a label charged with another event.
        """
        text = json.dumps(event_to_json(event), sort_keys=True)
        with self._transaction() as database:
            epsilon, delta, adjacency, _ = self._need_budget(database, scope)
            charges = self._charges(database, scope)
            for old in charges:
                if old.label == label:
                    if json.dumps(event_to_json(old.event), sort_keys=True) != text:
                        raise LedgerError(f"label={label!r}: was charged with another event.")
                    if old.released:
                        raise AlreadyReleasedError(
                            f"{scope}: {label!r} was charged and released before. Releasing it "
                            "again, with other noise, needs a charge of its own."
                        )
                    return False
            total = _spent([*(c.event for c in charges), event], delta, adjacency, epsilon)
            if total > epsilon:
                raise BudgetExceededError(
                    f"{scope}: {label!r} would bring ε to {total:.4g} at δ = {delta:g}; "
                    f"the budget is ε = {epsilon:g}. Nothing was charged or released."
                )
            database.execute(
                "INSERT INTO charges (scope, label, event, time) VALUES (?, ?, ?, ?)",
                (scope, label, text, time.time()),
            )
        return True

    def mark_released(self, scope: str, label: str) -> None:
        """Notes, on disk, that the release of ``label`` was made; it is not made again.

        Raises:
            LedgerError: if the label was never charged.
        """
        with self._transaction() as database:
            changed = database.execute(
                "UPDATE charges SET released = 1 WHERE scope = ? AND label = ?", (scope, label)
            )
            if changed.rowcount != 1:
                raise LedgerError(f"{scope}: {label!r} was released without a charge.")

    def charges(self, scope: str) -> list[Charge]:
        """Everything charged to ``scope``, oldest first."""
        with self._transaction() as database:
            self._need_budget(database, scope)
            return self._charges(database, scope)

    def spent(self, scope: str, *, fine: bool = True) -> float:
        """ε of everything charged to ``scope``, at the budget's δ.

        Args:
            scope: an opened budget.
            fine: False answers faster, and never less than True (for displays).
        """
        with self._transaction() as database:
            budget = self._need_budget(database, scope)
            charges = self._charges(database, scope)
        return _spent([c.event for c in charges], budget[1], budget[2], 0.0 if fine else math.inf)


@functools.lru_cache(maxsize=4096)
def _epsilon(
    counts: tuple[tuple[str, int], ...], delta: float, adjacency: str, fine: bool
) -> float:
    """ε of a composition, given as event texts and how often each happened.

    Without ``fine``, bins ten times wider: much faster, and never smaller.
    """
    accountant = Accountant(adjacency) if fine else Accountant(adjacency, interval=1e-3)
    for text, count in counts:
        accountant.compose(event_from_json(json.loads(text)), count)
    return accountant.epsilon(delta) if counts else 0.0


def _spent(
    events: list[dp_accounting.DpEvent], delta: float, adjacency: str, enough: float
) -> float:
    """ε of the composition; the coarse answer is enough if it is at most ``enough``."""
    counts: dict[str, int] = {}
    for event in events:
        count = 1
        while isinstance(event, dp_accounting.SelfComposedDpEvent):
            event, count = event.event, count * event.count
        text = json.dumps(event_to_json(event), sort_keys=True)
        counts[text] = counts.get(text, 0) + count
    key = tuple(sorted(counts.items()))
    coarse = _epsilon(key, delta, adjacency, False)
    return coarse if coarse <= enough else _epsilon(key, delta, adjacency, True)
