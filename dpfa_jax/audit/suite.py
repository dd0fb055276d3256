"""Every audit of this machine in a row."""

import datetime
import importlib.metadata
import platform
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax

from dpfa_jax import keys
from dpfa_jax.audit.attention import attention_cases, audit_attention
from dpfa_jax.audit.result import AuditResult
from dpfa_jax.audit.training import audit_training, engines, training_cases

_REPORTED_VERSIONS = ("dpfa_jax", "jax", "dp-accounting")


class Finding(NamedTuple):
    """One audit: its result, or why there is none."""

    name: str
    result: AuditResult | None
    refusal: str | None
    seconds: float


def run_audits(
    *,
    only: Literal["attention", "training"] | None = None,
    samples: int = 20_000,
    delta: float = 1e-5,
    confidence: float = 0.99,
) -> Iterator[Finding]:
    """Attacks each claim with each implementation, or engine, that can do it here.

    Every audit draws a fresh key from the operating system. An engine that refuses a loss
    with a ValueError claims nothing about it; the refusal is the finding.

    Args:
        only: ``'attention'`` or ``'training'``; None means both.
        samples: of each neighbour, for each audit.
        delta: where ε is compared.
        confidence: of each lower bound.

    Raises:
        ValueError: for a number that is not allowed.

    Example:
        >>> next(run_audits(only="attention", samples=200)).result.samples
        200
    """
    if only not in (None, "attention", "training"):
        raise ValueError(f"only={only!r}: allowed are None, 'attention' and 'training'.")
    options: dict[str, Any] = {"samples": samples, "delta": delta, "confidence": confidence}
    if only != "training":
        for case in attention_cases():
            for name in case.implementations():
                key = keys.SecureKey.generate()
                result, seconds = _timed(
                    lambda c=case, n=name, k=key: audit_attention(  # type: ignore[misc]
                        c, rng=k, implementation=n, **options
                    )
                )
                yield Finding(result.name, result, None, seconds)
    if only != "attention":
        for training in training_cases():
            for engine in engines():
                key = keys.SecureKey.generate()
                name = f"{training.name}, {engine}"
                try:
                    result, seconds = _timed(
                        lambda c=training, e=engine, k=key: audit_training(  # type: ignore[misc]
                            c, rng=k, engine=e, **options
                        )
                    )
                except ValueError as error:
                    if not training.is_tied:
                        raise
                    yield Finding(name, None, str(error), 0.0)
                else:
                    yield Finding(name, result, None, seconds)


def _timed(audit: Callable[[], AuditResult]) -> tuple[AuditResult, float]:
    started = time.monotonic()
    return audit(), time.monotonic() - started


def to_json(findings: list[Finding], command: str) -> dict[str, Any]:
    """All findings, and where and with what they were made."""
    results = [f.result for f in findings if f.result is not None]
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "passed": all(r.passed for r in results),
        "claims": len(results),
        "failed": [r.name for r in results if not r.passed],
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _REPORTED_VERSIONS},
        },
        "device": jax.devices()[0].device_kind,
        "noise": keys.SecureKey.source,
        "results": [
            {**f.result.to_json(), "seconds": round(f.seconds, 2)}
            if f.result is not None
            else {"name": f.name, "verdict": "refused", "reason": f.refusal}
            for f in findings
        ],
    }
