"""``dpfa bench clipping``: private training steps beside the same step without privacy.

A figure is the share of the non-private step's throughput at the same physical batch,
noise and optimiser included, measured in turns in one process.
"""

import dataclasses
import datetime
import functools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from rich import box
from rich.console import Console
from rich.table import Table

from dpfa_jax.bench import decoder, opacus_steps, steps
from dpfa_jax.bench.decoder import DecoderShape
from dpfa_jax.bench.files import write_json
from dpfa_jax.bench.steps import NON_PRIVATE, OURS, OURS_NO_NOISE, Version
from dpfa_jax.bench.timing import (
    BenchError,
    Build,
    Plan,
    Runnable,
    compile_all,
    measure,
    peak_bytes,
    ratio_with_interval,
)
from dpfa_jax.versions import package_versions

_PACKAGES = ("jax-privacy", "optax", "flax", "torch", "opacus")


@dataclasses.dataclass(frozen=True)
class Target:
    """A share of non-private throughput to reach; memory likewise."""

    shape: DecoderShape
    must: float
    aim: float
    version: str = OURS


TARGETS = (
    Target(decoder.GPT2_256, 0.92, 0.95),
    Target(decoder.GPT2_1024, 0.85, 0.90),
    Target(decoder.LARGE, 0.88, 0.93),
    Target(decoder.LORA, 0.97, 0.99),
    # On CPUs ChaCha's arithmetic is what costs: there the target is about the gradient.
    Target(decoder.CPU, 1 / 1.15, 1.0, steps.OURS_NO_NOISE),
)
# Peak memory over that of the non-private step.
MEMORY_MUST, MEMORY_AIM = 1.25, 1.05


class _Shared:
    """The state that all versions of a shape update in place."""

    def __init__(self, shape: DecoderShape):
        self.state = steps.make_state(shape)
        self.tokens = steps.make_tokens(shape)


def _prepare(version: Version, shape: DecoderShape, shared: _Shared) -> Build:
    """Traces the step; what is returned compiles it, its state given back in place."""
    step = jax.jit(steps.make_step(version, shape), donate_argnums=0)
    lowered = step.lower(shared.state, shared.tokens)

    def build() -> Runnable:
        compiled = lowered.compile()

        def run(times: int) -> None:
            for _ in range(times):
                shared.state = compiled(shared.state, shared.tokens)
            jax.block_until_ready(shared.state)

        return Runnable(run, peak_bytes(compiled))

    return build


def _device_peaks(runnables: dict[str, Runnable]) -> dict[str, int]:
    """What the device says was in use at most, for each step that raised that figure.

    It cannot be set back, so the steps run once in the order of their predicted peaks. Only
    what the device remembers from compiling, where it tries products out, can hide a step.
    """
    peaks: dict[str, int] = {}

    def read() -> int:
        stats = jax.devices()[0].memory_stats()
        return 0 if not stats else int(stats.get("peak_bytes_in_use", 0))

    before = read()
    for name in sorted(runnables, key=lambda n: runnables[n].extra_bytes or 0):
        try:
            runnables[name].run(1)
        except Exception:  # measure() meets it again, and keeps its text
            continue
        after = read()
        if after > before:
            peaks[name], before = after, after
    return peaks


