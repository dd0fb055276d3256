"""``dpfa bench attention``: this library's attention beside its peers, on this machine.

All versions of a shape run in one process on the same arrays, in turns. The result is a
table and a JSON file with every sample; a version that fails stands in both with the
text of its error.
"""

import dataclasses
import datetime
import functools
import itertools
import multiprocessing
import queue
import time
from collections.abc import Iterator, Sequence
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
    Runnable,
    Timing,
    compile_all,
    measure,
    ratio_with_interval,
)
from dpfa_jax.versions import package_versions

VERSIONS: tuple[Version, ...] = (*peers.VERSIONS, *ours.VERSIONS)


_SHAPES = {"all": ALL, "standard": STANDARD}


def choose_shapes(shapes: str) -> tuple[Shape, ...]:
    """The shapes of a name: ``'all'``, ``'standard'`` (up to T = 16384) or ``'small'``.

    Raises:
        BenchError: for the full shapes on a machine without an accelerator.
    """
    if shapes == "small":
        return SMALL
    if jax.default_backend() == "cpu":
        raise BenchError("the full shapes need an accelerator; on a CPU use --shapes small.")
    return _SHAPES[shapes]


def _ratios(timings: dict[str, Timing], name: str, others: Sequence[str | None]) -> dict[str, Any]:
    ratios = {}
    for other in others:
        if other is None or other == name or not timings[other].seconds:
            continue
        ratio, low, high = ratio_with_interval(timings[other].seconds, timings[name].seconds)
        ratios[other] = {"ratio": ratio, "interval": [low, high]}
    return ratios


@dataclasses.dataclass(frozen=True)
class Cell:
    """One shape in one direction, compiled and not yet measured."""

    shape: Shape
    direction: Direction
    versions: tuple[Version, ...]
    runnables: dict[str, Runnable]
    errors: dict[str, str]


def prepare_cell(shape: Shape, direction: Direction, versions: Sequence[Version]) -> Cell:
    """Compiles every version of a shape; what does not compile leaves the text of its error."""
    chosen = tuple(v for v in versions if direction in v.directions)
    case = make_case(shape, direction)
    runnables, errors = compile_all({v.name: functools.partial(v.prepare, case) for v in chosen})
    return Cell(shape, direction, chosen, runnables, errors)


def measure_cell(cell: Cell, plan: Plan) -> dict[str, Any]:
    """Times a cell: every version's samples, ratios, memory or error."""
    shape, direction, versions, runnables = (
        cell.shape,
        cell.direction,
        cell.versions,
        cell.runnables,
    )
    timings = measure(runnables, plan)
    errors = dict(cell.errors)
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


def _in_processes(
    tasks: Sequence[tuple[Shape, Direction]],
    only_targets: bool,
    plan: Plan,
    deadline: float,
    jobs: int,
) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Measures cells that several processes compile; yields (number, cell or None if late).

    All compile first, all together; then one after the other measures, alone.
    """
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    start, turn = context.Barrier(jobs), context.Condition()
    following = context.Value("i", 0)
    processes = []
    for i in range(jobs):
        numbered = list(enumerate(tasks))[i::jobs]
        process = context.Process(
            target=_worker,
            args=(numbered, only_targets, plan, deadline, start, turn, following, results),
        )
        process.start()
        processes.append(process)
    came: dict[int, dict[str, Any] | None] = {}
    try:
        for number in range(len(tasks)):
            # Measured in order; what two processes send may arrive in another.
            while number not in came:
                try:
                    later, cell = results.get(timeout=1.0)
                    came[later] = cell
                except queue.Empty:
                    if any(p.exitcode not in (None, 0) for p in processes):
                        raise BenchError(
                            "a process of the bench died; its last lines are above."
                        ) from None
            yield number, came.pop(number)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _worker(
    numbered: Sequence[tuple[int, tuple[Shape, Direction]]], only_targets: bool, plan: Plan,
    deadline: float, start: Any, turn: Any, following: Any, results: Any,
) -> None:  # fmt: skip
    cells = [(n, prepare_cell(*task, _versions(only_targets))) for n, task in numbered]
    start.wait()
    for number, cell in cells:
        with turn:
            turn.wait_for(lambda number=number: following.value == number)
            late = time.time() > deadline
            results.put((number, None if late else measure_cell(cell, plan)))
            following.value += 1
            turn.notify_all()


def _versions(only_targets: bool) -> list[Version]:
    return [v for v in VERSIONS if v.for_targets or not only_targets]


def run(
    *,
    shapes: str = "all",
    only_targets: bool = False,
    budget: float = 420.0,
    jobs: int = 1,
    plan: Plan | None = None,
    json_path: Path | None = None,
    command: str = "dpfa bench attention",
    progress: Any = print,
) -> dict[str, Any]:
    """Measures everything and judges the targets.

    Args:
        shapes: ``'all'``, ``'standard'`` (those that the targets are about, up to T = 16384)
            or ``'small'`` (tiny ones, for a machine without accelerator).
        only_targets: only the versions that the targets name, beside the peers.
        budget: seconds after which no further shape is begun; the rest is recorded as
            left out.
        jobs: processes that compile at the same time; with more than one, all shapes are
            compiled before the first is measured, and one process measures at a time. They
            share the accelerator: keep JAX from taking all of its memory
            (``XLA_PYTHON_CLIENT_PREALLOCATE=false``).
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
    deadline = time.time() + budget
    plan = plan or Plan()
    tasks = [(s, d) for d, s in itertools.product(DIRECTIONS, choose_shapes(shapes))]
    versions = _versions(only_targets)
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
    late = f"not measured: the time budget of {budget:.0f} s was spent"
    cells = [_left_out(*task, versions, late) for task in tasks]

    def measured() -> Iterator[tuple[int, dict[str, Any] | None]]:
        if jobs > 1:
            yield from _in_processes(tasks, only_targets, plan, deadline, min(jobs, len(tasks)))
            return
        for number, task in enumerate(tasks):
            in_time = time.time() <= deadline
            yield number, measure_cell(prepare_cell(*task, versions), plan) if in_time else None

    for number, cell in measured():
        if cell is not None:
            cells[number] = cell
            shape, direction = tasks[number]
            progress(f"[{time.monotonic() - start:4.0f} s] {shape}, {direction}")
        result["cells"] = cells
        result["targets"] = targets.judge(cells)
        result["seconds"] = round(time.monotonic() - start, 1)
        if json_path is not None:
            write_json(json_path, result)
    return result
