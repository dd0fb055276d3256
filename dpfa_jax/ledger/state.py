"""The scopes and their totals in memory, made from the entries and nothing else.

A process reads each entry once, checks that it follows the chain, and adds it to the totals;
the next charge is decided on the totals. Nothing of this is stored: a new process reads the
whole chain.
"""

import functools
import json
from typing import Any

import dp_accounting

from dpfa_jax.accounting.events import event_from_json, event_to_json, leaves
from dpfa_jax.accounting.renyi import Orders, RenyiCost, nothing, renyi_cost
from dpfa_jax.accounting.totals import FixedTotal
from dpfa_jax.ledger import errors
from dpfa_jax.ledger.budget import LEVELS, Budget, not_allowed
from dpfa_jax.ledger.chain import ChainError, Entry, Head
from dpfa_jax.ledger.errors import BudgetExceededError, LedgerError, PolicyError
from dpfa_jax.messages import Message

Added = list[tuple[dp_accounting.DpEvent, int]]


@functools.lru_cache(maxsize=4096)
def parse_body(text: str) -> dict[str, Any]:
    """An entry's body."""
    return json.loads(text)


@functools.lru_cache(maxsize=4096)
def _charged(body: str) -> tuple[tuple[dp_accounting.DpEvent, int], ...]:
    return tuple(leaves(event_from_json(parse_body(body)["event"])))


class Tree:
    """Rényi totals of one adaptive scope: of itself, and of every scope below it.

    The total of a scope is what is charged to it, plus the totals of its ordinary children, plus
    the largest total, order by order, of its disjoint children: a record is in one of these.
    """

    def __init__(self, budget: Budget):
        self.orders = Orders.for_budget(budget.orders_epsilon, budget.delta)
        self._adjacency = budget.adjacency
        self._zero = nothing(self.orders.alphas)
        # By scope: everything but the disjoint children; and the largest of those.
        self._sums: dict[str, tuple[RenyiCost, RenyiCost]] = {}

    def cost(self, added: Added) -> RenyiCost:
        """The cost of some events."""
        total = self._zero
        for leaf, n in added:
            total = total.plus(renyi_cost(leaf, self._adjacency, self.orders.alphas), n)
        return total

    def total(self, scope: str) -> RenyiCost:
        """What one record of ``scope`` has paid at most."""
        base, worst = self._sums.get(scope, (self._zero, self._zero))
        return base.plus(worst)

    def raised(
        self, path: list[tuple[str, bool]], added: Added
    ) -> dict[str, tuple[RenyiCost, RenyiCost]]:
        """The sums along ``path``, from the charged scope to this one, with ``added``.

        Args:
            path: scopes, each with whether it is disjoint from its siblings.
            added: the events.
        """
        more = self.cost(added)
        new: dict[str, tuple[RenyiCost, RenyiCost]] = {}
        below: tuple[RenyiCost, bool] | None = None
        for scope, disjoint in path:
            base, worst = self._sums.get(scope, (self._zero, self._zero))
            before = base.plus(worst)
            if below is not None and below[1]:
                worst = worst.largest(below[0])
                more = worst.plus(base).plus(before, -1)
            else:
                base = base.plus(more)
            new[scope] = (base, worst)
            below = (base.plus(worst), disjoint)
        return new

    def keep(self, new: dict[str, tuple[RenyiCost, RenyiCost]]) -> None:
        """Makes ``new`` the sums."""
        self._sums.update(new)


class Scope:
    """One scope: its newest budget and what it has spent."""

    def __init__(self, name: str, budget: Budget):
        self.name = name
        self.budget = budget
        # The largest ε that a budget of the present δ allowed.
        self.highest = budget.epsilon
        self.tree: Tree | None = None
        self.fixed: FixedTotal | None = None
        if budget.composition == "adaptive":
            self.tree = Tree(budget)
        else:
            self.fixed = FixedTotal(budget.adjacency, budget.delta)


