"""Floating point under attack: outputs of one neighbour only, tails, and time.

    python -m benchmarks.audit_numerics --json OUT

* outputs: the share of outputs that only one neighbour can reach, for gradients and sequences
  (on their grid) and records in bfloat16, and, for comparison, for the same sums unrounded;
* tails: counts of the noise beyond 3, 4 and 5 deviations against a normal's;
* time: whether a call takes longer for one input than for its neighbour. Calls of all inputs in
  turns; medians, and the p-value of a Mann-Whitney test against the first input's times.

The exit status is 1 if an output is one neighbour's alone, or a tail is off.
"""

import argparse
import datetime
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from dpfa_jax import AttentionPrivacy, add_noise, clipped_grad, keys
from dpfa_jax.attention import dp_dot_product_attention
from dpfa_jax.audit.outputs import off_grid, one_sided
from dpfa_jax.bench.files import write_json
from dpfa_jax.optim.noise import grid_spacing, inflated_sum_std

_SIDES = 2


def gradients(samples: int) -> dict[str, Any]:
    """Sums 0 and C = 1 with z = 1: the release, and the same numbers before the grid."""
    spacing = grid_spacing(inflated_sum_std(1.0, 1.0))
    released, plain = [], []
    for total in (0.0, 1.0):
        tx = add_noise(1.0, 1.0, 1.0, keys.SecureKey.generate())
        updates = {"w": jnp.full(samples, total, jnp.float32)}
        released.append(np.asarray(tx.update(updates, tx.init(updates))[0]["w"]))
        noise = jax.random.normal(keys.SecureKey.generate().key(), (samples,), jnp.float32)
        plain.append(np.asarray(jnp.float32(total) + noise))
    # Near the middle both have at least a fifth of the other's probability.
    middle = [x[np.abs(x - 0.5) < 1.5][: samples // 2] for x in released]
    count = min(x.size for x in middle)
    # 1 + n is a multiple of 2⁻²⁴ for n from −1.5 to −0.5 (Sterbenz), 0 + n mostly is not.
    near = plain[0][np.abs(plain[0]) < 0.5]
    return {
        "what": "gradients, sums 0 and C, z = 1",
        "grid": spacing,
        "share_off_the_grid": [off_grid(x, spacing) for x in released],
        "share_of_one_neighbour": one_sided(middle[0][:count], middle[1][:count], least=150),
        "unrounded_share_of_one_neighbour_at_least": off_grid(near, 2.0**-24) * near.size / samples,
    }


def attention(samples: int, unit: str) -> dict[str, Any]:
    """One row's outputs under replace_one, at the strength of the audit."""
    dtype = jnp.bfloat16 if unit == "record" else jnp.float32
    extra = {"logit_bound": 0.0} if unit == "record" else {}
    privacy = AttentionPrivacy(
        unit=unit,  # type: ignore[arg-type]
        noise_multiplier=1.0,
        value_clip=1.0,
        adjacency="replace_one",
        public_queries=True,
        **extra,  # type: ignore[arg-type]
    )
    query, key = jnp.zeros((1, samples, 1, 1), dtype), jnp.zeros((1, 64, 1, 1), dtype)
    call = jax.jit(lambda v, k: dp_dot_product_attention(query, key, v, privacy=privacy, rng=k))
    outputs = []
    for sign in (1.0, -1.0):
        value = jnp.zeros((1, 64, 1, 1), dtype).at[:, 0].set(sign)
        value = value if unit == "record" else jnp.full_like(value, sign)
        out = call(value, keys.SecureKey.generate().key())
        outputs.append(np.asarray(out, np.float64).ravel())
    spec = privacy.spec(scale=1.0, head_dim=1, num_keys=64, dtype=str(query.dtype), is_causal=False)
    std = spec.numerator_std / (64.0 if unit == "record" else 1.0)
    middle = [x[np.abs(x) < 1.5 * std] for x in outputs]
    count = min(x.size for x in middle)
    return {
        "what": f"attention, {unit}, {query.dtype}",
        "grid": "bfloat16" if unit == "record" else spec.spacing(spec.numerator_std),
        "share_off_the_grid": [
            float(np.mean(x != np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)))
            if unit == "record"
            else off_grid(x, spec.spacing(spec.numerator_std))
            for x in outputs
        ],
        "share_of_one_neighbour": one_sided(middle[0][:count], middle[1][:count], least=150),
    }


def tails(samples: int) -> list[dict[str, Any]]:
    """Counts beyond some deviations; p-values of the exact binomial test."""
    tx = add_noise(1.0, 1.0, 1.0, keys.SecureKey.generate())
    updates = {"w": jnp.zeros(samples)}
    noise = np.abs(np.asarray(tx.update(updates, tx.init(updates))[0]["w"], np.float64))
    noise = noise / inflated_sum_std(1.0, 1.0)
    spacing = grid_spacing(inflated_sum_std(1.0, 1.0)) / inflated_sum_std(1.0, 1.0)
    found = []
    for beyond in (3.0, 4.0, 5.0):
        # A number counts from its cell's edge: half a step of the grid beyond the last cell.
        edge = (np.floor(beyond / spacing) + 0.5) * spacing
        count, share = int((noise > edge).sum()), float(_SIDES * scipy.stats.norm.sf(edge))
        p = float(scipy.stats.binomtest(count, samples, share).pvalue)
        found.append({"beyond": beyond, "count": count, "expected": samples * share, "p": p})
    return found


def _timed(call: Any, inputs: dict[str, tuple[Any, ...]], rounds: int) -> list[dict[str, Any]]:
    times: dict[str, list[float]] = {name: [] for name in inputs}
    inputs = jax.block_until_ready(inputs)
    for arguments in inputs.values():
        jax.block_until_ready(call(*arguments))
    for _ in range(rounds):
        for name, arguments in inputs.items():
            started = time.perf_counter()
            jax.block_until_ready(call(*arguments))
            times[name].append(time.perf_counter() - started)
    first = next(iter(times.values()))
    return [
        {
            "input": name,
            "median_us": round(1e6 * float(np.median(x)), 1),
            "p_against_first": float(scipy.stats.mannwhitneyu(first, x).pvalue),
        }
        for name, x in times.items()
    ]


def timing(rounds: int) -> dict[str, list[dict[str, Any]]]:
    """The same program on neighbours, and on inputs that are as unlike as can be."""
    privacy = AttentionPrivacy(
        unit="record", noise_multiplier=1.0, value_clip=1.0, adjacency="add_remove",
        logit_bound=1.0, public_queries=True,
    )  # fmt: skip
    query = jax.random.normal(jax.random.key(0), (2, 256, 2, 32))
    key = jax.random.normal(jax.random.key(1), (2, 512, 2, 32))
    full = jnp.full(2, 512, jnp.int32)
    rng = keys.SecureKey.generate().key()

    @jax.jit
    def attend(k: jax.Array, v: jax.Array, n: jax.Array) -> jax.Array:
        return dp_dot_product_attention(
            query, k, v, privacy=privacy, rng=rng, key_value_seq_lengths=n, implementation="xla"
        )

    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.tanh(x @ w) ** 2)

    grad = jax.jit(lambda w, x, p: clipped_grad(loss, l2_clip_norm=1.0)(w, x, is_padding_example=p))
    w, x = jnp.ones((256, 256)) * 0.01, jax.random.normal(jax.random.key(2), (64, 256))
    nobody = jnp.zeros(64, jnp.bool_)
    with keys.allow_reuse_for_tests():  # the same noise each time: only the data differ
        attention_times = _timed(
            attend,
            {
                "all records": (key, key, full),
                "one record less": (key, key, full - 1),
                "one record": (key, key, full * 0 + 1),
                "a NaN record": (key.at[:, 0].set(jnp.nan), key, full),
                "a long record": (key, key.at[:, 0].mul(1e6), full),
                "subnormal values": (key, key * 1e-40, full),
            },
            rounds,
        )
    gradient_times = _timed(
        grad,
        {
            "all examples": (w, x, nobody),
            "one example less": (w, x, nobody.at[0].set(True)),
            "no example": (w, x, ~nobody),
            "a NaN example": (w, x.at[0].set(jnp.nan), nobody),
            "a long gradient": (w, x.at[0].mul(1e6), nobody),
            "subnormal inputs": (w, x * 1e-40, nobody),
        },
        rounds,
    )
    # Microbatches without examples are skipped, and the size of a Poisson batch is private.
    in_parts = jax.jit(
        lambda w, x, p: clipped_grad(loss, l2_clip_norm=1.0, microbatch_size=16)(
            w, x, is_padding_example=p
        )
    )
    batch_times = _timed(
        in_parts,
        {f"{count} examples": (w, x, jnp.arange(64) >= count) for count in (64, 63, 49, 48, 16, 0)},
        rounds,
    )
    return {
        "attention, records, xla": attention_times,
        "clipped_grad, auto": gradient_times,
        "clipped_grad, microbatches of 16, 64 rows": batch_times,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.audit_numerics")
    parser.add_argument("--samples", type=int, default=4_000_000)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args(argv)
    outputs = [
        gradients(args.samples),
        attention(args.samples // 2, "record"),
        attention(args.samples // 2, "sequence"),
    ]
    tail = tails(args.samples)
    passed = all(
        x["share_of_one_neighbour"] == 0 and not any(x["share_off_the_grid"]) for x in outputs
    ) and all(t["p"] > 1e-7 for t in tail)
    facts = {
        "command": "python -m benchmarks.audit_numerics "
        + " ".join(sys.argv[1:] if argv is None else argv),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "device": jax.devices()[0].device_kind,
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "passed": passed,
        "samples": args.samples,
        "outputs": outputs,
        "tails": tail,
        "timing": timing(args.rounds),
    }
    for line in (*outputs, *tail):
        print(line)
    for what, rows in facts["timing"].items():
        for row in rows:
            print(what, row)
    if args.json is not None:
        write_json(args.json, facts)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
