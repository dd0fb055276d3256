"""The public face of the ledger: open, charge, release, ask."""

import dataclasses
import datetime
import functools
import importlib.metadata
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import dp_accounting
import sqlalchemy as sa

from dpfa_jax.accounting.events import event_from_json, leaves
from dpfa_jax.ledger import errors
from dpfa_jax.ledger.budget import Budget, check_limits, check_name, not_allowed
from dpfa_jax.ledger.chain import FORMAT, ChainError, Entry, Head, follow, seal
from dpfa_jax.ledger.errors import (
    AlreadyReleasedError,
    LedgerDamagedError,
    LedgerError,
    LedgerUnavailableError,
)
from dpfa_jax.ledger.state import State, event_text, parse_body
from dpfa_jax.ledger.store import Store
from dpfa_jax.messages import Message
from dpfa_jax.policy import Policy, load_policy, policies, regions

# Clocks of several hosts differ a little; more than this is an error.
_CLOCK_TOLERANCE = 5_000_000


class Charge(NamedTuple):
    """One charge: label, event, time (seconds since 1970), released or not, key, version."""

    label: str
    event: dp_accounting.DpEvent
    time: float
    released: bool
    key_fingerprint: str | None = None
    software: str = ""


@functools.cache
def _software() -> str:
    return f"dpfa_jax {importlib.metadata.version('dpfa_jax')}"


