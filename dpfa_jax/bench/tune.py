"""``dpfa bench tune``: measures block sizes on this machine and keeps the best ones."""

import dataclasses
import functools
import importlib
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from dpfa_jax.bench.cases import Case, Shape, make_case
from dpfa_jax.bench.files import write_json
from dpfa_jax.bench.ours import record_spec
from dpfa_jax.bench.peers import prepare_jax
from dpfa_jax.bench.timing import (
    BenchError,
    Build,
    Plan,
    Runnable,
    compile_all,
    describe_error,
    measure,
)
from pallas_kernels.attention import AttentionSpec, explain, fused, tuning

# A new choice must be this much faster than the one that stands: less is chance.
_GAIN = 1.01

# Largest difference from the standing choice's result, relative to the largest element:
# block sizes change the order of sums and nothing else.
_TOLERANCE = 2e-2

_PLAN = Plan(samples=12, sample_seconds=0.004, version_seconds=2.0)

Sizes = dict[str, int] | None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What was found for one class of shapes.

    Attributes:
        fastest: of the candidates and the standing choice, if that has sizes to name;
            None where no candidate ran.
        best: the same, if it clearly gains on the standing choice; else None.
        milliseconds: medians by sizes, the standing choice under ``'standing'``.
        errors: what candidates that do not compile, run or agree said.
    """

    fastest: Sizes
    best: Sizes
    milliseconds: dict[str, float]
    errors: dict[str, str]


def available() -> list[str]:
    """The kernel back ends that run on this machine."""
    shape = jax.ShapeDtypeStruct((1, 128, 1, 64), jnp.bfloat16)
    spec = record_spec(Shape(1, 128, 1, 64, False))
    reasons = dict(explain(shape, shape, spec))
    return [name for name in tuning.CANDIDATES if reasons.get(name, "unknown") is None]


def measure_class(
    backend: str,
    case: Case,
    candidates: Sequence[dict[str, int]],
    *,
    standing: Sizes,
    forward: Sizes = None,
    plan: Plan = _PLAN,
    interpret: bool = False,
) -> Outcome:
    """Times candidates for one shape beside the choice that stands.

    Args:
        backend: module of kernels.
        case: shape and arrays; its direction says which pass the candidates are for.
        candidates: sizes to try.
        standing: what is taken today; None is the back end's default.
        forward: sizes of the forward pass while the backward pass is tuned.
        plan: how many samples.
        interpret: run in Pallas's interpreter (for tests).

    Raises:
        BenchError: if the standing choice itself does not run.
    """
    spec = record_spec(case.shape, rounds=20)
    direction: tuning.Direction = "forward" if case.direction == "forward" else "backward"
    everything: dict[str, Sizes] = {"standing": standing}
    everything |= {_name(sizes): dict(sizes) for sizes in candidates if sizes != standing}

    def prepare(sizes: Sizes) -> Build:
        pair: tuple[Sizes, Sizes] = (sizes, None) if direction == "forward" else (forward, sizes)
        return _prepare(backend, spec, case, pair, interpret)

    runnables, errors = compile_all(
        {name: functools.partial(prepare, sizes) for name, sizes in everything.items()}
    )
    if "standing" in runnables:
        errors |= _disagreeing(runnables)
    timings = measure({n: r for n, r in runnables.items() if n not in errors}, plan)
    errors |= {name: t.error for name, t in timings.items() if t.error is not None}
    medians = {name: 1e3 * t.median for name, t in timings.items() if t.seconds}
    if "standing" not in medians:
        raise BenchError(f"{backend}, {case.shape}, {direction}: {errors['standing']}")
    named = [name for name in medians if everything[name] is not None]
    fastest = min(named, key=lambda name: medians[name], default="standing")
    gains = medians[fastest] * _GAIN < medians["standing"]
    return Outcome(everything[fastest], everything[fastest] if gains else None, medians, errors)


def _prepare(
    backend: str, spec: AttentionSpec, case: Case, pair: tuple[Sizes, Sizes], interpret: bool
) -> Build:
    module = importlib.import_module(f"pallas_kernels.attention.{backend}")
    first, second = pair
    blocks = (
        None if first is None else tuning.make_blocks(backend, "forward", first),
        None if second is None else tuning.make_blocks(backend, "backward", second),
    )

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, words: jax.Array) -> jax.Array:
        noise = fused.pack_noise(words, jnp.arange(q.shape[0], dtype=jnp.uint32))
        return fused.attention(
            module, q, k, v, spec, noise=noise, lengths=None, blocks=blocks, interpret=interpret
        )

    return prepare_jax(attend, case, case.key_words)


def _disagreeing(runnables: dict[str, Runnable]) -> dict[str, str]:
    """What fails at the first call, or computes something else than the standing choice."""
    errors: dict[str, str] = {}
    expected: Any = None
    for name in ["standing", *(name for name in runnables if name != "standing")]:
        try:
            results = jax.tree.leaves(jax.block_until_ready(runnables[name].call()))
        except Exception as error:
            errors[name] = describe_error(error)
            continue
        expected = expected or results
        if not all(_agree(x, y) for x, y in zip(results, expected, strict=True)):
            errors[name] = "the result differs from the standing choice's"
    return errors


@jax.jit
def _difference(x: jax.Array, y: jax.Array) -> jax.Array:
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    return jnp.max(jnp.abs(x - y)) / jnp.max(jnp.abs(y))


def _agree(x: jax.Array, y: jax.Array) -> bool:
    return float(_difference(x, y)) <= _TOLERANCE


def _name(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name}={size}" for name, size in sizes.items())


def run(
    *,
    backends: Sequence[str] | None = None,
    head_dims: Sequence[int] = fused.HEAD_DIMS,
    budget: float = 480.0,
    path: Path | None = None,
    plan: Plan = _PLAN,
    progress: Any = print,
) -> Path:
    """Tunes every class of shapes for this card and writes the user's table.

    The file is read first, so that a bad one is found before the minutes are spent, and
    written after every class.

    Args:
        backends: which kernels; None means all that run here.
        head_dims: which head dimensions.
        budget: seconds after which no further class is begun; classes that are not
            reached keep what the file has for them.
        path: the cache file; None means :func:`pallas_kernels.attention.tuning.cache_path`.
        plan: how many samples.
        progress: called with a line of text now and then.

    Returns:
        The file that was written.

    Raises:
        BenchError: if no kernels, or not the named ones, run here.
        tuning.CacheError: if there is a cache file that cannot be read.
    """
    start = time.monotonic()
    path = path or tuning.cache_path()
    entries = {entry.shape_class(): entry for entry in tuning.read_cache(path)}
    here = available()
    wanted = list(here if backends is None else backends)
    missing = [name for name in wanted if name not in here]
    if missing or not wanted:
        raise BenchError(
            f"no kernels to tune: {', '.join(missing) or 'all'} do not run on this machine "
            f"({jax.devices()[0].device_kind}); `dpfa doctor` says why."
        )
    card = jax.devices()[0].device_kind
    lengths: tuple[tuning.Length, ...] = ("long", "short")
    directions: tuple[tuning.Direction, ...] = ("forward", "backward")
    classes = itertools.product(wanted, head_dims, lengths, (False, True))
    for backend, head_dim, length, is_causal in classes:
        if time.monotonic() - start > budget:
            progress(f"the budget of {budget:.0f} s is spent; the other classes stay as they were")
            break
        shape = _shape(length, head_dim, is_causal)
        forward: Sizes = None
        for direction in directions:
            empty = tuning.Entry(backend, direction, card, head_dim, is_causal, length, 16, {})
            standing = _standing(empty)
            case = make_case(shape, "forward" if direction == "forward" else "forward+backward")
            base: dict[str, int] = {}
            outcome = None
            for group in tuning.CANDIDATES[backend][direction]:
                outcome = measure_class(
                    backend,
                    case,
                    [base | sizes for sizes in group],
                    standing=standing,
                    forward=forward,
                    plan=plan,
                )
                base = outcome.fastest or base
            if outcome is None:
                continue
            if direction == "forward":
                forward = outcome.best or standing
            entries.pop(empty.shape_class(), None)
            if outcome.best is not None:
                entry = dataclasses.replace(empty, blocks=outcome.best)
                entries[entry.shape_class()] = entry
            write_json(path, tuning.cache_contents(tuple(entries.values())))
            progress(_line(backend, shape, direction, outcome))
    return path


def _shape(length: tuning.Length, head_dim: int, is_causal: bool) -> Shape:
    """A shape that stands for its class: as much work for every head dimension."""
    batch, rows = (4, 4096) if length == "long" else (16, 1024)
    return Shape(batch, rows, 2048 // head_dim, head_dim, is_causal)


def _standing(wanted: tuning.Entry) -> Sizes:
    """What the committed table has for a class; None for the back end's defaults."""
    return tuning.lookup(
        wanted.backend,
        wanted.direction,
        device_kind=wanted.card,
        head_dim=wanted.head_dim,
        is_causal=wanted.is_causal,
        num_keys=_shape(wanted.length, wanted.head_dim, wanted.is_causal).length,
        dtype=jnp.bfloat16,
        with_cache=False,
    )


def _line(backend: str, shape: Shape, direction: str, outcome: Outcome) -> str:
    standing = outcome.milliseconds["standing"]
    text = f"{backend}, {shape}, {direction}: standing {standing:.4g} ms"
    if outcome.best is not None:
        name = _name(outcome.best)
        text += f", {name} {outcome.milliseconds[name]:.4g} ms"
    else:
        text += ", nothing faster"
    passed = len(outcome.errors)
    return text + (f" ({passed} candidates passed over)" if passed else "")
