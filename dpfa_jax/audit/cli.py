"""``dpfa audit``: attack the claims on this machine, and say which stand."""

import argparse
import math
import shlex
import sys
import time
from pathlib import Path
from typing import Any

_DELTA = 1e-5
# Options about many audits, or that a configuration states itself.
_NOT_WITH_CONFIG = ("only", "implementation", "jobs", "delta")


def _between(kind: type, low: float, high: float) -> Any:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low < value < high:
            word = "whole number" if kind is int else "number"
            limit = f"above {low:g}" + (f" and below {high:g}" if high < math.inf else "")
            raise argparse.ArgumentTypeError(f"{text!r}: allowed is a {word} {limit}.")
        return value

    return parse


def add_parser(commands: Any) -> None:
    """Adds ``audit`` to the subparsers of ``dpfa``."""
    parser = commands.add_parser(
        "audit",
        help="attack the library's own privacy claims",
        description="Draws real releases under neighbouring inputs, bounds epsilon from below, and "
        "compares with the claim, for attention and for training, with every implementation and "
        "engine that runs here. Exits with 1 if a claim fails.",
    )
    parser.add_argument(
        "config",
        nargs="?",
        type=Path,
        help="attack the claim of this configuration instead: its sampling, noise and steps, and "
        "where it releases a comparison without privacy, the model trained on its data",
    )
    parser.add_argument(
        "--only",
        choices=("attention", "training", "sampling"),
        default=None,
        help="sampling is training on Poisson batches (default: all)",
    )
    parser.add_argument(
        "--implementation",
        action="append",
        metavar="NAME",
        help="only this implementation of attention or engine of training; may be given again "
        "(default: all that run here)",
    )
    parser.add_argument(
        "--jobs",
        type=_between(int, 0, math.inf),
        default=None,
        metavar="N",
        help="audits at the same time; 8 on a GPU, where compiling takes longest (default: 1)",
    )
    parser.add_argument(
        "--samples",
        type=_between(int, 19, math.inf),
        default=20_000,
        metavar="N",
        help="releases under each neighbour; 1000000 on a GPU (default: %(default)s)",
    )
    parser.add_argument(
        "--delta",
        type=_between(float, 0, 1),
        default=None,
        help=f"(default: {_DELTA:g}; of a configuration its own)",
    )
    parser.add_argument(
        "--confidence",
        type=_between(float, 0, 1),
        default=0.99,
        help="of each lower bound (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write every figure here")
    parser.add_argument("--html", type=Path, metavar="PATH", help="write a page with plots here")


def run(args: argparse.Namespace, argv: list[str]) -> int:
    """Runs the audits and prints a line for each.

    Returns:
        0 if every claim stands, 1 if one fails.
    """
    config = None
    if args.config is not None:
        given = [name for name in _NOT_WITH_CONFIG if getattr(args, name) is not None]
        if given:
            options = ", ".join(f"--{name}" for name in given)
            print(f"dpfa: {options}: not with a configuration.", file=sys.stderr)
            return 2
        # Checked before JAX, the data and the files that are written are touched.
        from dpfa_jax.train.config import load_config

        config = load_config(args.config)
    from dpfa_jax.audit import report, suite
    from dpfa_jax.bench.files import write_json

    for path in (args.json, args.html):  # found out before the work, not after it
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.open("a").close()
            except OSError as error:
                print(f"dpfa: {path}: cannot be written ({error.strerror}).", file=sys.stderr)
                return 2
    if config is not None:
        return _config(config, args, argv)
    started = time.monotonic()
    command, findings = shlex.join(["dpfa", *argv]), []
    facts = suite.to_json([], command, 0.0)
    try:
        audits = suite.run_audits(
            jobs=1 if args.jobs is None else args.jobs,
            only=args.only,
            implementations=args.implementation,
            samples=args.samples,
            delta=_DELTA if args.delta is None else args.delta,
            confidence=args.confidence,
        )
    except ValueError as error:
        print(f"dpfa: {error}", file=sys.stderr)
        return 2
    for finding in audits:
        findings.append(finding)
        _show(finding)
        facts = suite.to_json(findings, command, time.monotonic() - started)
        if args.json is not None:  # a run that is cut short leaves what it found
            write_json(args.json, facts)
    if args.html is not None:
        args.html.write_text(report.page(findings, facts), encoding="utf-8")
    failed = len(facts["failed"])
    print(f"{facts['claims']} claims attacked, {failed} failed.")
    return 1 if failed else 0


def _show(finding: Any) -> None:
    r = finding.result
    if r is None:
        print(f"refused   {finding.name}: {finding.refusal}", flush=True)
        return
    tight = "" if r.is_tight else " (not tight)"
    print(
        f"{r.verdict:9s} {r.name}: epsilon at least {r.epsilon:.3f}, claimed {r.claim:.3f}, "
        f"ratio {r.ratio:.3f}{tight}",
        flush=True,
    )


def _config(config: Any, args: argparse.Namespace, argv: list[str]) -> int:
    """The audit of one configuration."""
    from dpfa_jax.audit import configured, report, suite
    from dpfa_jax.bench.files import write_json

    started = time.monotonic()
    found = configured.audit_config(
        config,
        samples=args.samples,
        confidence=args.confidence,
        announce=lambda line: print(line, flush=True),
    )
    _show(found.finding)
    chat = found.chat
    if chat is None:
        print(
            "The trained model was not attacked: report.release_nonprivate_comparison = false, and "
            "the attack trains on the data outside of the budget."
        )
    else:
        print(
            f"{'holds' if chat.passed else 'broken':9s} one run, {chat.guesses.canaries} canaries: "
            f"{chat.guesses.right} of {chat.guesses.made} guesses right, epsilon at least "
            f"{chat.epsilon:.3f} ({chat.epsilon_steinke:.3f} by Steinke et al.), "
            f"claimed {chat.claim:.3f}"
        )
        for writers, private, plain in chat.exposures():
            print(
                f"secrets of {writers} units: exposure {private:.1f} bits with privacy, "
                f"{plain:.1f} without"
            )
    facts = suite.to_json(
        [found.finding], shlex.join(["dpfa", *argv]), time.monotonic() - started
    ) | {"config": config.name, "config_fingerprint": config.fingerprint, **found.to_json()}
    if chat is not None and not chat.passed:
        facts = facts | {"passed": False, "failed": [*facts["failed"], "one run"]}
    if args.json is not None:
        write_json(args.json, facts)
    if args.html is not None:
        args.html.write_text(report.page([found.finding], facts, chat), encoding="utf-8")
    return 0 if facts["passed"] else 1