class Ledger:
    """Budgets and the charges against them: charge first, then release.

    Guarantee. Everything charged to a scope composes to at most its budget's (ε, δ), as does
    everything charged below it, also when processes race, crash or are killed: a charge is one
    transaction, on disk before :meth:`charge` returns, decided on all that was committed
    before. Where events are chosen depending on releases, the budget must have
    ``composition='adaptive'`` (docs/budget.md, "Adaptive choices").

    Args:
        where: a path (SQLite; created if it does not exist), or a URL
            ``postgresql://user@host/database`` (needs the extra ``postgres``).
        create: False: a ledger that is not there is an error, and nothing is written.
        timeout: how long to wait for another process's lock, in seconds.
        clock: seconds since 1970; for tests.

    Raises:
        LedgerUnavailableError: if the database cannot be used.
        LedgerDamagedError: if it is not what was written.
        LedgerError: for a record of another format.

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
        dpfa_jax.ledger.errors.BudgetExceededError: run 1: 'step 1' would bring ε to 6.57...
    """

    def __init__(
        self,
        where: str | Path,
        *,
        create: bool = True,
        timeout: float = 30.0,
        clock: Callable[[], float] = time.time,
    ):
        if not (isinstance(timeout, int | float) and 0 <= timeout < 86_400):
            raise not_allowed("timeout", repr(timeout), Message(errors.SECONDS))
        self._clock = clock
        self._lock = threading.RLock()
        self._state = State()
        self._store = Store(where, timeout)
        self.path = self._store.path
        if create:
            body = {"format": FORMAT, "software": _software()}
            self._store.create(
                seal(None, time=self._now(0), kind="ledger", scope="", label=None, body=body)
            )
        else:
            self._store.check()
        with self._reading():
            pass

    @property
    def name(self) -> str:
        """The path or URL, without a password."""
        return self._store.name

    def close(self) -> None:
        """Closes the connection; using the ledger again opens another."""
        with self._lock:
            self._store.close()

    # --- transactions -------------------------------------------------------------------

    @contextmanager
    def _writing(self) -> Iterator["_Write"]:
        with self._lock:
            with self._store.transaction() as connection:
                self._catch_up(connection, lock=True)
                write = _Write(self, connection)
                yield write
            for entry in write.added:  # Committed: only now does memory follow.
                self._state.apply(entry)

    @contextmanager
    def _reading(self) -> Iterator[sa.Connection]:
        with self._lock, self._store.transaction(writes=False) as connection:
            self._catch_up(connection, lock=False)
            yield connection

    def _catch_up(self, connection: sa.Connection, *, lock: bool) -> None:
        """Reads what others have written, checking that it follows what was read before."""
        head = self._store.head(connection, lock=lock)
        known = self._state.head
        if head == known:
            return
        if known is not None:
            row = self._store.row(connection, known.number)
            if row is None or row.hash != known.hash:
                raise LedgerDamagedError(errors.OLDER, ledger=self.name, number=known.number)
        for entry in follow(
            self._store.rows(connection, -1 if known is None else known.number), known
        ):
            self._state.apply(entry)
        if self._state.head != head:
            raise ChainError(head.number, errors.OTHER_HEAD)

    def _now(self, last: int) -> int:
        now = int(self._clock() * 1e6)
        if now < last - _CLOCK_TOLERANCE:
            raise LedgerUnavailableError(
                errors.CLOCK, ledger=self.name, now=_date(now), last=_date(last)
            )
        return max(now, last)

    # --- budgets ------------------------------------------------------------------------

    def open_budget(
        self,
        scope: str,
        *,
        epsilon: float,
        delta: float,
        adjacency: str,
        unit: str,
        level: str = "run",
        parent: str | None = None,
        composition: str | None = None,
        disjoint: bool = False,
        policy: Policy | str | None = None,
        region: str | None = None,
        reason: str = "opened",
    ) -> None:
        """Opens a budget; opening the same one again changes nothing.

        Args:
            scope: its name, unique in the ledger.
            epsilon: the ceiling on ε.
            delta: δ.
            adjacency: ``'add_remove'`` or ``'replace_one'``; the parent's, if there is one.
            unit: what is hidden; the parent's, if there is one.
            level: ``'organisation'``, ``'tenant'``, ``'data_set'`` or ``'run'``; inside the
                parent's.
            parent: the scope around it: what is charged here is charged there as well.
            composition: ``'fixed'`` or ``'adaptive'``, see :class:`Budget`. None: fixed for a run,
                whose plan stands beforehand; adaptive for what is around runs, because the next run
                is chosen with the results of the last.
            disjoint: declares that this scope's data are disjoint from those of its siblings
                that declare it too; the parent then pays for the dearest of them only.
            policy: rules for this scope and all below, or a preset's name. None: the preset of the
                region, if one is given and no policy stands around.
            region: where the data are. None: the parent's.
            reason: kept with the entry.

        Raises:
            PolicyError: if the budget breaks a rule.
            LedgerError: if ``scope`` has another budget, or for an argument that does not fit.
            ValueError: for an impossible ε, δ or adjacency.
        """
        check_limits(epsilon, delta)
        check_name("scope", scope)
        check_name("reason", reason)
        with self._writing() as write:
            around = [] if parent is None else self._state.path(parent)
            if region is None and around:
                region = around[0].budget.region
            bare = all(s.budget.policy is None for s in around)
            if policy is None and region is not None and bare:
                policy = regions().get(region)
            budget = Budget(
                epsilon=float(epsilon),
                delta=float(delta),
                adjacency=adjacency,
                unit=unit,
                level=level,
                parent=parent,
                composition=composition or ("fixed" if level == "run" else "adaptive"),
                disjoint=disjoint,
                policy=_policy(policy),
                region=region,
                reason=reason,
                orders_epsilon=float(epsilon),
            )
            budget.check()
            known = self._state.scopes.get(scope)
            if known is not None:
                if known.budget.words() == budget.words():
                    return
                differs = {
                    k: (v, known.budget.words()[k])
                    for k, v in budget.words().items()
                    if v != known.budget.words()[k]
                }
                raise LedgerError(
                    errors.OTHER_BUDGET,
                    scope=scope,
                    found=", ".join(f"{k} = {old}" for k, (_, old) in differs.items()),
                    asked=", ".join(f"{k} = {new}" for k, (new, _) in differs.items()),
                )
            self._state.check_opening(scope, budget)
            write.add("budget", scope, None, budget.to_json())

    def new_budget(
        self,
        scope: str,
        *,
        reason: str,
        epsilon: float | None = None,
        delta: float | None = None,
        policy: Policy | str | None = None,
    ) -> None:
        """Replaces the budget of ``scope``; everything charged so far still counts against it.

        There is no reset. From here on the guarantee is the new (ε, δ); it is one if the decision
        did not depend on the private data (adaptive composition: or only through releases).

        Args:
            scope: an opened scope.
            reason: why; kept with the entry.
            epsilon: the new ceiling, or None to keep it.
            delta: the new δ, or None. Not with adaptive composition, whose guarantee is for one δ.
            policy: a policy from now on, or None to keep what there is.

        Raises:
            PolicyError: if the new budget breaks a rule.
            LedgerError: for an argument that is not allowed.
        """
        if not isinstance(reason, str) or not reason.strip():
            raise not_allowed("reason", repr(reason), Message(errors.WHY))
        check_name("reason", reason)
        with self._writing() as write:
            old = self._state.need(scope).budget
            new = dataclasses.replace(
                old,
                epsilon=old.epsilon if epsilon is None else epsilon,
                delta=old.delta if delta is None else delta,
                policy=_policy(policy) or old.policy,
                reason=reason,
            )
            new.check()
            if old.composition == "adaptive" and new.delta != old.delta:
                raise not_allowed(
                    "delta", new.delta, Message(errors.KEPT, {"value": str(old.delta)})
                )
            self._state.check_policies(scope, new, self._state.path(scope)[1:])
            write.add("budget", scope, None, new.to_json())

    def budget(self, scope: str) -> Budget:
        """The newest budget of ``scope``."""
        with self._reading():
            return self._state.need(scope).budget

    def scopes(self) -> dict[str, Budget]:
        """The newest budget of every scope."""
        with self._reading():
            return {name: s.budget for name, s in self._state.scopes.items()}

    # --- charges ------------------------------------------------------------------------

    def charge(
        self,
        scope: str,
        label: str,
        event: dp_accounting.DpEvent,
        *,
        key_fingerprint: str | None = None,
    ) -> bool:
        """Charges ``event``; call it before the release that ``event`` describes.

        Args:
            scope: an opened scope. The event is charged to every scope around it as well.
            label: names the release within its scope. A label is charged once. Charging it
                again, before :meth:`mark_released`, charges nothing and returns False:
                a crash came between charge and release, and the release may be made.
            event: what the release costs, with the multiplier σ/Δ under the scope's adjacency.
            key_fingerprint: which key makes the noise (:attr:`SecureKey.fingerprint`); never a
                key.

        Returns:
            True if this call charged it, False if it was charged before.

        Raises:
            BudgetExceededError: if it does not fit; nothing is charged.
            PolicyError: if it breaks a policy; nothing is charged.
            AlreadyReleasedError: if the label was charged and released.
            LedgerUnavailableError: if it could not be written; then it must not be released.
            ValueError: for an unknown scope, a label charged with another event, or an event
                that cannot be accounted for.
        """
        check_name("label", label)
        if key_fingerprint is not None:
            check_name("key_fingerprint", key_fingerprint)
        text, added = _parts(scope, event)
        with self._writing() as write:
            self._state.need(scope)
            old = self._store.labelled(write.connection, "charge", scope, label)
            if old is not None:
                if parse_body(old.body)["event"] != text:
                    raise LedgerError(errors.OTHER_EVENT, scope=scope, label=label)
                if self._store.labelled(write.connection, "release", scope, label) is not None:
                    raise AlreadyReleasedError(errors.RELEASED, scope=scope, label=label)
                return False
            try:
                self._state.check_charge(scope, label, added)
            except dp_accounting.UnsupportedEventError as error:
                raise LedgerError(errors.EVENT, scope=scope, problem=str(error)) from None
            body = {"event": text, "key_fingerprint": key_fingerprint, "software": _software()}
            write.add("charge", scope, label, body)
        return True

    def mark_released(self, scope: str, label: str) -> None:
        """Notes, on disk, that the release of ``label`` was made; it is not made again.

        Raises:
            LedgerError: if the label was never charged.
        """
        with self._writing() as write:
            charge = self._store.labelled(write.connection, "charge", scope, label)
            if charge is None:
                raise LedgerError(errors.UNCHARGED, scope=scope, label=label)
            if self._store.labelled(write.connection, "release", scope, label) is None:
                write.add("release", scope, label, {"charge": charge.number})

    def charges(self, scope: str) -> list[Charge]:
        """Everything charged to ``scope`` itself, oldest first."""
        found: dict[str, Charge] = {}
        for entry in self.entries():
            if entry.scope != scope or entry.label is None:
                continue
            if entry.kind == "charge":
                body = parse_body(entry.body)
                event = event_from_json(body["event"])
                found[entry.label] = Charge(entry.label, event, entry.time / 1e6, False,
                                            body["key_fingerprint"], body["software"])  # fmt: skip
            elif entry.kind == "release":
                found[entry.label] = found[entry.label]._replace(released=True)
        with self._lock:
            self._state.need(scope)
        return list(found.values())

    # --- answers ------------------------------------------------------------------------

    def spent(self, scope: str, *, fine: bool = True) -> float:
        """ε of everything charged to ``scope`` and below, at the budget's δ.

        With ``composition='adaptive'`` it is an odometer: it holds at whatever time one stops.

        Args:
            scope: an opened scope.
            fine: False answers faster, and never less than True (for displays).
        """
        with self._reading():
            self._state.need(scope)
            return self._state.epsilon(scope, fine=fine)

    def odometer(self, scope: str) -> float:
        """ε at the budget's δ that holds whenever one stops, however events were chosen."""
        with self._reading():
            return self._state.odometer(scope)

    def what_if(self, scope: str, event: dp_accounting.DpEvent) -> dict[str, float]:
        """ε of ``scope`` and of every scope around it, if ``event`` were charged. Charges nothing.

        Raises:
            ValueError: for an event that cannot be accounted for.
        """
        _, added = _parts(scope, event)
        with self._reading():
            path = self._state.path(scope)
            try:
                return {s.name: self._state.epsilon(scope, added, around=s.name) for s in path}
            except dp_accounting.UnsupportedEventError as error:
                raise LedgerError(errors.EVENT, scope=scope, problem=str(error)) from None

    def head(self) -> Head:
        """Number and hash of the last entry: a receipt, worth keeping somewhere else."""
        with self._reading():
            assert self._state.head is not None
            return self._state.head

    def entries(self) -> Iterator[Entry]:
        """All entries, oldest first, each checked against the chain as it is read.

        Raises:
            LedgerDamagedError: for the first that is not what was written.
        """
        with self._store.transaction(writes=False) as connection:
            head = self._store.head(connection, lock=False)
            last = None
            for entry in follow(self._store.rows(connection), None):
                last = Head(entry.number, entry.hash)
                yield entry
            if last != head:
                raise ChainError(head.number, errors.OTHER_HEAD)

    def verify(self, receipt: Head | None = None) -> Head:
        """Reads everything again, and checks chain, contents, and that no budget was passed.

        Args:
            receipt: a head noted earlier; the chain must still go through it.

        Returns:
            The head.

        Raises:
            LedgerDamagedError: for the first entry that is not what was written.
        """
        state = State()
        with self._lock:
            for entry in self.entries():
                try:
                    state.apply(entry)
                except ChainError as error:
                    raise LedgerDamagedError(
                        errors.DAMAGED, ledger=self.name, number=error.number,
                        problem=error.problem,
                    ) from None  # fmt: skip
                seen = Head(entry.number, entry.hash)
                if receipt is not None and receipt.number == entry.number and receipt != seen:
                    raise LedgerDamagedError(errors.OLDER, ledger=self.name, number=entry.number)
            assert state.head is not None
            overspent = state.overspent()
            if overspent is not None:
                raise LedgerDamagedError(
                    errors.DAMAGED, ledger=self.name, number=state.head.number,
                    problem=Message(errors.OVERSPENT, {"scope": overspent}),
                )  # fmt: skip
            for known in (receipt, self._state.head):
                if known is not None and known.number > state.head.number:
                    raise LedgerDamagedError(errors.OLDER, ledger=self.name, number=known.number)
        return state.head


