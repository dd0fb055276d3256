"""``dpfa bench attention``: this library's attention beside its peers, on this machine.

All versions of a shape run in one process on the same arrays, in turns. The result is a
table and a JSON file with every sample; a version that fails stands in both with the
text of its error.
"""

import dataclasses
import datetime
import functools
import importlib.metadata
import itertools
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from dpfa_jax.bench import ours, peers, targets
from dpfa_jax.bench.cases import (
    ALL,
    DIRECTIONS,
    SMALL,
    STANDARD,
    Direction,
    Shape,
    Version,
    make_case,
)
from dpfa_jax.bench.files import write_json
from dpfa_jax.bench.timing import (
    BenchError,
    Plan,
    Timing,
    compile_all,
    measure,
    ratio_with_interval,
)

VERSIONS: tuple[Version, ...] = (*peers.VERSIONS, *ours.VERSIONS)
_PACKAGES = ("dpfa_jax", "jax", "jaxlib", "numpy", "tokamax", "torch", "nvidia-cudnn-cu13")


def package_versions(packages: Sequence[str] = _PACKAGES) -> dict[str, str | None]:
    """Versions of what is measured; None for a package that is not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def choose_shapes(shapes: str, quick: bool) -> tuple[Shape, ...]:
    """The shapes that the options name.

    Raises:
        BenchError: for the full shapes on a machine without an accelerator.
    """
    if shapes == "small":
        return SMALL
    if jax.default_backend() == "cpu":
        raise BenchError("the full shapes need an accelerator; on a CPU use --shapes small.")
    return STANDARD if quick else ALL


def _ratios(timings: dict[str, Timing], name: str, others: Sequence[str | None]) -> dict[str, Any]:
    ratios = {}
    for other in others:
        if other is None or other == name or not timings[other].seconds:
            continue
        ratio, low, high = ratio_with_interval(timings[other].seconds, timings[name].seconds)
        ratios[other] = {"ratio": ratio, "interval": [low, high]}
    return ratios


def measure_cell(
    shape: Shape, direction: Direction, versions: Sequence[Version], plan: Plan
) -> dict[str, Any]:
    """One shape in one direction: every version's samples, ratios, memory or error."""
    versions = [v for v in versions if direction in v.directions]
    case = make_case(shape, direction)
    runnables, errors = compile_all({v.name: functools.partial(v.prepare, case) for v in versions})
    timings = measure(runnables, plan)
    errors |= {name: t.error for name, t in timings.items() if t.error is not None}
    timed = {name: t for name, t in timings.items() if t.seconds}
    jax_peers = [v.name for v in versions if v.family == "jax" and v.name in timed]
    baseline = min(jax_peers, key=lambda name: timed[name].median, default=None)
    others = [baseline, *(v.name for v in versions if v.family != "ours" and v.name in timed)]
    entries = []
    for version in versions:
        entry: dict[str, Any] = {"name": version.name, "family": version.family}
        if version.name in timed:
            timing = timed[version.name]
            if version.implementation is not None:
                entry["implementation"] = version.implementation(shape)
            entry["extra_bytes"] = runnables[version.name].extra_bytes
            entry |= {
                "median_ms": 1e3 * timing.median,
                "quartile_distance_ms": 1e3 * timing.spread,
                "tflops": shape.flops(direction) / timing.median / 1e12,
                "calls_per_sample": timing.calls_per_sample,
                "samples_ms": [round(1e3 * s, 7) for s in timing.seconds],
                "ratios": _ratios(timed, version.name, others),
            }
        else:
            entry["error"] = errors[version.name]
        entries.append(entry)
    return {
        "shape": dataclasses.asdict(shape),
        "direction": direction,
        "baseline": baseline,
        "versions": entries,
    }


def _left_out(shape: Shape, direction: Direction, versions: Sequence[Version], why: str) -> Any:
    return {
        "shape": dataclasses.asdict(shape),
        "direction": direction,
        "baseline": None,
        "versions": [
            {"name": v.name, "family": v.family, "error": why}
            for v in versions
            if direction in v.directions
        ],
    }


def run(
    *,
    shapes: str = "all",
    quick: bool = False,
    budget: float = 420.0,
    plan: Plan | None = None,
    json_path: Path | None = None,
    command: str = "dpfa bench attention",
    progress: Any = print,
) -> dict[str, Any]:
    """Measures everything and judges the targets.

    Args:
        shapes: ``'all'`` or ``'small'`` (tiny ones, for a machine without accelerator).
        quick: only the shapes that the targets are about, up to T = 16384, and only the
            versions that they name, beside the peers.
        budget: seconds after which no further shape is begun; the rest is recorded as
            left out.
        plan: how many samples; None is the usual.
        json_path: written after every shape, so that a run cut short leaves a result.
        command: as typed, for the record.
        progress: called with one line for each shape.

    Returns:
        The contents of the JSON file.

    Raises:
        BenchError: if the shapes cannot be measured here.
    """
    start = time.monotonic()
    plan = plan or Plan()
    chosen = choose_shapes(shapes, quick)
    versions = [v for v in VERSIONS if v.for_targets or not quick]
    device = jax.devices()[0]
    result: dict[str, Any] = {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "card": device.device_kind,
        "platform": str(getattr(device.client, "platform_version", device.platform)),
        "versions": package_versions(),
        "dtype": "bfloat16",
        "plan": dataclasses.asdict(plan),
        "cells": [],
        "targets": [],
    }
    for shape, direction in itertools.product(chosen, DIRECTIONS):
        spent = time.monotonic() - start
        if spent > budget:
            why = f"not measured: the time budget of {budget:.0f} s was spent"
            result["cells"].append(_left_out(shape, direction, versions, why))
        else:
            progress(f"[{spent:4.0f} s] {shape}, {direction}")
            result["cells"].append(measure_cell(shape, direction, versions, plan))
        result["targets"] = targets.judge(result["cells"])
        result["seconds"] = round(time.monotonic() - start, 1)
        if json_path is not None:
            write_json(json_path, result)
    return result
