"""Every audit of this machine in a row."""

import concurrent.futures
import datetime
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

from dpfa_jax import keys
from dpfa_jax.audit.attention import attention_cases, audit_attention
from dpfa_jax.audit.result import AuditResult
from dpfa_jax.audit.sampled import audit_sampled, sampled_cases
from dpfa_jax.audit.training import audit_training, engines, training_cases
from dpfa_jax.versions import package_versions
from pallas_kernels.attention import api as kernels

KINDS = ("attention", "training", "sampling")
_REPORTED_VERSIONS = ("dpfa_jax", "jax", "dp-accounting")


class Finding(NamedTuple):
    """One audit: its result, or why there is none."""

    name: str
    result: AuditResult | None
    refusal: str | None
    seconds: float


class Audit(NamedTuple):
    """One audit that is to be made, and whether a ValueError is an answer to it."""

    name: str
    run: Callable[[], AuditResult]
    may_refuse: bool = False


def audits(
    *,
    only: str | None = None,
    implementations: Sequence[str] | None = None,
    samples: int = 20_000,
    delta: float = 1e-5,
    confidence: float = 0.99,
) -> list[Audit]:
    """What :func:`run_audits` runs, with the same arguments."""
    if only is not None and only not in KINDS:
        raise ValueError(f"only={only!r}: allowed are None and {', '.join(KINDS)}.")
    known = (*kernels.implementations(), *engines())
    for name in implementations or ():
        if name not in known:
            raise ValueError(f"implementations={name!r}: allowed are {', '.join(known)}.")
    wanted = frozenset(implementations or known)
    options: dict[str, Any] = {"samples": samples, "delta": delta, "confidence": confidence}

    def attack(audit: Callable[..., AuditResult], case: Any, **choice: str) -> Audit:
        def run() -> AuditResult:
            return audit(case, rng=keys.SecureKey.generate(), **choice, **options)

        name = f"{case.name}, {', '.join(choice.values())}"
        return Audit(name, run, getattr(case, "is_tied", False))

    todo: list[Audit] = []
    if only in (None, "attention"):
        todo += [
            attack(audit_attention, case, implementation=name)
            for case in attention_cases()
            for name in case.implementations()
            if name in wanted
        ]
    if only in (None, "training"):
        todo += [
            attack(audit_training, case, engine=engine)
            for case in training_cases()
            for engine in engines()
            if engine in wanted
        ]
    if only in (None, "sampling"):
        # The engines' clipping is attacked above; here it is the sampler's law.
        todo += [attack(audit_sampled, case, engine="auto") for case in sampled_cases()]
    if not todo:
        raise ValueError(f"implementations={implementations!r}: none of them runs here.")
    return todo


def run_audits(*, jobs: int = 1, **options: Any) -> Iterator[Finding]:
    """Attacks each claim with each implementation, or engine, that can do it here.

    Every audit draws a fresh key from the operating system. An engine that refuses a loss
    with a ValueError claims nothing about it; the refusal is the finding.

    Args:
        jobs: how many audits at the same time, in threads. Most of a short audit on a GPU
            is the compilation of its program, which waits for no other.
        **options: ``only``: one of :data:`KINDS`; None means all. ``implementations``: names
            of attention's implementations and of engines; None means all. ``samples``: of each
            neighbour, for each audit. ``delta``: where ε is compared. ``confidence``: of each
            lower bound.

    Raises:
        ValueError: for a number or name that is not allowed.

    Example:
        >>> next(run_audits(only="attention", samples=200)).result.samples
        200
    """
    if not isinstance(jobs, int) or isinstance(jobs, bool) or jobs < 1:
        raise ValueError(f"jobs={jobs!r}: allowed is a whole number >= 1.")
    todo = audits(**options)
    return map(find, todo) if jobs == 1 else _in_threads(todo, jobs)


def _in_threads(todo: list[Audit], jobs: int) -> Iterator[Finding]:
    pool = concurrent.futures.ThreadPoolExecutor(jobs)
    try:
        yield from pool.map(find, todo)
    finally:
        pool.shutdown(cancel_futures=True)


def find(audit: Audit) -> Finding:
    """Runs one audit."""
    started = time.monotonic()
    try:
        result = audit.run()
    except ValueError as error:
        if not audit.may_refuse:
            raise
        return Finding(audit.name, None, str(error), 0.0)
    return Finding(result.name, result, None, time.monotonic() - started)


def to_json(findings: list[Finding], command: str, seconds: float) -> dict[str, Any]:
    """All findings, and where and with what they were made."""
    results = [f.result for f in findings if f.result is not None]
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "passed": all(r.passed for r in results),
        "claims": len(results),
        "failed": [r.name for r in results if not r.passed],
        "seconds": round(seconds, 1),
        "versions": package_versions(_REPORTED_VERSIONS),
        "device": jax.devices()[0].device_kind,
        "noise": keys.SecureKey.source,
        "results": [
            {**f.result.to_json(), "seconds": round(f.seconds, 2)}
            if f.result is not None
            else {"name": f.name, "verdict": "refused", "reason": f.refusal}
            for f in findings
        ],
    }