class _Write:
    """Entries that one transaction adds."""

    def __init__(self, ledger: Ledger, connection: sa.Connection):
        self._ledger = ledger
        self.connection = connection
        self.added: list[Entry] = []

    def add(self, kind: str, scope: str, label: str | None, body: dict[str, Any]) -> None:
        """Appends an entry."""
        state = self._ledger._state
        entry = seal(
            state.head,
            time=self._ledger._now(state.last_time),
            kind=kind,
            scope=scope,
            label=label,
            body=body,
        )
        self._ledger._store.append(self.connection, entry)
        self.added.append(entry)


def _parts(
    scope: str, event: dp_accounting.DpEvent
) -> tuple[dict[str, Any], list[tuple[dp_accounting.DpEvent, int]]]:
    """An event as JSON, and the single events in it."""
    try:
        return event_text(event), list(leaves(event))
    except ValueError as error:
        raise LedgerError(errors.EVENT, scope=scope, problem=str(error)) from None


def _policy(policy: Policy | str | None) -> Policy | None:
    """The policy of that name or file."""
    if not isinstance(policy, str):
        return policy
    if Path(policy).suffix != ".toml" and policy not in policies():
        names = ", ".join(policies())
        raise not_allowed("policy", repr(policy), Message(errors.PRESET, {"names": names}))
    try:
        return load_policy(policy)
    except ValueError as error:
        # What is wrong in a file, its author reads in the words of the file: English.
        raise not_allowed(
            "policy", repr(policy), Message(errors.READABLE, {"problem": str(error)})
        ) from None


def _date(microseconds: int) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(microseconds / 1e6, datetime.UTC)
