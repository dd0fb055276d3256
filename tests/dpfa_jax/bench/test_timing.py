import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpfa_jax.bench import timing
from dpfa_jax.bench.timing import Plan, Runnable, measure, ratio_with_interval


def test_medians_and_spread(clock):
    results = measure({"a": clock.work("a", 1e-3), "b": clock.work("b", 3e-3)}, Plan())
    assert results["a"].median == pytest.approx(1e-3)
    assert results["b"].median == pytest.approx(3e-3)
    assert results["a"].spread == pytest.approx(0.0, abs=1e-12)
    assert len(results["a"].seconds) == Plan().samples >= 20


def test_short_calls_are_repeated_within_a_sample(clock):
    plan = Plan(samples=5, sample_seconds=0.01)
    results = measure({"short": clock.work("short", 1e-5), "long": clock.work("long", 1.0)}, plan)
    assert results["short"].calls_per_sample == 1000
    assert results["short"].median == pytest.approx(1e-5)
    assert results["long"].calls_per_sample == 1


def test_warm_up_is_not_a_sample(clock):
    calls = []

    def slow_at_first(now):
        calls.append(now)
        return 5.0 if len(calls) <= 2 else 1e-3

    (result,) = measure({"a": clock.work("a", slow_at_first)}, Plan(samples=4)).values()
    assert max(result.seconds) == pytest.approx(1e-3)


def test_versions_take_turns_in_changing_order(clock):
    plan = Plan(samples=30, sample_seconds=1e-4)
    measure({name: clock.work(name, 1e-3) for name in "abc"}, plan)
    timed = [name for name, _ in clock.order][-90:]
    turns = ["".join(timed[i : i + 3]) for i in range(0, 90, 3)]
    assert all(sorted(turn) == list("abc") for turn in turns)
    assert len(set(turns)) > 3


def test_a_slow_version_gets_fewer_samples_but_some(clock):
    plan = Plan(samples=24, version_seconds=8.0, least=3)
    results = measure(
        {"slow": clock.work("slow", 100.0), "mid": clock.work("mid", 1.0)}, plan
    )  # fmt: skip
    assert len(results["slow"].seconds) == 3
    assert len(results["mid"].seconds) == 8


def test_an_error_is_kept_and_stops_nothing_else(clock):
    def never(times):
        raise RuntimeError("first line\nsecond line")

    state = []

    def sometimes(times):
        state.append(times)
        if len(state) > 8:
            raise MemoryError("out of memory")
        clock.now += 1e-3 * times

    versions = {"never": Runnable(never), "fails": Runnable(sometimes), "ok": clock.work("ok", 1.0)}
    results = measure(versions, Plan(samples=20, version_seconds=100.0))
    assert results["never"].error == "RuntimeError: first line"
    assert results["fails"].error == "MemoryError: out of memory"
    assert results["never"].seconds == results["fails"].seconds == []
    assert len(results["ok"].seconds) == 20


def test_a_drift_that_meets_both_cancels_in_the_interval(clock):
    def drifting(base):
        return lambda now: base * (1.0 + 2.0 * (now > 1.0))

    plan = Plan(samples=40, sample_seconds=0.02)
    results = measure(
        {"a": clock.work("a", drifting(1e-2)), "b": clock.work("b", drifting(2e-2))}, plan
    )
    a, b = results["a"].seconds, results["b"].seconds
    assert max(a) == pytest.approx(3 * min(a)), "the drift must be in the samples"
    ratio, low, high = ratio_with_interval(b, a)
    assert low <= ratio <= high
    assert ratio == pytest.approx(2.0, rel=0.02)
    # Had the two been resampled apart, the interval would reach from 0.7 to 6.
    assert low > 1.8
    assert high < 2.2


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        a = rng.normal(1.0, 0.05, 24)
        b = rng.normal(1.1, 0.05, 24)
        _, low, high = ratio_with_interval(list(b), list(a), resamples=300)
        covered += low <= 1.1 <= high
    assert 0.88 <= covered / 200 <= 1.0
    assert high - low < 0.2


def test_ratio_needs_samples():
    with pytest.raises(ValueError, match="samples: 0 and 1"):
        ratio_with_interval([], [1.0])


def test_a_sample_waits_for_the_work():
    x = jnp.ones((700, 700))

    @jax.jit
    def work(x):
        return jax.lax.fori_loop(0, 20, lambda _, y: (y @ x) / 700.0, x)

    compiled = work.lower(x).compile()
    runnable = timing.compiled_call(compiled, x)
    runnable.run(1)
    start = time.perf_counter()
    jax.block_until_ready(compiled(x))
    waited = time.perf_counter() - start
    start = time.perf_counter()
    runnable.run(4)
    assert time.perf_counter() - start > 2 * waited
    np.testing.assert_allclose(runnable.call(), work(x))


def test_extra_memory_is_the_compilers_temporary_memory():
    x = jnp.ones((256, 256))
    products = jax.jit(lambda x: (x @ x) @ x).lower(x).compile()
    assert timing.compiled_call(products, x).extra_bytes >= 256 * 256 * 4
    copy = jax.jit(lambda x: x + 1.0).lower(x).compile()
    assert timing.compiled_call(copy, x).extra_bytes < 1024
