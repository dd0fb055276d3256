"""``dpfa bench scaling``: private training steps on one device and on several.

Weak scaling: the batch of a device is fixed, so k devices should do k times the work in the
same time. Strong scaling: the whole batch is fixed, so they should take 1/k of the time. Both
as tokens per second, over k times those of one device.
"""

import dataclasses
import datetime
import functools
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree
from rich import box
from rich.console import Console
from rich.table import Table

from dpfa_jax import keys, optim
from dpfa_jax.bench import decoder, scaling_attention, scaling_model, scaling_plot, steps
from dpfa_jax.bench.decoder import DecoderShape
from dpfa_jax.bench.files import write_json
from dpfa_jax.bench.hlo import collectives
from dpfa_jax.bench.timing import BenchError, Plan, Runnable, describe_error, measure, peak_bytes
from dpfa_jax.clipping import clipped_grad
from dpfa_jax.parallel.mesh import DATA, fsdp_shardings, gathered, make_mesh, replicated
from dpfa_jax.versions import package_versions

LAYOUTS = ("dp", "fsdp")
MODES = ("weak", "strong")
MODELS = {
    "gpt2": dataclasses.replace(decoder.GPT2_1024, batch=16),
    "1.3b": decoder.LARGE,
    "small": dataclasses.replace(decoder.SMALL, accumulate=1, batch=8),
}
ATTENTION = "attention"
# Share of ideal to reach: (layout, mode, devices) -> (must, aim), for the GPT-2 of the issue.
TARGETS = {
    ("dp", "weak", 2): (0.95, 0.98),
    ("fsdp", "weak", 2): (0.90, 0.98),
    ("dp", "weak", 4): (0.95, 0.95),
    ("dp", "weak", 8): (0.93, 0.93),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One cell of the table.

    Attributes:
        model: a name from ``MODELS``.
        layout: ``'dp'``, every device holds all parameters, or ``'fsdp'``, a part of each.
        mode: ``'weak'`` or ``'strong'``.
        devices: how many.
        shape: the decoder, with the batch that one device takes at a time.
        examples: of one device in a step.
    """

    model: str
    layout: str
    mode: str
    devices: int
    shape: DecoderShape
    examples: int

    @property
    def tokens(self) -> int:
        """Of all devices in a step."""
        return self.devices * self.examples * self.shape.length


def make_case(model: str, shape: DecoderShape, layout: str, mode: str, devices: int) -> Case:
    """The case, its batch divided over the devices if the scaling is strong.

    Raises:
        BenchError: if it does not divide.
    """
    examples = shape.batch * shape.accumulate
    if mode == "strong":
        if examples % devices:
            raise BenchError(
                f"strong scaling of {model}: {examples} examples do not divide over {devices} "
                "devices; give another --batch."
            )
        examples //= devices
    together = min(shape.batch, examples)
    shape = dataclasses.replace(shape, batch=together, accumulate=examples // together)
    return Case(model, layout, mode, devices, shape, examples)


def _as_it_is(x: jax.Array) -> jax.Array:
    return x


class TrainStep:
    """A compiled step of DP-SGD with AdamW on a mesh, and the state that it updates in place."""

    def __init__(self, case: Case, mesh: Mesh):
        shape, self._mesh = case.shape, mesh
        rows = NamedSharding(mesh, PartitionSpec(DATA))
        batch = case.examples * case.devices
        whole = functools.partial(gathered, mesh=mesh) if case.layout == "fsdp" else _as_it_is

        def loss(params: PyTree, _: None, tokens: jax.Array) -> jax.Array:
            return decoder.loss(shape, params, None, tokens, whole)

        grad = clipped_grad(
            loss,
            l2_clip_norm=steps.CLIP_NORM,
            batch_argnums=2,
            microbatch_size=None if shape.accumulate == 1 else shape.batch * case.devices,
            batch_sharding=rows,
        )
        adam = optax.adamw(1e-7)
        noise = optim.add_noise(
            steps.CLIP_NORM, steps.NOISE_MULTIPLIER, float(batch), keys.SecureKey.generate()
        )

        def init() -> PyTree:
            params = decoder.init(shape, jax.random.key(0))["base"]
            return {"params": params, "adam": adam.init(params)}

        def step(state: PyTree, tokens: jax.Array) -> PyTree:
            total = grad(state["params"], None, tokens)
            mean, noise_state = noise.update(total, state["noise"])
            updates, adam_state = adam.update(mean, state["adam"], state["params"])
            params = optax.apply_updates(state["params"], updates)
            return {"params": params, "adam": adam_state, "noise": noise_state}

        place = fsdp_shardings if case.layout == "fsdp" else replicated
        shardings = place(jax.eval_shape(init), mesh)
        state = jax.jit(init, out_shardings=shardings)()
        state["noise"] = jax.device_put(noise.init(None), NamedSharding(mesh, PartitionSpec()))
        shardings["noise"] = replicated(state["noise"], mesh)
        size = (batch, shape.length + 1)
        self.tokens = jax.jit(
            lambda: jax.random.randint(jax.random.key(1), size, 0, shape.vocabulary),
            out_shardings=rows,
        )()
        self.state = state
        # Functions of JAX and Optax that are used here need it.
        promoting = jax.numpy_dtype_promotion("standard")(step)
        lowered = jax.jit(promoting, donate_argnums=0, out_shardings=shardings).lower(
            state, self.tokens
        )
        self.compiled = lowered.compile()
        self.parameters = sum(x.size for x in jax.tree.leaves(state["params"]))

    def run(self, times: int) -> None:
        """Some steps, waited for."""
        for _ in range(times):
            self.state = self.compiled(self.state, self.tokens)
        jax.block_until_ready(self.state)


def _by_kind(text: str) -> list[dict[str, Any]]:
    """The collectives in a compiled program: kind, how many instructions, bytes of results."""
    sizes: dict[str, list[int]] = {}
    for sent in collectives(text):
        sizes.setdefault(sent.kind, []).append(sent.bytes)
    return [
        {"kind": kind, "instructions": len(each), "bytes": sum(each)}
        for kind, each in sorted(sizes.items())
    ]


def _union(spans: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    merged: list[tuple[float, float]] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


def _length(spans: Sequence[tuple[float, float]]) -> float:
    return sum(end - begin for begin, end in _union(spans))


def collective_times(run: Callable[[int], None], times: int = 3) -> dict[str, float] | None:
    """Seconds of a step that the first GPU spends in collectives, from JAX's profiler.

    Returns:
        ``seconds`` in all, and ``exposed``, in which nothing else ran there; None where the
        profile shows no GPU.
    """
    talk: list[tuple[float, float]] = []
    work: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run(times)
        files = sorted(Path(folder).rglob("*.xplane.pb"))
        if not files:
            return None
        profile = jax.profiler.ProfileData.from_file(str(files[0]))
        plane = profile.find_plane_with_name("/device:GPU:0")
        if plane is None:
            return None
        for line in plane.lines:
            if not line.name.startswith("Stream"):
                continue
            for event in line.events:
                span = (event.start_ns, event.start_ns + event.duration_ns)
                (talk if "nccl" in event.name.lower() else work).append(span)
    both = _length([*talk, *work])
    return {
        "seconds": 1e-9 * _length(talk) / times,
        "exposed": 1e-9 * (both - _length(work)) / times,
    }


def measure_case(case: Case, plan: Plan) -> dict[str, Any]:
    """Times one case; its error instead, if it cannot run."""
    entry = dataclasses.asdict(case) | {"tokens": case.tokens}
    try:
        mesh = make_mesh({DATA: case.devices}, jax.devices()[: case.devices])
        start = time.monotonic()
        step = TrainStep(case, mesh)
        entry["compile_seconds"] = round(time.monotonic() - start, 1)
        timing = measure({"step": Runnable(step.run)}, plan)["step"]
        if timing.error:
            raise BenchError(timing.error)
        entry |= {
            "parameters": step.parameters,
            "predicted_ms": predicted_ms(case, step.parameters),
            "median_ms": 1e3 * timing.median,
            "quartile_distance_ms": 1e3 * timing.spread,
            "samples_ms": [round(1e3 * s, 4) for s in timing.seconds],
            "tokens_per_second": case.tokens / timing.median,
            "peak_bytes": peak_bytes(step.compiled),
            "device_peak_bytes": _device_peak(case.devices),
            "collectives": _by_kind(step.compiled.as_text() or ""),
            **_profile(step.run),
        }
    # Whatever a compiler, a driver or NCCL raises is a result to show.
    except Exception as error:
        entry["error"] = describe_error(error)
    return entry


def _profile(run: Callable[[int], None]) -> dict[str, Any]:
    try:
        return {"collective_seconds": collective_times(run)}
    except Exception as error:  # a profile is a detail; the times stand without it
        return {"collective_seconds": None, "profile_error": describe_error(error)}


def _device_peak(devices: int) -> int | None:
    stats = [d.memory_stats() for d in jax.local_devices()[:devices]]
    peaks = [int(s["peak_bytes_in_use"]) for s in stats if s and "peak_bytes_in_use" in s]
    return max(peaks) if peaks else None


def predicted_ms(case: Case, parameters: int) -> float:
    """What docs/scaling.md predicts for the step, with an H100's constants."""
    model = scaling_model.Decoder(
        case.model,
        float(parameters),
        case.shape.layers,
        case.shape.width,
        together=case.shape.batch,
        examples=case.examples,
        length=case.shape.length,
    )
    return 1e3 * scaling_model.predict(model, case.devices, fsdp=case.layout == "fsdp").seconds


def judge(cells: Sequence[dict[str, Any]]) -> None:
    """Adds to each cell its share of ideal, over one device with the same model and batch.

    And the prediction's error, as a share of what was measured.
    """
    for cell in cells:
        if "predicted_ms" in cell:
            cell["prediction_error"] = cell["predicted_ms"] / cell["median_ms"] - 1.0
        one = [
            c
            for c in cells
            if c["devices"] == 1
            and c["model"] == cell["model"]
            and "error" not in c
            and (c["layout"] == cell["layout"] or cell["layout"] == "fsdp")
        ]
        if one and "error" not in cell:
            ideal = cell["devices"] * one[0]["tokens_per_second"]
            cell["share"] = cell["tokens_per_second"] / ideal
            target = TARGETS.get((cell["layout"], cell["mode"], cell["devices"]))
            if target and cell["model"] == "gpt2":
                cell["must"], cell["aim"] = target


def cases(
    devices: Sequence[int],
    models: Sequence[str],
    layouts: Sequence[str],
    modes: Sequence[str],
    batch: int | None,
) -> list[Case]:
    """All cases, those of one device first: it is the same for every layout and mode.

    Raises:
        BenchError: for names that there are not, or more devices than there are.
    """
    for option, given, allowed in (
        ("--models", models, (*MODELS, ATTENTION)),
        ("--layouts", layouts, LAYOUTS),
        ("--modes", modes, MODES),
    ):
        wrong = [name for name in given if name not in allowed]
        if wrong or not given:
            raise BenchError(f"{option} {','.join(given)}: allowed are {', '.join(allowed)}.")
    there = len(jax.devices())
    if not devices or min(devices) < 1 or max(devices) > there:
        raise BenchError(
            f"--devices {','.join(map(str, devices))}: allowed are numbers from 1 to {there}, the "
            f"{jax.devices()[0].platform} devices that are here."
        )
    if batch is not None and batch < 1:
        raise BenchError(f"--batch {batch}: allowed is a whole number >= 1.")
    found: list[Case] = []
    for model in models:
        shape = MODELS[model]
        if batch is not None:
            shape = dataclasses.replace(shape, batch=batch)
        found.append(make_case(model, shape, "dp", "weak", 1))
        for mode in modes:
            for layout in layouts:
                several = sorted(n for n in set(devices) if n > 1)
                found += [make_case(model, shape, layout, mode, n) for n in several]
    return found


def run(
    *,
    devices: Sequence[int],
    models: Sequence[str] = ("gpt2", "1.3b", "attention"),
    layouts: Sequence[str] = LAYOUTS,
    modes: Sequence[str] = MODES,
    batch: int | None = None,
    quick: bool = False,
    budget: float = 480.0,
    plan: Plan | None = None,
    attention_shapes: Sequence[scaling_attention.Shape] | None = None,
    json_path: Path | None = None,
    command: str = "dpfa bench scaling",
    progress: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measures every case and writes the result after each.

    Args:
        devices: how many, each number a column of the table; one is always measured.
        models: names from ``MODELS``, and ``'attention'``: record-level attention over keys that
            are split over the devices.
        layouts: ``'dp'``, ``'fsdp'``.
        modes: ``'weak'``, ``'strong'``.
        batch: another batch of one device.
        quick: fewer samples, weak scaling only.
        budget: seconds after which no further case is begun.
        plan: how many samples; None is the usual.
        attention_shapes: of the attention; None is the usual.
        json_path: written after every case; a plot is written beside it at the end.
        command: as typed, for the record.
        progress: called with one line for each case.

    Returns:
        The contents of the JSON file.

    Raises:
        BenchError: for options that do not fit this machine.
    """
    start = time.monotonic()
    modes = ("weak",) if quick else tuple(modes)
    usual = Plan(samples=5 if quick else 15, sample_seconds=0.2, version_seconds=20.0, least=5)
    plan = plan or usual
    with_attention = ATTENTION in models
    models = [name for name in models if name != ATTENTION]
    todo = cases(devices, models, layouts, modes, batch) if models else []
    result: dict[str, Any] = {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "card": jax.devices()[0].device_kind,
        "devices_here": len(jax.devices()),
        "versions": package_versions(),
        "plan": dataclasses.asdict(plan),
        "cells": [],
    }
    if with_attention:
        # Before the training steps: it asks for little memory, and its figures are few.
        progress("attention over keys on several devices")
        result["attention"] = scaling_attention.rows(
            sorted({1, *devices}), quick, shapes=attention_shapes
        )
    for case in todo:
        spent = time.monotonic() - start
        name = f"{case.model} {case.layout} {case.mode} {case.devices}"
        if spent > budget:
            cell = dataclasses.asdict(case)
            cell["error"] = f"not measured: the time budget of {budget:.0f} s was spent"
        else:
            progress(f"[{spent:4.0f} s] {name}")
            cell = measure_case(case, plan)
        result["cells"].append(cell)
        judge(result["cells"])
        result["seconds"] = round(time.monotonic() - start, 1)
        if json_path is not None:
            write_json(json_path, result)
        jax.clear_caches()
    if json_path is not None:
        write_json(json_path, result)
        scaling_plot.write(result, json_path.with_suffix(".svg"))
    return result


def print_result(result: dict[str, Any], console: Console | None = None) -> None:
    """One table, and what failed and why."""
    console = console or Console(width=140)
    console.print(
        f"{result['card']}, jax {result['versions']['jax']}, {result['date']}. DP-SGD steps with "
        "AdamW; share: tokens/s over those of one device times the devices.",
        highlight=False,
    )
    table = Table(box=box.SIMPLE_HEAD)
    names = ("devices", "examples", "ms", "±", "tokens/s", "share", "GiB", "collectives ms", "bare")
    for name in ("model", "layout", "scaling"):
        table.add_column(name)
    for name in (*names, "predicted"):
        table.add_column(name, justify="right", no_wrap=True)
    for cell in result["cells"]:
        if "error" in cell:
            continue
        talk = cell["collective_seconds"]
        peak = cell["peak_bytes"]
        table.add_row(
            cell["model"],
            cell["layout"],
            cell["mode"],
            str(cell["devices"]),
            str(cell["devices"] * cell["examples"]),
            f"{cell['median_ms']:.4g}",
            f"{cell['quartile_distance_ms']:.2g}",
            f"{cell['tokens_per_second']:.4g}",
            f"{cell['share']:.3f}" if "share" in cell else "–",
            "–" if peak is None else f"{peak / 2**30:.2f}",
            "–" if talk is None else f"{1e3 * talk['seconds']:.3g}",
            "–" if talk is None else f"{1e3 * talk['exposed']:.3g}",
            f"{cell['prediction_error']:+.0%}",
        )
    console.print(table)
    if "attention" in result:
        console.print(scaling_attention.show(result["attention"]), markup=False, highlight=False)
    for cell in result["cells"]:
        name = f"{cell['model']} {cell['layout']} {cell['mode']} {cell['devices']}"
        if "error" in cell:
            console.print(f"  {name}: {cell['error']}", markup=False, highlight=False)
        if "profile_error" in cell:
            said = f"no profile: {cell['profile_error']}"
            console.print(f"  {name}: {said}", markup=False, highlight=False)