def measure_shape(
    shape: DecoderShape, versions: Sequence[Version], plan: Plan, peers: Sequence[str] = ()
) -> dict[str, Any]:
    """Every version's samples, its share of the non-private throughput, memory or error.

    Args:
        shape: the decoder and its batch.
        versions: JAX's steps.
        plan: how many samples.
        peers: names of :data:`dpfa_jax.bench.opacus_steps.VERSIONS`.
    """
    shared = _Shared(shape)
    start = time.monotonic()
    builds = {v.name: functools.partial(_prepare, v, shape, shared) for v in versions}
    for name in peers:
        private = opacus_steps.VERSIONS[name]
        builds[name] = functools.partial(opacus_steps.prepare, shape, private)
    runnables, errors = compile_all(builds)
    compiled = round(time.monotonic() - start, 1)
    device_peaks = _device_peaks(runnables)
    timings = measure(runnables, plan)
    base = timings.get(NON_PRIVATE)

    def peak(name: str) -> int | None:
        return runnables[name].extra_bytes if name in runnables else None

    entries: list[dict[str, Any]] = []
    for name in builds:
        timing = timings.get(name)
        if timing is None or not timing.seconds:
            why = errors.get(name) or (timing.error if timing else None)
            entries.append({"name": name, "error": why or "no samples"})
            continue
        entry: dict[str, Any] = {
            "name": name,
            "median_ms": 1e3 * timing.median,
            "quartile_distance_ms": 1e3 * timing.spread,
            "samples_ms": [round(1e3 * s, 4) for s in timing.seconds],
            "peak_bytes": peak(name),
            "device_peak_bytes": device_peaks.get(name),
        }
        if base is not None and base.seconds:
            # Turns in which both ran: a slower step has fewer, and later ones may be quieter.
            common = min(len(base.seconds), len(timing.seconds))
            share, low, high = ratio_with_interval(base.seconds[:common], timing.seconds[:common])
            entry |= {"share": share, "interval": [low, high]}
            own, other = peak(name), peak(NON_PRIVATE)
            entry["memory"] = own / other if own and other else None
        entries.append(entry)
    noise = [
        timings[n].median for n in (OURS, OURS_NO_NOISE) if n in timings and timings[n].seconds
    ]
    return {
        "shape": dataclasses.asdict(shape),
        "attention": decoder.attention_of(shape),
        "compile_seconds": compiled,
        "noise_ms": 1e3 * (noise[0] - noise[1]) if len(noise) == 2 else None,
        "versions": entries,
        "explanation": _explain(shape),
    }


def _explain(shape: DecoderShape) -> str:
    from dpfa_jax.clipping import clipped_grad

    state = jax.eval_shape(lambda: decoder.init(shape, jax.random.key(0)))
    base, lora = state["base"], state["lora"]
    trainable, frozen = (base, None) if lora is None else (lora, base)
    grad = clipped_grad(
        lambda p, x: steps.example_loss(shape)(
            p, jax.tree.map(lambda s: jax.numpy.zeros(s.shape, s.dtype), frozen), x
        ),
        l2_clip_norm=steps.CLIP_NORM,
        microbatch_size=shape.batch,
    )
    tokens = jax.ShapeDtypeStruct((shape.batch, shape.length + 1), jax.numpy.int32)
    with jax.numpy_dtype_promotion("standard"):
        return str(grad.explain(trainable, tokens))


