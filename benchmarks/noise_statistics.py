"""Are the Gaussians of the attention tiles normal, and independent of each other?

    python -m benchmarks.noise_statistics --draws 100000000 --json noise.json

draws Gaussians on the accelerator as attention does (``normal_tile`` under ``jit``: calls,
batch, rows, heads, columns), for each number of rounds of ChaCha, and tests

* their law: the Kolmogorov-Smirnov distance, on a grid of bins of 2^-12;
* their tails: how many lie beyond 1, 2, 3, 4 and 5 standard deviations, on either side;
* their independence: the correlation of x with y and of x^2 with y^2, y being another
  call's (another key's), batch element's, row's, head's or column's Gaussian. Columns 8
  apart share a Box-Muller pair or a block, columns 128 apart are in neighbouring tiles.

Every test has a p-value that is valid or conservative for a perfect generator, and fails
below FALSE_ALARM divided by the number of all tests (Bonferroni): so a perfect generator
fails anywhere with probability at most FALSE_ALARM, over the choice of the seed. The key
comes from the seed, so that a run can be repeated. Exit status 1 if a test fails.
"""

import argparse
import datetime
import functools
import hashlib
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special, stats

from pallas_kernels import prng

FALSE_ALARM = 1e-6

# One chunk holds 2 calls x 4 batch elements x 8 heads x 256 columns of every row.
CALLS, BATCH, HEADS, COLUMNS = 2, 4, 8, 256
PER_ROW = CALLS * BATCH * HEADS * COLUMNS
MOST_ROWS = 256

STEP, REACH = 2.0**-12, 8  # bins; the smallest radius word reaches 7.54
TAILS = (1, 2, 3, 4, 5)

# Which Gaussian is paired with which: (name, axis of the chunk, distance).
PAIRS = (
    ("calls", 0, 1),
    ("batch", 1, 1),
    ("batch, 3 apart", 1, 3),
    ("rows", 2, 1),
    ("rows, 8 apart", 2, 8),
    ("heads", 3, 1),
    ("heads, 4 apart", 3, 4),
    ("columns", 4, 1),
    ("columns, 8 apart", 4, 8),
    ("columns, 16 apart", 4, 16),
    ("columns, 128 apart", 4, 128),
)

Maker = Callable[..., jax.Array]


def child_keys(seed: int) -> jax.Array:
    """One stream key for each call, [CALLS, 8]: reproducible, so for tests only."""
    digest = hashlib.sha256(f"noise statistics, reproducible seed {seed}".encode()).digest()
    parent = jnp.asarray(np.frombuffer(digest, "<u4").astype(np.uint32))
    return jnp.stack([prng.derive_key(parent, 16, call) for call in range(CALLS)])


@functools.partial(jax.jit, static_argnames=("rows", "rounds", "make"))
def chunk(
    keys: jax.Array, first_row: jax.Array, rows: int, rounds: prng.Rounds, make: Maker
) -> jax.Array:
    """The Gaussians [CALLS, BATCH, rows, HEADS, COLUMNS] of the rows from ``first_row`` on."""
    batch = jnp.arange(BATCH, dtype=jnp.uint32)
    numbers = first_row + jnp.arange(rows, dtype=jnp.uint32)
    return jnp.stack([make(key, batch, numbers, HEADS, COLUMNS, rounds=rounds) for key in keys])


