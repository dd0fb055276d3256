"""A budget: what a scope may spend, under which words, and where it stands in the tree."""

import dataclasses
from typing import Any

from dpfa_jax.accounting.accountant import check_budget
from dpfa_jax.ledger import errors
from dpfa_jax.ledger.errors import LedgerError
from dpfa_jax.mechanisms.gradient import ADJACENCIES
from dpfa_jax.messages import Message
from dpfa_jax.policy import Policy

# From the outside to the inside.
LEVELS = ("organisation", "tenant", "data_set", "run")
COMPOSITIONS = ("fixed", "adaptive")
_LONGEST_NAME = 500


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """The newest budget of a scope.

    Attributes:
        epsilon: the ceiling on ε.
        delta: δ.
        adjacency: ``'add_remove'`` or ``'replace_one'``; a scope has its parent's.
        unit: what is hidden, such as ``'user'``; a scope has its parent's.
        level: one of LEVELS.
        parent: the scope around it, or None.
        composition: ``'fixed'``: the events do not depend on what they release (tight; stopping
            early is allowed); ``'adaptive'``: they may (a Rényi filter).
        disjoint: the scope's data are disjoint from those of all its siblings that say so too;
            its parent pays for the most expensive of them and not for all.
        policy: rules for the scope and all below it, or None.
        region: where the data are, or None.
        reason: why it was opened.
        orders_epsilon: the ε that the Rényi orders were chosen for: the first budget's.
    """

    epsilon: float
    delta: float
    adjacency: str
    unit: str
    level: str
    parent: str | None
    composition: str
    disjoint: bool
    policy: Policy | None
    region: str | None
    reason: str
    orders_epsilon: float

    def to_json(self) -> dict[str, Any]:
        """For an entry's body."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return values | {"policy": None if self.policy is None else self.policy.to_json()}

    @classmethod
    def from_json(cls, body: dict[str, Any]) -> "Budget":
        """What :meth:`to_json` wrote."""
        names = {f.name for f in dataclasses.fields(cls)}
        values = {k: v for k, v in body.items() if k in names}
        if values["policy"] is not None:
            values["policy"] = Policy.from_json(values["policy"])
        budget = cls(**values)
        budget.check()
        return budget

    def check(self) -> None:
        """Raises LedgerError unless every value is allowed by itself."""
        check_limits(self.epsilon, self.delta)
        check_name("unit", self.unit)
        for name, allowed in (
            ("adjacency", ADJACENCIES),
            ("level", LEVELS),
            ("composition", COMPOSITIONS),
            ("disjoint", (True, False)),
        ):
            value = getattr(self, name)
            if value not in allowed or isinstance(value, bool) != (name == "disjoint"):
                raise not_allowed(name, repr(value), ", ".join(map(repr, allowed)))
        if self.disjoint and self.parent is None:
            raise not_allowed("disjoint", True, Message(errors.NO_PARENT))
        if self.disjoint and self.adjacency != "add_remove":
            # Replacing one record by another may touch two partitions.
            raise not_allowed("disjoint", True, "adjacency='add_remove'")

    def words(self) -> dict[str, Any]:
        """What is compared when a budget is opened again."""
        values = self.to_json()
        return {k: v for k, v in values.items() if k not in ("reason", "orders_epsilon")}


def check_name(name: str, value: Any, *, empty: bool = False) -> str:
    """Raises LedgerError unless ``value`` is a text that any database keeps as it is."""
    fits = isinstance(value, str) and (bool(value) or empty) and len(value) <= _LONGEST_NAME
    if not fits or any(ord(c) < 32 or 0xD800 <= ord(c) < 0xE000 for c in value):
        raise not_allowed(name, repr(value), Message(errors.TEXT, {"most": _LONGEST_NAME}))
    return value


def check_limits(epsilon: Any, delta: Any) -> None:
    """Raises LedgerError unless a budget may have this ε and δ."""
    for name, value, pair, allowed in (
        ("epsilon", epsilon, (epsilon, 0.5), errors.ABOVE_0),
        ("delta", delta, (1.0, delta), errors.BETWEEN),
    ):
        try:
            check_budget(*pair)
        except ValueError:
            raise not_allowed(name, repr(value), Message(allowed)) from None


def not_allowed(name: str, value: Any, allowed: Any) -> LedgerError:
    """The error for a bad argument; ``allowed`` is a Message, or what needs no translation."""
    return LedgerError(errors.NOT_ALLOWED, name=name, value=str(value), allowed=allowed)