def judge(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each target with its figure: throughput, and memory under the same name."""
    verdicts = []
    for target in TARGETS:
        wanted = dataclasses.asdict(target.shape)
        # Every attention counts: all versions of a step have the same.
        cell = next((c for c in cells if c["shape"] | {"attention": None} == wanted), None)
        entries = cell["versions"] if cell else []
        entry: dict[str, Any] = next((e for e in entries if e["name"] == target.version), {})
        share, memory = entry.get("share"), entry.get("memory")
        verdicts.append(
            {
                "name": str(target.shape),
                "version": target.version,
                "share": share,
                "must": target.must,
                "aim": target.aim,
                "must_reached": None if share is None else share >= target.must,
                "aim_reached": None if share is None else share >= target.aim,
                "memory": memory,
                "memory_must_reached": None if memory is None else memory <= MEMORY_MUST,
                "memory_aim_reached": None if memory is None else memory <= MEMORY_AIM,
            }
        )
    return verdicts


def choose_shapes(
    shapes: str, batch: int | None, attention: str | None = None
) -> tuple[DecoderShape, ...]:
    """The shapes that the options name, with another batch or attention if one is given.

    Raises:
        BenchError: for the full shapes on a machine without an accelerator, or a bad batch.
    """
    if shapes == "all" and jax.default_backend() == "cpu":
        raise BenchError("the full shapes need an accelerator; on a CPU use --shapes cpu.")
    if batch is not None and batch < 1:
        raise BenchError(f"--batch {batch}: allowed is a whole number >= 1.")
    chosen = (dataclasses.replace(s, attention=attention) for s in decoder.SHAPES[shapes])
    return tuple(s if batch is None else dataclasses.replace(s, batch=batch) for s in chosen)


def run(
    *,
    shapes: str = "all",
    batch: int | None = None,
    only: str | None = None,
    attention: str | None = None,
    versions_with: str | None = None,
    quick: bool = False,
    budget: float = 420.0,
    plan: Plan | None = None,
    json_path: Path | None = None,
    command: str = "dpfa bench clipping",
    progress: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measures the steps and judges the targets.

    Args:
        shapes: ``'all'`` (an accelerator's), ``'cpu'`` or ``'small'`` (to see that it works).
        batch: another physical batch for every shape; its targets then do not apply.
        only: measure only shapes whose name holds this text.
        attention: of all steps, a name from ``decoder.ATTENTION``; None is the fastest known.
        versions_with: measure only versions whose name holds this text, and the non-private one.
        quick: of JAX's steps only those that the targets are about, and jax_privacy's. PyTorch's,
            with and without Opacus, are measured all the same where both are installed.
        budget: seconds after which no further shape is begun.
        plan: how many samples; None is the usual.
        json_path: written after every shape.
        command: as typed, for the record.
        progress: called with one line for each shape.

    Returns:
        The contents of the JSON file.

    Raises:
        BenchError: if the shapes cannot be measured here.
    """
    start = time.monotonic()
    plan = plan or Plan(samples=21, sample_seconds=0.005, version_seconds=30.0, least=5)
    chosen = [s for s in choose_shapes(shapes, batch, attention) if only is None or only in str(s)]
    if not chosen:
        names = ", ".join(str(s) for s in decoder.SHAPES[shapes])
        raise BenchError(f"--only {only!r}: none of the shapes holds this text: {names}.")
    measured = [
        v
        for v in steps.VERSIONS
        if (v.for_targets or not quick)
        and (versions_with is None or v.name == NON_PRIVATE or versions_with in v.name)
    ]
    others = [n for n in opacus_steps.VERSIONS if versions_with is None or versions_with in n]
    versions = package_versions() | package_versions(_PACKAGES)
    result: dict[str, Any] = {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "card": jax.devices()[0].device_kind,
        "versions": versions,
        "plan": dataclasses.asdict(plan),
        "cells": [],
        "targets": [],
    }
    for shape in chosen:
        spent = time.monotonic() - start
        if spent > budget:
            why = f"not measured: the time budget of {budget:.0f} s was spent"
            entries = [{"name": n, "error": why} for n in (*(v.name for v in measured), *others)]
            cell = {"shape": dataclasses.asdict(shape), "versions": entries, "explanation": ""}
        else:
            progress(f"[{spent:4.0f} s] {shape}")
            cell = measure_shape(shape, measured, plan, others)
        result["cells"].append(cell)
        result["targets"] = judge(result["cells"])
        result["seconds"] = round(time.monotonic() - start, 1)
        if json_path is not None:
            write_json(json_path, result)
    return result


def print_result(result: dict[str, Any], console: Console | None = None) -> None:
    """Each shape's table, what failed and why, and the targets."""
    console = console or Console()
    console.print(
        f"{result['card']}, jax {result['versions']['jax']}, {result['date']}. Steps with noise "
        "and AdamW; share of the non-private throughput [95 % bootstrap interval]; peak memory "
        "over the non-private step's.",
        highlight=False,
    )
    for cell in result["cells"]:
        shape = DecoderShape(**cell["shape"])
        table = Table(title=str(shape), title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("step")
        for name in ("ms", "±", "share", "memory"):
            table.add_column(name, justify="right", no_wrap=True)
        for entry in cell["versions"]:
            if "error" in entry:
                continue
            low, high = entry.get("interval", (math.nan, math.nan))
            memory = entry.get("memory")
            table.add_row(
                entry["name"],
                f"{entry['median_ms']:.4g}",
                f"{entry['quartile_distance_ms']:.2g}",
                f"{entry.get('share', math.nan):.3f} [{low:.3f}, {high:.3f}]",
                "–" if memory is None else f"{memory:.2f}",
            )
        console.print(table)
        if cell.get("noise_ms") is not None:
            console.print(f"  noise: {cell['noise_ms']:.3g} ms of it", highlight=False)
        for entry in cell["versions"]:
            if "error" in entry:
                console.print(f"  {entry['name']}: {entry['error']}", markup=False, highlight=False)
    for target in result["targets"]:
        if target["share"] is not None:
            reached = "met" if target["must_reached"] else "missed"
            aim = "met" if target["aim_reached"] else "missed"
            console.print(
                f"{target['version']}, {target['name']}: {target['share']:.3f}, "
                f"must {target['must']:.2f} {reached}, aim {target['aim']:.2f} {aim}",
                highlight=False,
            )
