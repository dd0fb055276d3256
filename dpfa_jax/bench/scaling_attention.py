"""How private attention over many keys scales with the devices that hold them.

Record-level attention of a fixed number of queries over a fixed number of keys, split over
1, 2, 4, ... devices (strong scaling). All device counts are measured in turns in one
process, on the same data. A row says how long a call takes, which share of the ideal
speed-up that is, and whether the release is the same, bit for bit, as that of the smallest
number of devices.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpfa_jax import keys
from dpfa_jax.attention import dp_dot_product_attention
from dpfa_jax.attention_privacy import AttentionPrivacy
from dpfa_jax.bench.files import write_json
from dpfa_jax.bench.hlo import collectives
from dpfa_jax.bench.timing import (
    BenchError,
    Plan,
    Runnable,
    compiled_call,
    measure,
    ratio_with_interval,
)
from dpfa_jax.parallel import dp_sequence_parallel_attention

KEYS = (65_536, 262_144, 1_048_576)
DEVICES = (1, 2, 4, 8)


@dataclasses.dataclass(frozen=True)
class Shape:
    """One batch element: ``rows`` public queries over ``num_keys`` records."""

    rows: int
    num_keys: int
    heads: int
    head_dim: int
    dtype: str

    def __str__(self) -> str:
        return f"T={self.rows} S={self.num_keys} N={self.heads} D={self.head_dim} {self.dtype}"


def usual_shapes(quick: bool) -> tuple[Shape, ...]:
    """What is measured; on a CPU with few and short heads, ``quick`` the first length only."""
    if jax.default_backend() == "cpu":
        made = [Shape(128, n, 2, 32, "float32") for n in KEYS]
    else:
        made = [Shape(4096, n, 16, 128, "bfloat16") for n in KEYS]
    return tuple(made[:1] if quick else made)


def _privacy() -> AttentionPrivacy:
    return AttentionPrivacy(
        unit="record", noise_multiplier=4.0, value_clip=1.0, adjacency="add_remove",
        logit_bound=2.0, public_queries=True,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnums=(0, 1))
def _normal(shape: tuple[int, ...], dtype: str, seed: jax.Array) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


def _arrays(shape: Shape, mesh: Mesh) -> tuple[jax.Array, ...]:
    """Query (everywhere), key and value (split), the same numbers for every mesh."""
    first = jax.sharding.SingleDeviceSharding(mesh.devices.flat[0])
    lengths = (shape.rows, shape.num_keys, shape.num_keys)
    places = (PartitionSpec(), PartitionSpec(None, "keys"), PartitionSpec(None, "keys"))
    made = []
    for seed, (length, place) in enumerate(zip(lengths, places, strict=True)):
        x = _normal((1, length, shape.heads, shape.head_dim), shape.dtype, jnp.uint32(seed))
        made.append(jax.device_put(jax.device_put(x, first), NamedSharding(mesh, place)))
    return tuple(made)


def _by_kind(text: str) -> dict[str, list[int]]:
    """Bytes of the result of each collective in a compiled program, by kind."""
    found: dict[str, list[int]] = {}
    for sent in collectives(text):
        found.setdefault(sent.kind, []).append(sent.bytes)
    return found


def _prepare(
    shape: Shape, count: int, with_gradients: bool, implementation: Any
) -> tuple[Runnable, dict[str, Any], jax.Array]:
    """Compiles a call on ``count`` devices; also returns its facts and the release."""
    mesh = Mesh(np.array(jax.devices()[:count]), ("keys",))
    query, key, value = _arrays(shape, mesh)
    # A fixed key: the release is compared between device counts, and nothing is private here.
    rng = jax.device_put(keys.reproducible_key(0), NamedSharding(mesh, PartitionSpec()))

    def release(q: jax.Array, k: jax.Array, v: jax.Array, rng: jax.Array) -> jax.Array:
        return dp_sequence_parallel_attention(
            q, k, v, mesh=mesh, axis="keys", privacy=_privacy(), rng=rng,
            implementation=implementation,
        )  # fmt: skip

    def both(q: jax.Array, k: jax.Array, v: jax.Array, rng: jax.Array) -> Any:
        out, pull = jax.vjp(lambda q, k, v: release(q, k, v, rng), q, k, v)
        return out, pull(out)

    run = jax.jit(both if with_gradients else release)
    compiled = run.lower(query, key, value, rng).compile()
    memory = compiled.memory_analysis()
    facts = {
        "collectives": _by_kind(compiled.as_text() or ""),
        "temporary_bytes": None if memory is None else int(memory.temp_size_in_bytes),
    }
    out = compiled(query, key, value, rng)
    return (
        compiled_call(compiled, query, key, value, rng),
        facts,
        out[0] if with_gradients else out,
    )


def _one_device_op(shape: Shape) -> Runnable:
    """``dp_dot_product_attention``: one fused call, nothing split."""
    mesh = Mesh(np.array(jax.devices()[:1]), ("keys",))
    query, key, value = _arrays(shape, mesh)
    rng = keys.reproducible_key(0)
    run = jax.jit(
        lambda q, k, v, rng: dp_dot_product_attention(q, k, v, privacy=_privacy(), rng=rng)
    )
    return compiled_call(run.lower(query, key, value, rng).compile(), query, key, value, rng)


def measure_shape(
    shape: Shape,
    devices: Sequence[int],
    plan: Plan,
    *,
    with_gradients: bool = False,
    implementation: Any = None,
) -> list[dict[str, Any]]:
    """A row for each device count.

    Raises:
        BenchError: if there are fewer devices than the largest count.
    """
    available = len(jax.devices())
    if not devices or min(devices) < 1 or max(devices) > available:
        raise BenchError(f"devices={list(devices)}: allowed are numbers from 1 to {available}.")
    runnables: dict[str, Runnable] = {}
    facts: dict[str, dict[str, Any]] = {}
    for count in sorted(set(devices)):
        runnable, fact, out = _prepare(shape, count, with_gradients, implementation)
        runnables[str(count)] = runnable
        facts[str(count)] = fact | {"sha256": hashlib.sha256(np.asarray(out).tobytes()).hexdigest()}
        del out
    if not with_gradients and jax.default_backend() != "cpu":
        runnables["unsplit"] = _one_device_op(shape)
    timings = measure(runnables, plan)
    fewest = min(map(int, facts))
    base = timings[str(fewest)]
    made = []
    for name, timing in timings.items():
        row: dict[str, Any] = {
            "kind": "attention", "shape": dataclasses.asdict(shape), "version": str(shape),
            "direction": "forward+backward" if with_gradients else "forward",
            "devices": None if name == "unsplit" else int(name), "error": timing.error,
        }  # fmt: skip
        if timing.seconds and base.seconds:
            speed_up, low, high = ratio_with_interval(base.seconds, timing.seconds)
            row |= {"seconds": timing.median, "samples": timing.seconds, "speed_up": speed_up}
            row["speed_up_interval"] = [low, high]
            if name != "unsplit":
                row["share_of_ideal"] = speed_up * fewest / int(name)
        if name in facts:
            row |= facts[name]
            row["same_bits"] = facts[name]["sha256"] == facts[str(fewest)]["sha256"]
        made.append(row)
    return made


def rows(
    devices: Sequence[int] = DEVICES,
    quick: bool = False,
    *,
    shapes: Sequence[Shape] | None = None,
    with_gradients: bool = False,
    implementation: Any = None,
) -> list[dict[str, Any]]:
    """Rows for all :func:`usual_shapes` on each number of ``devices`` that this machine has.

    Args:
        devices: device counts; those above what is here are left out.
        quick: the shortest shape, few samples.
        shapes: others than :func:`usual_shapes`.
        with_gradients: forward and backward, else forward alone.
        implementation: who sums; None takes the best.
    """
    chosen = [n for n in devices if n <= len(jax.devices())]
    plan = Plan(samples=5 if quick else 20, sample_seconds=0.02, version_seconds=5.0)
    found = []
    for shape in usual_shapes(quick) if shapes is None else shapes:
        found += measure_shape(
            shape, chosen, plan, with_gradients=with_gradients, implementation=implementation
        )
    return found


def show(found: Sequence[dict[str, Any]]) -> str:
    """The rows as lines of text."""
    lines = []
    for row in found:
        name = "unsplit" if row["devices"] is None else f"{row['devices']} device(s)"
        text = f"{row['version']} {row['direction']:16} {name:12}"
        if row["error"] or "seconds" not in row:
            lines.append(f"{text} {row['error']}")
            continue
        text += f" {row['seconds'] * 1e3:9.3f} ms  x{row['speed_up']:.2f}"
        if "share_of_ideal" in row:
            text += f"  {row['share_of_ideal']:.3f} of ideal"
            text += "  same bits" if row["same_bits"] else "  OTHER BITS"
        lines.append(text)
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m dpfa_jax.bench.scaling_attention --devices 1,2``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--devices", default=",".join(map(str, DEVICES)), help="default: %(default)s"
    )
    parser.add_argument("--quick", action="store_true", help="the shortest shape, few samples")
    parser.add_argument("--backward", action="store_true", help="forward and backward, too")
    parser.add_argument("--implementation", default=None, help="who sums (default: the best)")
    parser.add_argument(
        "--json", type=Path, default=Path("runs/bench_scaling_attention.json"), metavar="PATH"
    )
    args = parser.parse_args(arguments)
    counts = [int(n) for n in args.devices.split(",")]
    found = rows(counts, args.quick, implementation=args.implementation)
    print(show(found), flush=True)
    if args.backward:
        more = rows(counts, args.quick, with_gradients=True, implementation=args.implementation)
        print(show(more), flush=True)
        found += more
    kind = jax.devices()[0].device_kind
    write_json(args.json, json.loads(json.dumps({"device": kind, "rows": found})))
    print(f"every sample: {args.json}")


if __name__ == "__main__":
    main()
