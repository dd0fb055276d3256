"""``dpfa budget``: open budgets, see what is left, plan without charging, verify, export."""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import dp_accounting

from dpfa_jax import budget_texts as texts
from dpfa_jax.accounting import Accountant, calibrate_noise_multiplier
from dpfa_jax.ledger import Head, Ledger, LedgerDamagedError, LedgerError, errors, to_csv, to_json
from dpfa_jax.ledger.budget import COMPOSITIONS, LEVELS
from dpfa_jax.mechanisms.gradient import ADJACENCIES
from dpfa_jax.messages import LANGUAGES, Message, language, number


class BudgetArgumentError(LedgerError):
    """A command line that cannot be carried out."""


def _argument(name: str, value: Any, allowed: str, **values: Any) -> BudgetArgumentError:
    flag = "--" + name.replace("_", "-")
    shown = Message(allowed, values)
    return BudgetArgumentError(texts.ARGUMENT, flag=flag, value=str(value), allowed=shown)


def add_parser(commands: Any) -> None:
    """The sub-command's arguments."""
    budget = commands.add_parser(
        "budget", help="open, show, plan, verify and export privacy budgets"
    )
    kinds = budget.add_subparsers(dest="kind", required=True)

    def add(name: str, text: str, *, ledger: bool = True) -> argparse.ArgumentParser:
        parser = kinds.add_parser(name, help=text, description=text)
        if ledger:
            parser.add_argument("ledger", help="a path, or a postgresql:// URL")
        parser.add_argument("--json", action="store_true", help="print JSON")
        parser.add_argument("--language", choices=LANGUAGES, default=None,
                            help="default: what the environment asks for")  # fmt: skip
        return parser

    new = add("new", "Opens a scope's budget, or replaces it: what was charged stays charged.")
    new.add_argument("scope")
    new.add_argument("--epsilon", type=float, default=None)
    new.add_argument("--delta", type=float, default=None)
    new.add_argument("--adjacency", choices=ADJACENCIES, default=None)
    new.add_argument("--unit", default=None, help="what is hidden, such as user")
    new.add_argument("--level", choices=LEVELS, default=None)
    new.add_argument("--parent", default=None, metavar="SCOPE")
    new.add_argument("--composition", choices=COMPOSITIONS, default=None)
    new.add_argument("--disjoint", action="store_true", default=None,
                     help="its data are disjoint from its disjoint siblings'")  # fmt: skip
    new.add_argument("--policy", default=None, help="a preset's name, or a .toml file")
    new.add_argument("--region", default=None)
    new.add_argument("--reason", default=None, help="needed to replace a budget")
    show = add("show", "Prints every scope's budget, what is spent and what is left.")
    show.add_argument("--scope", default=None, help="only this one")
    verify = add("verify", "Reads everything again and finds what was changed.")
    verify.add_argument("--receipt", default=None, metavar="NUMBER:HASH",
                        help="a last entry noted earlier; finds old copies")  # fmt: skip
    export = add("export", "Writes all entries as CSV, or with --json as JSON.")
    export.add_argument("--out", type=Path, default=None, help="default: standard output")
    plan = add("plan", "Prints epsilon against steps, batch size and noise. Charges nothing.",
               ledger=False)  # fmt: skip
    plan.add_argument("--population", type=int, required=True, help="units in the data")
    plan.add_argument("--batch-size", type=int, required=True, help="expected units a step")
    plan.add_argument("--padded-batch-size", type=int, default=None, help="truncates there")
    plan.add_argument("--steps", type=int, required=True)
    noise = plan.add_mutually_exclusive_group(required=True)
    noise.add_argument("--noise-multiplier", type=float, default=None)
    noise.add_argument("--epsilon", type=float, default=None, help="finds the least noise")
    plan.add_argument("--delta", type=float, required=True)
    plan.add_argument("--adjacency", choices=ADJACENCIES, required=True)
    plan.add_argument("--plot", type=Path, default=None, metavar="PATH", help="PNG, SVG or PDF")
    plan.add_argument("--ledger", default=None, help="also: what it would do to --scope there")
    plan.add_argument("--scope", default=None)


def run(args: argparse.Namespace) -> int:
    """Carries out the command; returns the exit status."""
    args.language = args.language or language()
    return {"new": _new, "show": _show, "verify": _verify, "export": _export, "plan": _plan}[
        args.kind
    ](args)


def _say(args: argparse.Namespace, text: str, **values: Any) -> None:
    print(Message(text, values).show(args.language))


