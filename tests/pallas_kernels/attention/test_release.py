"""What leaves the kernel: the grid, the clip, the bound, and records that are poisoned."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import AttentionSpec, attention, common

WORDS = jnp.arange(21, 29, dtype=jnp.uint32)
ROWS = jnp.arange(64, dtype=jnp.uint32)
BATCH = jnp.arange(2, dtype=jnp.uint32)
DTYPES = ("float32", "bfloat16", "float16")


# --- the grid ---------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", [2.0**-12, 0.25, 1.0, 64.0])
def test_rounding_stays_within_half_a_spacing_and_lands_on_multiples(spacing):
    x = jnp.asarray(np.random.default_rng(0).normal(size=5000) * 50 * spacing, jnp.float32)
    y = np.asarray(common.round_to_grid(x, spacing), np.float64)
    assert np.all(y / spacing == np.round(y / spacing))
    assert np.abs(y - np.asarray(x, np.float64)).max() <= spacing / 2
    assert np.abs(y - np.asarray(x, np.float64)).max() > 0.49 * spacing


def test_rounding_has_the_gradient_of_the_identity_in_both_modes_and_under_vmap():
    x = jnp.linspace(-3.0, 3.0, 7, dtype=jnp.float32)
    f = lambda x: common.round_to_grid(x, 0.5)  # noqa: E731
    assert bool((jax.grad(lambda x: jnp.sum(f(x) * x))(x) == f(x) + x).all())
    assert bool((jax.jvp(f, (x,), (x,))[1] == x).all())
    assert bool((jax.vmap(jax.grad(f))(x) == 1.0).all())
    # With spacing 0 nothing is rounded.
    assert bool((common.round_to_grid(x, 0.0) == x).all())


@pytest.mark.parametrize("std", [1e-6, 0.3, 1.0, 1.999, 7.0, 3e4])
def test_the_spacing_is_a_power_of_two_below_a_thousandth_of_the_noise(std):
    spec = AttentionSpec(mode="sequence", scale=1.0)
    spacing = spec.spacing(std)
    assert np.frexp(spacing)[0] == 0.5
    assert std / 2048 < spacing <= std / 1024
    assert dataclasses.replace(spec, grid=None).spacing(std) == 0.0
    assert dataclasses.replace(spec, grid=3).spacing(std) == 128 * spacing


def _record_spec(**options):
    numbers = {
        "value_clip": 1.0,
        "logit_bound": 0.0,
        "numerator_std": 1.3,
        "denominator_std": 0.9,
        "denominator_floor": 1.0,
    }
    return AttentionSpec(mode="record", scale=0.5, **(numbers | options))


def _with_and_without_grid(spec, *sums):
    release = common.release_record if spec.mode == "record" else common.release_sequence

    @jax.jit
    def both(*sums):
        specs = spec, dataclasses.replace(spec, grid=None)
        return [release(s, *sums, WORDS, BATCH, ROWS) for s in specs]

    return both(*sums)


def test_released_numerators_lie_on_the_grid():
    """A floor above every sum is the divisor; being a power of two, it loses no bit."""
    spec = _record_spec(denominator_floor=2.0**20)
    numerator = jax.random.normal(jax.random.key(0), (2, 64, 3, 5)) * 10
    out, raw = _with_and_without_grid(spec, numerator, jnp.ones((2, 64, 3)))
    _check_grid(out * 2.0**20, raw * 2.0**20, spec.spacing(1.3))


def test_released_denominators_lie_on_the_grid():
    """A numerator of ones without noise releases 1/L̃."""
    spec = _record_spec(numerator_std=0.0, denominator_floor=0.5)
    denominator = jax.random.uniform(jax.random.key(0), (2, 64, 3), minval=4.0, maxval=60.0)
    ones = jnp.ones((2, 64, 3, 5))
    out, raw = _with_and_without_grid(spec, ones, denominator)
    _check_grid(1.0 / out, 1.0 / raw, spec.spacing(0.9), slack=2e-5)


def test_released_sequence_rows_lie_on_the_grid():
    spec = AttentionSpec(mode="sequence", scale=1.0, numerator_std=5.0)
    output = jax.random.normal(jax.random.key(0), (2, 64, 3, 5))
    out, raw = _with_and_without_grid(spec, output)
    _check_grid(out, raw, spec.spacing(5.0))


def _check_grid(out, raw, spacing, slack=0.0):
    out, raw = np.asarray(out, np.float64), np.asarray(raw, np.float64)
    steps = out / spacing
    assert np.abs(steps - np.round(steps)).max() <= slack / spacing
    assert np.abs(out - raw).max() <= spacing / 2 + slack
    # The unrounded ones are not on the grid: the check above can fail.
    assert np.abs(raw / spacing - np.round(raw / spacing)).max() > 0.4


def test_attention_rounds_by_default(implementation):
    spec = AttentionSpec(mode="sequence", scale=0.5, value_clip=1.0, numerator_std=1.0)
    x = jax.random.normal(jax.random.key(1), (2, 5, 2, 8))
    call = functools.partial(attention, x, x, x, key_words=WORDS, implementation=implementation)
    out = np.asarray(jax.jit(lambda: call(spec))(), np.float64)
    assert np.all(out * 1024 == np.round(out * 1024))


def test_the_floor_divides_and_negative_sums_are_floored():
    spec = _record_spec(numerator_std=0.0, denominator_std=0.0, denominator_floor=0.5, grid=None)
    sums = jnp.asarray([-3.0, 0.0, 0.25, 0.5, 0.75, 8.0], jnp.float32)
    counters = jnp.zeros(1, jnp.uint32), ROWS[:6]

    def release(sums):
        return common.release_record(spec, jnp.ones((1, 6, 1, 1)), sums, WORDS, *counters)

    out, pull = jax.vjp(release, sums[None, :, None])
    assert out.ravel().tolist() == pytest.approx([2, 2, 2, 2, 4 / 3, 1 / 8])
    slope = pull(jnp.ones_like(out))[0].ravel()
    # -1/L² above the floor, nothing at it or below.
    assert slope.tolist() == pytest.approx([0, 0, 0, 0, -16 / 9, -1 / 64])


# --- clip and bound ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_clipped_rows_keep_their_direction_and_lose_their_excess(dtype):
    rows = jnp.asarray(np.random.default_rng(1).normal(size=(300, 24)) * 1.5, dtype)
    clipped = common.clip_rows(rows, 7.0)
    assert clipped.dtype == jnp.float32
    rows, clipped = (np.asarray(x.astype(jnp.float32), np.float64) for x in (rows, clipped))
    norms = np.linalg.norm(rows, axis=-1, keepdims=True)
    assert 0.1 < np.mean(norms > 7.0) < 0.9
    np.testing.assert_allclose(clipped, rows * np.minimum(1.0, 7.0 / norms), rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
def test_rows_that_are_not_finite_become_zero(bad):
    """1e30 is finite but its square is not; zero is within every clip."""
    rows = jnp.asarray([[1.0, bad], [3.0, 4.0]], jnp.float32)
    f = lambda x: common.clip_rows(x, 1.0)  # noqa: E731
    out, pull = jax.vjp(f, rows)
    np.testing.assert_allclose(np.asarray(out), [[0, 0], [0.6, 0.8]], rtol=1e-6)
    gradient = np.asarray(pull(jnp.ones_like(rows))[0])
    assert np.all(np.isfinite(gradient))
    assert not gradient[0].any()


def test_zero_rows_and_rows_at_the_bound_have_finite_gradients():
    rows = jnp.asarray([[0.0, 0.0], [1.0, 0.0], [1e-30, 0.0]], jnp.float32)
    out, pull = jax.vjp(lambda x: common.clip_rows(x, 1.0), rows)
    assert bool((out == rows).all())
    assert bool((pull(jnp.ones_like(rows))[0] == 1.0).all())


def test_weights_lie_between_zero_and_one_whatever_the_logit():
    tiny = [np.nextafter(np.float32(1.5), np.float32(d)) for d in (-9, 9)]
    logits = jnp.asarray([-np.inf, -1e30, -100, 0, 1.5, *tiny, 1e30, np.inf, np.nan], jnp.float32)
    weights, pull = jax.vjp(lambda x: common.bounded_weights(x, 1.5, None), logits)
    expected = [0, 0, 0, np.exp(-1.5), 1, 1, 1, 1, 1, 0]
    assert weights.tolist() == pytest.approx(expected, abs=2e-7)
    assert float(weights.max()) <= 1.0
    # No gradient where the bound clamps, at it included, nor to anything that is no number.
    slope = pull(jnp.ones_like(logits))[0].tolist()
    assert slope == pytest.approx([0, 0, 0, np.exp(-1.5), 0, 1, 0, 0, 0, 0], abs=1e-6)
    hidden = common.bounded_weights(logits, 1.5, jnp.zeros(10, jnp.bool_))
    assert not np.asarray(hidden).any()


@pytest.mark.parametrize("bound", [-60.0, -1.0, 0.0, 3.3, 88.0, 1e4])
def test_random_weights_never_exceed_one(bound):
    near = bound + np.random.default_rng(2).normal(size=20000) * np.logspace(-7, 1, 20000)
    weights = common.bounded_weights(jnp.asarray(near, jnp.float32), bound, None)
    assert float(weights.max()) <= 1.0
    assert float(weights.min()) >= 0.0


# --- one poisoned record ----------------------------------------------------------------

NUM_KEYS, DEPTH, CLIP = 150, 4, 2.0


@functools.partial(jax.jit, static_argnames=("spec", "implementation"))
def _run(q, k, v, mask, *, spec, implementation):
    return attention(
        q, k, v, spec, key_words=WORDS, mask=mask, implementation=implementation
    ).astype(jnp.float32)


def _sums(implementation, dtype, q, k, v, mask):
    """N and L of the record mode: no noise, and a floor that is the divisor.

    L is read off from values that are all ones, whose norm is the clip exactly.
    """
    floor = 2.0**12
    quiet = _record_spec(
        value_clip=CLIP,
        numerator_std=0.0,
        denominator_std=0.0,
        denominator_floor=floor,
        grid=None,
    )
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    run = functools.partial(_run, spec=quiet, implementation=implementation)
    numerator = run(q, k, v, mask) * floor
    denominator = run(q, k, jnp.ones_like(v), mask)[..., 0] * floor
    return np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)


def _poisons():
    for where in ("key", "value"):
        for bad in (np.nan, np.inf, -np.inf, 3e38, -3e38, 6e4):
            for whole in (False, True):
                yield where, bad, whole


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_poisoned_record_moves_the_sums_no_more_than_any_other(implementation, dtype):
    """Against the call without that row: ‖ΔN‖ <= C and |ΔL| <= 1, for every poison."""
    random = np.random.default_rng(3)
    q = jnp.asarray(random.normal(size=(1, 4, 2, DEPTH)), jnp.float32)
    k, v = (jnp.asarray(random.normal(size=(1, NUM_KEYS, 1, DEPTH)), jnp.float32) for _ in range(2))
    at = 131
    without = jnp.ones((1, 1, 1, NUM_KEYS), jnp.bool_).at[..., at].set(False)
    everyone = jnp.ones_like(without)
    base = _sums(implementation, dtype, q, k, v, without)
    # Output and weights in a short format round by its own unit.
    unit = {"float32": 1e-6, "bfloat16": 2.0**-8, "float16": 2.0**-11}[dtype]
    slack = [2 * unit * np.abs(x).max() * DEPTH**0.5 for x in base]
    moved = 0.0
    for where, bad, whole in _poisons():
        row = np.full(DEPTH, bad, np.float32) if whole else np.asarray(k[0, at, 0])
        row = row.copy()
        row[0] = bad
        row = jnp.asarray(row)
        args = (k.at[0, at, 0].set(row), v) if where == "key" else (k, v.at[0, at, 0].set(row))
        n, total = _sums(implementation, dtype, q, *args, everyone)
        assert np.all(np.isfinite(n)), (where, bad)
        assert np.linalg.norm(n - base[0], axis=-1).max() <= CLIP * (1 + 2.0**-7) + slack[0]
        assert np.abs(total - base[1]).max() <= 1 + slack[1], (where, bad)
        moved = max(moved, np.abs(total - base[1]).max())
    assert moved > 0.9  # the check can see a change of L


def test_a_poisoned_sequence_moves_each_row_by_at_most_twice_the_clip(implementation):
    spec = AttentionSpec(mode="sequence", scale=0.5, value_clip=CLIP)  # no noise
    random = np.random.default_rng(4)
    q, k, v = (jnp.asarray(random.normal(size=(1, 40, 2, 8)), jnp.float32) for _ in range(3))
    mask = jnp.ones((1, 1, 1, 40), jnp.bool_)
    base = np.asarray(_run(q, k, v, mask, spec=spec, implementation=implementation))
    assert np.linalg.norm(base, axis=-1).max() <= CLIP * (1 + 1e-6)
    for bad in (np.nan, np.inf, -np.inf, 3e38):
        for i in range(3):
            for rows in (slice(None), slice(7, 8)):
                x = [q, k, v]
                x[i] = x[i].at[0, rows].set(bad)
                out = np.asarray(_run(*x, mask, spec=spec, implementation=implementation))
                assert np.all(np.isfinite(out)), (i, bad)
                assert np.linalg.norm(out, axis=-1).max() <= CLIP * (1 + 1e-6)
