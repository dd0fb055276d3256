"""Timing of work on a device: samples in turns, medians, intervals of ratios.

A sample enqueues several calls and waits once, so that it measures the device and not
the host's dispatch. Versions that are compared take turns, in a new random order each
time: clocks, temperature and neighbours drift, and a drift then meets all of them.
"""

import concurrent.futures
import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np


class BenchError(ValueError):
    """A measurement that cannot be made as asked. The message is one line."""


@dataclasses.dataclass(frozen=True)
class Runnable:
    """A compiled version, ready to be timed.

    Attributes:
        run: ``run(n)`` does the work n times and returns when the device is done.
        extra_bytes: device memory that the compiled program needs beyond its inputs and
            outputs; None where that cannot be known.
        call: does the work once and returns what it computed, where that is wanted.
    """

    run: Callable[[int], None]
    extra_bytes: int | None = None
    call: Callable[[], Any] = lambda: None


# Compiles what has been traced; may run in a thread.
Build = Callable[[], Runnable]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much to measure.

    Attributes:
        samples: samples of each version.
        sample_seconds: a sample makes as many calls as fit into this, at least one.
        version_seconds: a version so slow that its samples would take longer gets fewer.
        least: but never fewer than this.
    """

    samples: int = 24
    sample_seconds: float = 0.005
    version_seconds: float = 8.0
    least: int = 3


@dataclasses.dataclass
class Timing:
    """What was measured of one version: seconds for one call, a number for each turn."""

    calls_per_sample: int
    wanted: int
    seconds: list[float] = dataclasses.field(default_factory=list)
    error: str | None = None

    @property
    def median(self) -> float:
        """Median of the samples, in seconds."""
        return float(np.median(self.seconds))

    @property
    def spread(self) -> float:
        """Distance of the quartiles, in seconds."""
        low, high = np.quantile(self.seconds, [0.25, 0.75])
        return float(high - low)


def compiled_call(compiled: Any, *arguments: Any) -> Runnable:
    """A compiled JAX program (``jax.jit(f).lower(...).compile()``) with its arguments.

    One device runs what it is given in order, so waiting for the last call waits for
    all; earlier outputs are let go at once. A CPU may run calls side by side, so there
    each one is waited for.
    """
    one_by_one = jax.default_backend() == "cpu"

    def run(times: int) -> None:
        out = None
        for _ in range(times):
            out = compiled(*arguments)
            if one_by_one:
                jax.block_until_ready(out)
        jax.block_until_ready(out)

    memory = compiled.memory_analysis()
    extra = None if memory is None else int(memory.temp_size_in_bytes)
    return Runnable(run, extra, lambda: compiled(*arguments))


def peak_bytes(compiled: Any) -> int | None:
    """Device memory of a compiled JAX program: arguments, results and temporaries.

    Results that take the place of arguments count once. None where XLA does not say.

    Example:
        >>> peak_bytes(jax.jit(lambda x: x * 2).lower(np.ones(256, np.float32)).compile()) >= 2048
        True
    """
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    return int(peak + memory.output_size_in_bytes - memory.alias_size_in_bytes)


def describe_error(error: BaseException) -> str:
    """The type and the first line of the message, cut to a length that fits in a table."""
    lines = str(error).strip().splitlines() or [""]
    text = lines[0] if len(lines[0]) <= 300 else lines[0][:297] + "..."
    return f"{type(error).__name__}: {text}"


def compile_all(
    versions: Mapping[str, Callable[[], Build]],
) -> tuple[dict[str, Runnable], dict[str, str]]:
    """Traces the versions one after the other and compiles several at a time.

    Args:
        versions: by name, functions that trace and return what then compiles.

    Returns:
        What compiled, and the text of the error of what did not.
    """
    builds: dict[str, concurrent.futures.Future[Runnable]] = {}
    runnables: dict[str, Runnable] = {}
    errors: dict[str, str] = {}
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for name, prepare in versions.items():
            try:
                builds[name] = pool.submit(prepare())
            # Whatever a compiler, a driver or another library raises is a result to show.
            except Exception as error:
                errors[name] = describe_error(error)
        for name, build in builds.items():
            try:
                runnables[name] = build.result()
            except Exception as error:
                errors[name] = describe_error(error)
    return runnables, errors


def _elapsed(run: Callable[[int], None], times: int) -> float:
    start = time.perf_counter()
    run(times)
    return time.perf_counter() - start


def _warm_up(runnable: Runnable, plan: Plan) -> Timing:
    runnable.run(2)
    once = max(_elapsed(runnable.run, 1), 1e-7)
    if once < plan.sample_seconds:
        # One call alone is mostly the wait for it; several give the rate.
        several = min(100, math.ceil(plan.sample_seconds / once))
        once = _elapsed(runnable.run, several) / several
    calls = max(1, round(plan.sample_seconds / once))
    fit = int(plan.version_seconds / (calls * once))
    return Timing(calls, wanted=max(plan.least, min(plan.samples, fit)))


def measure(versions: dict[str, Runnable], plan: Plan, *, seed: int = 0) -> dict[str, Timing]:
    """Times all versions, in turns, after warming each of them up.

    A version that raises is kept, with the text of its error and no samples.

    Args:
        versions: what to time, by name.
        plan: how much.
        seed: of the order within a turn.

    Example:
        >>> results = measure({"sleep": Runnable(lambda n: time.sleep(n * 1e-4))},
        ...                   Plan(samples=3, sample_seconds=1e-3))
        >>> results["sleep"].median >= 1e-4
        True
    """
    results: dict[str, Timing] = {}
    for name, runnable in versions.items():
        try:
            results[name] = _warm_up(runnable, plan)
        except Exception as error:
            results[name] = Timing(0, 0, error=describe_error(error))
    rng = np.random.default_rng(seed)
    for turn in range(plan.samples):
        alive = [name for name, r in results.items() if r.error is None and turn < r.wanted]
        for index in rng.permutation(len(alive)):
            name = alive[index]
            result = results[name]
            try:
                elapsed = _elapsed(versions[name].run, result.calls_per_sample)
            except Exception as error:
                result.error = describe_error(error)
                result.seconds.clear()
            else:
                result.seconds.append(elapsed / result.calls_per_sample)
    return results


def ratio_with_interval(
    numerator: Sequence[float], denominator: Sequence[float], *, resamples: int = 4000
) -> tuple[float, float, float]:
    """The ratio of two medians and its 95 % bootstrap interval.

    Turns are drawn, not samples: what slowed both versions in one turn cancels. (Efron and
    Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13: percentiles.)

    Args:
        numerator: one sample a turn.
        denominator: likewise; if one of them has fewer turns, the others' turns are cut
            for the interval.
        resamples: bootstrap draws.

    Returns:
        The ratio, the low and the high end of the interval.

    Example:
        >>> ratio_with_interval([2.0, 2.0, 2.0], [1.0, 1.0, 1.0])
        (2.0, 2.0, 2.0)
    """
    if not numerator or not denominator:
        raise ValueError(
            f"samples: {len(numerator)} and {len(denominator)} are given, each needs one."
        )
    ratio = float(np.median(numerator) / np.median(denominator))
    turns = min(len(numerator), len(denominator))
    drawn = np.random.default_rng(0).integers(0, turns, (resamples, turns))
    top = np.median(np.asarray(numerator[:turns])[drawn], axis=1)
    bottom = np.median(np.asarray(denominator[:turns])[drawn], axis=1)
    low, high = np.quantile(top / bottom, [0.025, 0.975])
    return ratio, float(low), float(high)