class State:
    """Everything that the entries up to :attr:`head` say."""

    def __init__(self) -> None:
        self.head: Head | None = None
        self.last_time = 0
        self.scopes: dict[str, Scope] = {}

    def apply(self, entry: Entry) -> None:
        """Adds an entry that follows the chain.

        Raises:
            ChainError: for one that this version did not write.
        """
        try:
            if entry.kind == "budget":
                self._open(entry.scope, Budget.from_json(parse_body(entry.body)))
            elif entry.kind == "charge":
                self._add(entry.scope, list(_charged(entry.body)))
            elif entry.kind not in ("ledger", "release"):
                raise ValueError(f"unknown kind {entry.kind!r}")
        except (ValueError, KeyError, TypeError, LookupError) as error:
            raise ChainError(entry.number, errors.UNREADABLE, {"problem": str(error)}) from error
        self.head = Head(entry.number, entry.hash)
        self.last_time = entry.time

    def need(self, name: str) -> Scope:
        """The scope of that name.

        Raises:
            LedgerError: if no budget was opened for it.
        """
        if name not in self.scopes:
            raise LedgerError(errors.NO_BUDGET, scope=name)
        return self.scopes[name]

    def path(self, name: str) -> list[Scope]:
        """The scope and those around it, from the inside to the outside."""
        found = [self.need(name)]
        while found[-1].budget.parent is not None:
            found.append(self.need(found[-1].budget.parent))
        return found

    def _open(self, name: str, budget: Budget) -> None:
        known = self.scopes.get(name)
        if known is None:
            self.scopes[name] = Scope(name, budget)
            return
        if known.fixed is not None and known.budget.delta != budget.delta:
            known.fixed = known.fixed.at(budget.delta)
            known.highest = max(budget.epsilon, known.fixed.epsilon())
        known.highest = max(known.highest, budget.epsilon)
        known.budget = budget

    def _add(self, name: str, added: Added) -> None:
        path = self.path(name)
        steps = [(s.name, s.budget.disjoint) for s in path]
        for i, scope in enumerate(path):
            if scope.tree is not None:
                scope.tree.keep(scope.tree.raised(steps[: i + 1], added))
            elif scope.fixed is not None:
                scope.fixed.add(added)

    def overspent(self) -> str | None:
        """A scope that has spent more than any budget allowed it, which no charge can do."""
        for scope in self.scopes.values():
            if self.epsilon(scope.name) > scope.highest * (1 + 1e-9):
                return scope.name
        return None

    def epsilon(self, name: str, added: Added = [], *, around: str | None = None,  # noqa: B006
                fine: bool = True) -> float:  # fmt: skip
        """ε of the scope ``around`` (default: ``name``) with ``added`` charged to ``name``."""
        path = self.path(name)
        index = next(i for i, s in enumerate(path) if s.name == (around or name))
        scope = path[index]
        if scope.fixed is not None:
            return scope.fixed.epsilon(added, fine=fine)
        assert scope.tree is not None
        steps = [(s.name, s.budget.disjoint) for s in path[: index + 1]]
        base, worst = scope.tree.raised(steps, added)[scope.name]
        return scope.tree.orders.epsilon(base.plus(worst), scope.budget.delta)

    def odometer(self, name: str) -> float:
        """ε that holds whenever one stops, whatever chose the events."""
        scope = self.need(name)
        if scope.fixed is None:
            return self.epsilon(name)
        orders = Orders.for_budget(scope.budget.orders_epsilon, scope.budget.delta)
        return orders.epsilon(scope.fixed.renyi(orders.alphas), scope.budget.delta)

    def check_charge(self, name: str, label: str, added: Added) -> None:
        """Raises unless ``added`` fits the scope, every scope around it, and all their policies.

        Raises:
            BudgetExceededError: for a budget.
            PolicyError: for a policy.
        """
        path = self.path(name)
        for i, scope in enumerate(path):
            budget = scope.budget
            policies = [s.budget.policy for s in path[i:] if s.budget.policy is not None]
            self.check_policies(scope.name, budget, path[i:], epsilon=False)
            fits = functools.partial(self._fits, name, scope, added)
            if not fits(budget.epsilon):
                raise BudgetExceededError(
                    errors.EXCEEDED,
                    scope=scope.name,
                    label=label,
                    total=self.epsilon(name, added, around=scope.name),
                    delta=budget.delta,
                    epsilon=budget.epsilon,
                    left=max(0.0, budget.epsilon - self.epsilon(scope.name)),
                )
            for policy in policies:
                if not fits(min(policy.epsilon, budget.epsilon)):
                    raise PolicyError(
                        errors.POLICY,
                        scope=scope.name,
                        policy=policy.name,
                        rule="epsilon",
                        asked=self.epsilon(name, added, around=scope.name),
                        allowed=policy.epsilon,
                    )

    def _fits(self, name: str, scope: Scope, added: Added, limit: float) -> bool:
        if scope.fixed is not None:
            return scope.fixed.fits(added, limit)
        return self.epsilon(name, added, around=scope.name) <= limit

    @staticmethod
    def check_policies(
        name: str, budget: Budget, path: list[Scope], *, epsilon: bool = True
    ) -> None:
        """Raises PolicyError if ``budget`` breaks a rule of its policy, or of one around it."""
        policies = [s.budget.policy for s in path if s.budget is not budget]
        for policy in (budget.policy, *policies):
            broken = policy and policy.broken_rule(
                epsilon=budget.epsilon if epsilon else None,
                delta=budget.delta,
                adjacency=budget.adjacency,
                unit=budget.unit,
                region=budget.region,
            )
            if policy and broken:
                rule, asked, allowed = broken
                raise PolicyError(
                    errors.POLICY,
                    scope=name,
                    policy=policy.name,
                    rule=rule,
                    asked=Message(errors.NONE) if asked is None else asked,
                    allowed=allowed,
                )

    def check_opening(self, name: str, budget: Budget) -> None:
        """Raises unless a scope may stand where ``budget`` puts it."""
        around = [] if budget.parent is None else self.path(budget.parent)
        if around:
            parent = around[0].budget
            for key in ("adjacency", "unit"):
                if getattr(budget, key) != getattr(parent, key):
                    raise not_allowed(
                        key, repr(getattr(budget, key)), Message(errors.PARENTS, {
                            "parent": repr(budget.parent), "value": repr(getattr(parent, key))})
                    )  # fmt: skip
            if LEVELS.index(budget.level) <= LEVELS.index(parent.level):
                below = LEVELS[LEVELS.index(parent.level) + 1 :]
                levels = ", ".join(map(repr, below)) or Message(errors.NONE)
                raise not_allowed("level", repr(budget.level), Message(
                    errors.BELOW, {"level": repr(parent.level), "levels": levels}))  # fmt: skip
        if budget.disjoint and any(s.budget.composition == "fixed" for s in around):
            raise not_allowed("disjoint", True, Message(errors.AROUND))
        self.check_policies(name, budget, around)


def event_text(event: dp_accounting.DpEvent) -> dict[str, Any]:
    """The event as JSON, checked.

    Raises:
        ValueError: for one that cannot be charged.
    """
    try:
        return event_to_json(event)
    except RecursionError:
        raise ValueError("event: nested too deeply.") from None
