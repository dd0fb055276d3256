"""Entries, and the chain of hashes that makes a change visible.

Each entry's hash covers its own contents and the hash of the entry before it. So whoever
changes, removes, inserts or reorders entries has to rewrite every later hash as well, and the
head's; against somebody who can do that, compare with a head that was noted elsewhere
(docs/budget.md, "What the chain shows").
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from dpfa_jax.ledger import errors
from dpfa_jax.messages import Message

FORMAT = 2
# What stands before the first entry.
START = "0" * 64


class Entry(NamedTuple):
    """One entry, as it is stored.

    Attributes:
        number: 0, 1, 2, …
        time: microseconds since 1970, UTC.
        kind: ``'ledger'`` (the first), ``'budget'``, ``'charge'`` or ``'release'``.
        scope: whose budget or charge it is.
        label: names the release of a charge; None for budgets.
        body: JSON with sorted keys; what is in it depends on the kind.
        previous: hash of the entry before.
        hash: SHA-256, in hexadecimal, of all of the above.
    """

    number: int
    time: int
    kind: str
    scope: str
    label: str | None
    body: str
    previous: str
    hash: str


class Head(NamedTuple):
    """Where a chain ends: note it elsewhere, and ``verify`` can tell an old copy."""

    number: int
    hash: str


class ChainError(Exception):
    """Entry ``number`` is not what was written."""

    def __init__(self, number: int, text: str, values: dict[str, Any] | None = None):
        problem = Message(text, values or {})
        super().__init__(f"entry {number}: {problem.show()}")
        self.number = number
        self.problem = problem


def dump(body: dict[str, Any]) -> str:
    """The one way in which a body is written."""
    return json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)


def seal(
    head: Head | None, *, time: int, kind: str, scope: str, label: str | None, body: dict[str, Any]
) -> Entry:
    """The entry that follows ``head``.

    Example:
        >>> first = seal(None, time=0, kind="ledger", scope="", label=None, body={})
        >>> first.number, first.hash[:8]
        (0, '2cb70553')
    """
    number, previous = (0, START) if head is None else (head.number + 1, head.hash)
    text = dump(body)
    return Entry(number, time, kind, scope, label, text, previous,
                 _digest(number, time, kind, scope, label, text, previous))  # fmt: skip


def _digest(*fields: Any) -> str:
    # JSON keeps the borders between the fields, and ASCII has one encoding.
    return hashlib.sha256(json.dumps(fields).encode()).hexdigest()


def follow(rows: Iterable[Any], head: Head | None) -> Iterator[Entry]:
    """The entries of ``rows``, each checked to follow the one before; the first follows ``head``.

    Raises:
        ChainError: for the first that does not.
    """
    number, previous = (-1, START) if head is None else head
    for row in rows:
        entry = Entry(*row)
        number += 1
        if entry.number != number:
            raise ChainError(number, errors.MISSING, {"found": str(entry.number)})
        if entry.previous != previous:
            raise ChainError(number, errors.UNLINKED)
        if entry.hash != _digest(*entry[:-1]):
            raise ChainError(number, errors.CHANGED)
        previous = entry.hash
        yield entry