@jax.jit
def chunk_sums(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of one chunk: counts of the bins, and sums of products."""
    # A power of two: the product is exact, so that every x is in the bin it belongs to.
    bins = jnp.floor(x * jnp.float32(1 / STEP)).astype(jnp.int32) + jnp.int32(REACH / STEP)
    size = int(2 * REACH / STEP)
    counts = jnp.zeros(size, jnp.int32).at[jnp.clip(bins, 0, size - 1).reshape(-1)].add(1)
    sums = []
    for values in (x, (x * x - 1.0) * jnp.float32(math.sqrt(0.5))):  # variance 1 both
        for _, axis, distance in PAIRS:
            near = jax.lax.slice_in_dim(values, 0, values.shape[axis] - distance, axis=axis)
            far = jax.lax.slice_in_dim(values, distance, None, axis=axis)
            sums.append(jnp.sum(near * far))
    return counts, jnp.stack(sums)


def _tests(counts: np.ndarray, sums: np.ndarray, chunks: int, rows: int) -> Iterator[dict]:
    """Every test of one generator: name, what was measured, p-value."""
    draws = int(counts.sum())
    edges = np.arange(1, counts.size) * STEP - REACH
    distance = float(np.max(np.abs(np.cumsum(counts)[:-1] / draws - special.ndtr(edges))))
    # P(D > d) <= 2 exp(-2 n d^2) (P. Massart, Ann. Probab. 18 (1990), 1269-1283). The
    # distance at the edges of the bins is at most that over all x.
    yield {
        "name": "Kolmogorov-Smirnov",
        "distance": distance,
        "p_value": min(1.0, 2 * math.exp(-2 * draws * distance**2)),
    }
    for side in (-1, 1):
        for beyond in TAILS:
            place = int((REACH + side * beyond) / STEP)
            count = int(counts[:place].sum() if side < 0 else counts[place:].sum())
            law = stats.binom(draws, special.ndtr(-beyond))
            yield {
                "name": f"beyond {side * beyond} sigma",
                "count": count,
                "expected": float(law.mean()),
                "p_value": float(min(1.0, 2 * min(law.cdf(count), law.sf(count - 1)))),
            }
    shape = (CALLS, BATCH, rows, HEADS, COLUMNS)
    names = [f"{what}, {name}" for what in ("correlation", "of squares") for name, _, _ in PAIRS]
    for i, name in enumerate(names):
        _, axis, distance_apart = PAIRS[i % len(PAIRS)]
        # Products of different pairs are uncorrelated and have mean 0 and variance 1.
        pairs = chunks * math.prod(shape) // shape[axis] * (shape[axis] - distance_apart)
        z = float(sums[i]) / math.sqrt(pairs)
        yield {
            "name": name,
            "pairs": pairs,
            "correlation": float(sums[i]) / pairs,
            "z": z,
            "p_value": math.erfc(abs(z) / math.sqrt(2)),
        }


def measure(
    rounds: prng.Rounds, draws: int, seed: int, make: Maker = prng.normal_tile
) -> tuple[int, list[dict]]:
    """The number of Gaussians drawn, at least ``draws``, and the tests of one generator."""
    rows = min(MOST_ROWS, max(16, -(-draws // PER_ROW)))  # rows are paired 8 apart
    chunks = -(-draws // (PER_ROW * rows))
    keys = child_keys(seed)
    counts, sums = np.zeros(int(2 * REACH / STEP), np.int64), np.zeros(2 * len(PAIRS))
    for i in range(chunks):
        some, products = chunk_sums(chunk(keys, jnp.uint32(i * rows), rows, rounds, make))
        counts += np.asarray(some)
        sums += np.asarray(products, np.float64)
    return chunks * rows * PER_ROW, list(_tests(counts, sums, chunks, rows))


def report(all_rounds: list[prng.Rounds], draws: int, seed: int) -> dict:
    """All generators' tests, judged, with what they ran on."""
    results: list[dict[str, Any]] = []
    for rounds in all_rounds:
        start = time.perf_counter()
        drawn, tests = measure(rounds, draws, seed)
        name = "Threefry-2x32-20" if rounds == "threefry" else f"ChaCha{rounds}"
        seconds = round(time.perf_counter() - start, 2)
        results.append({"generator": name, "draws": drawn, "seconds": seconds, "tests": tests})
    level = FALSE_ALARM / sum(len(r["tests"]) for r in results)
    for result in results:
        for test in result["tests"]:
            test["passed"] = bool(test["p_value"] >= level)  # NaN fails
        result["passed"] = all(test["passed"] for test in result["tests"])
    device = jax.devices()[0]
    return {
        "what": "Gaussians of attention tiles (normal_tile): law, tails, independence",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": device.device_kind,
        "platform": device.platform,
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in ("jax", "jaxlib", "numpy", "scipy")},
        "seed": seed,
        "chunk": {"calls": CALLS, "batch": BATCH, "heads": HEADS, "columns": COLUMNS},
        "false_alarm_probability": FALSE_ALARM,
        "smallest_p_value_allowed": level,
        "passed": all(result["passed"] for result in results),
        "results": results,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Statistics of the attention noise.")
    parser.add_argument("--draws", type=int, default=100_000_000, help="for each generator")
    parser.add_argument("--rounds", nargs="+", default=["8", "12", "20"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write the results")
    options = parser.parse_args(arguments)
    if options.draws < 1:
        parser.error(f"--draws {options.draws}: allowed is a whole number >= 1.")
    choices = {str(rounds): rounds for rounds in prng.ROUNDS}
    if not set(options.rounds) <= set(choices):
        parser.error(f"--rounds {' '.join(options.rounds)}: allowed are {' '.join(choices)}.")
    out = report([choices[r] for r in options.rounds], options.draws, options.seed)
    print(f"{out['device']}, jax {out['versions']['jax']}")
    for result in out["results"]:
        worst = min(result["tests"], key=lambda test: test["p_value"])
        print(
            f"{result['generator']}: {result['draws']:.3g} draws in {result['seconds']} s, "
            f"{len(result['tests'])} tests, smallest p-value {worst['p_value']:.2g} "
            f"({worst['name']})"
        )
        for test in result["tests"]:
            if not test["passed"]:
                print("  FAILED", json.dumps(test))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(out, indent=1) + "\n")
    print("passed" if out["passed"] else "FAILED", f"at p >= {out['smallest_p_value_allowed']:.2g}")
    return 0 if out["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