def _new(args: argparse.Namespace) -> int:
    ledger = Ledger(args.ledger)
    given = {
        name: getattr(args, name)
        for name in ("adjacency", "unit", "level", "parent", "composition", "disjoint", "region")
        if getattr(args, name) is not None
    }
    if args.scope in ledger.scopes():
        if given:
            flags = ", ".join(f"--{name}" for name in given)
            raise BudgetArgumentError(texts.ONLY_NEW, flags=flags, scope=args.scope)
        ledger.new_budget(
            args.scope,
            epsilon=args.epsilon,
            delta=args.delta,
            policy=args.policy,
            reason=args.reason or "",
        )
    else:
        needed = ("epsilon", "delta", "adjacency", "unit")
        missing = [f"--{name}" for name in needed if getattr(args, name) is None]
        if missing:
            raise BudgetArgumentError(texts.NEEDED, flags=", ".join(missing))
        ledger.open_budget(
            args.scope,
            epsilon=args.epsilon,
            delta=args.delta,
            policy=args.policy,
            reason=args.reason or "opened",
            **given,
        )
    budget = ledger.budget(args.scope)
    if args.json:
        print(json.dumps({"scope": args.scope, **budget.to_json()}, indent=1))
        return 0
    _say(args, texts.OPENED, scope=args.scope, epsilon=budget.epsilon, delta=budget.delta,
         reason=budget.reason)  # fmt: skip
    if budget.policy is not None:
        _say(args, texts.NO_LAW)
    return 0


def _show(args: argparse.Namespace) -> int:
    ledger = Ledger(args.ledger, create=False)
    scopes = ledger.scopes()
    if args.scope is not None:
        scopes = {args.scope: ledger.budget(args.scope)}
    found = []
    for name, budget in scopes.items():
        spent = ledger.spent(name)
        left = max(0.0, budget.epsilon - spent)
        found.append({"scope": name, **budget.to_json(), "spent": spent, "left": left,
                      "odometer": ledger.odometer(name)})  # fmt: skip
    if args.json:
        print(json.dumps(_finite({"ledger": ledger.name, "scopes": found}), indent=1))
        return 0
    if not found:
        _say(args, texts.EMPTY)
        return 0
    columns = (texts.SCOPE, texts.BUDGET, texts.SPENT, texts.LEFT, "δ", texts.POLICY, texts.REGION)
    rows = [
        [
            _indented(name, scopes),
            *(number(float(row[k]), args.language) for k in ("epsilon", "spent", "left", "delta")),
            (row["policy"] or {}).get("name", "-"),
            row["region"] or "-",
        ]
        for row in found
        for name in [row["scope"]]
    ]
    _table([Message(c).show(args.language) for c in columns], rows)
    if any(row["policy"] for row in found):
        _say(args, texts.NO_LAW)
    return 0


def _finite(value: Any) -> Any:
    """``value`` with None for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _indented(name: str, scopes: dict[str, Any]) -> str:
    depth, parent = 0, scopes[name].parent
    while parent is not None and parent in scopes:
        depth, parent = depth + 1, scopes[parent].parent
    return "  " * depth + name


def _table(head: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for i, title in enumerate(head):
        table.add_column(title, justify="left" if i in (0, 5, 6) else "right")
    for row in rows:
        table.add_row(*row)
    # Whole lines in a pipe; a terminal's width else.
    Console(width=None if sys.stdout.isatty() else 200, markup=False).print(table)


def _verify(args: argparse.Namespace) -> int:
    ledger = Ledger(args.ledger, create=False)
    receipt = None
    if args.receipt is not None:
        count, _, digest = args.receipt.partition(":")
        if not count.isdigit() or len(digest) != 64:
            raise _argument("receipt", args.receipt, texts.RECEIPT)
        receipt = Head(int(count), digest)
    try:
        head = ledger.verify(receipt)
    except LedgerDamagedError:
        for name, budget in ledger.scopes().items():
            if budget.policy is not None:
                message = Message(texts.BREACH, {
                    "policy": f"{budget.policy.name} ({name})",
                    "hours": budget.policy.breach_notice_hours,
                })  # fmt: skip
                print(message.show(args.language), file=sys.stderr)
        raise
    if args.json:
        print(json.dumps({"ledger": ledger.name, "entries": head.number + 1, "number": head.number,
                          "hash": head.hash}, indent=1))  # fmt: skip
    else:
        _say(args, texts.VERIFIED, count=head.number + 1, number=str(head.number), hash=head.hash)
    return 0


def _export(args: argparse.Namespace) -> int:
    ledger = Ledger(args.ledger, create=False)
    text = to_json(ledger) if args.json else to_csv(ledger)
    if args.out is None:
        sys.stdout.write(text)
    else:
        args.out.write_text(text, encoding="utf-8", newline="")
    return 0


def _event(args: argparse.Namespace, noise: float, batch: int) -> dp_accounting.DpEvent:
    q = batch / args.population
    padded = args.padded_batch_size
    if padded is not None:
        padded = max(1, round(padded * batch / args.batch_size))
    if padded is None or padded >= args.population:
        return dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(noise))
    return dp_accounting.TruncatedSubsampledGaussianDpEvent(args.population + 1, q, padded, noise)


def _check_plan(args: argparse.Namespace) -> None:
    for name in ("population", "batch_size", "steps", "padded_batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise _argument(name, value, texts.WHOLE)
    if args.batch_size > args.population:
        limit = f"--population {args.population}"
        raise _argument("batch_size", args.batch_size, texts.AT_MOST, limit=limit)
    for name in ("noise_multiplier", "epsilon"):
        value = getattr(args, name)
        if value is not None and not 0 < value < 1e6:
            raise _argument(name, value, texts.UP_TO_A_MILLION)
    if not 0 < args.delta < 1:
        raise _argument("delta", args.delta, errors.BETWEEN)
    if (args.ledger is None) != (args.scope is None):
        raise BudgetArgumentError(texts.TOGETHER, flags="--ledger, --scope")


def _plan(args: argparse.Namespace) -> int:
    _check_plan(args)
    noise = args.noise_multiplier
    if noise is None:
        noise = calibrate_noise_multiplier(
            lambda z: dp_accounting.SelfComposedDpEvent(
                _event(args, z, args.batch_size), args.steps
            ),
            epsilon=args.epsilon,
            delta=args.delta,
            adjacency=args.adjacency,
        )

    def epsilon(noise: float, batch: int, steps: int, interval: float = 2.5e-4) -> float:
        accountant = Accountant(args.adjacency, interval=interval)
        return accountant.compose(_event(args, noise, batch), steps).epsilon(args.delta)

    factors = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
    steps = sorted({max(1, round(args.steps * f)) for f in factors})
    batches = sorted({min(args.population, max(1, round(args.batch_size * f))) for f in factors})
    noises = [noise * f for f in factors]
    curves: dict[str, list[tuple[float, float]]] = {
        texts.STEPS: [(n, epsilon(noise, args.batch_size, n)) for n in steps],
        texts.BATCH: [(b, epsilon(noise, b, args.steps)) for b in batches],
        texts.NOISE: [(z, epsilon(z, args.batch_size, args.steps)) for z in noises],
    }
    answer = {
        "noise_multiplier": noise,
        "epsilon": epsilon(noise, args.batch_size, args.steps, 1e-4),
        "delta": args.delta,
        "steps": args.steps,
        "curves": {name: [list(p) for p in points] for name, points in curves.items()},
        "what_if": None,
    }
    if args.ledger is not None:
        event = dp_accounting.SelfComposedDpEvent(_event(args, noise, args.batch_size), args.steps)
        answer["what_if"] = Ledger(args.ledger, create=False).what_if(args.scope, event)
    if args.plot is not None:
        _plot(args, curves)
    if args.json:
        print(json.dumps(_finite(answer), indent=1))
        return 0
    _say(args, texts.LEAST, noise=noise, epsilon=answer["epsilon"], delta=args.delta,
         steps=args.steps)  # fmt: skip
    for name, points in curves.items():
        print()
        shown = [[number(x, args.language), number(y, args.language)] for x, y in points]
        _table([Message(name).show(args.language), "ε"], shown)
    for scope, total in (answer["what_if"] or {}).items():
        print(f"\n{scope}: ε = {number(total, args.language)}")
    return 0


def _plot(args: argparse.Namespace, curves: dict[str, list[tuple[float, float]]]) -> None:
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(10, 3.2), layout="constrained")
    for axes, (name, points) in zip(figure.subplots(1, len(curves)), curves.items(), strict=True):
        axes.plot(*zip(*points, strict=True), marker="o", color="#0b6e4f")
        # English: the usual fonts of plots lack most scripts.
        axes.set_xlabel(name)
        axes.set_ylabel(f"ε (δ = {args.delta:g})")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
    args.plot.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.plot, dpi=150)
