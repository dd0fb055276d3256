"""Record mode's sums as integers: every back end, their parts, their release."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import AttentionSpec, chunked, common, mosaic_gpu, mosaic_tpu, triton

SHAPE = (2, 70, 1024, 4, 2, 64)


def make_spec(**options):
    return AttentionSpec(
        mode="record", scale=0.125, value_clip=6.0, logit_bound=1.0, numerator_std=3.0,
        denominator_std=2.0, denominator_floor=1.0, **options,
    )  # fmt: skip


def arrays(shape=SHAPE, dtype=jnp.float32):
    batch, num_rows, num_keys, heads, kv_heads, depth = shape
    rng = np.random.default_rng(0)
    q, k, v = (
        rng.normal(size=s)
        for s in (
            (batch, num_rows, heads, depth),
            (batch, num_keys, kv_heads, depth),
            (batch, num_keys, kv_heads, depth),
        )
    )
    v[0, 3] = np.nan
    return tuple(jnp.asarray(x, dtype) for x in (q, k, v))


def oracle(q, k, v, lengths, spec):
    """N and L in float64."""
    q, k, v = (np.asarray(x.astype(jnp.float32), np.float64) for x in (q, k, v))
    groups = q.shape[2] // k.shape[2]
    k, v = (np.repeat(x, groups, axis=2) for x in (k, v))
    norm = np.linalg.norm(v, axis=-1, keepdims=True)
    v = np.nan_to_num(v * np.minimum(1.0, spec.value_clip / norm))
    logits = spec.scale * np.einsum("btnh,bsnh->bnts", q, k)
    w = np.exp(np.minimum(logits, spec.logit_bound) - spec.logit_bound)
    column = np.arange(k.shape[1])
    w = w * (column < np.asarray(lengths)[:, None, None, None])
    if spec.is_causal:
        w = w * (column <= np.arange(q.shape[1])[:, None])
    return np.einsum("bnts,bsnh->btnh", w, v), w.sum(-1)


def sums(backend, q, k, v, lengths, spec, units, **options):
    scale = backend.value_scale(v, spec)
    return backend.sums(q, k, v, scale, lengths, spec, units, **options)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    "backend", [chunked, pytest.param(triton, marks=pytest.mark.slow), mosaic_tpu]
)
def test_sums_are_those_of_the_definition(backend, is_causal):
    spec, lengths = make_spec(is_causal=is_causal), jnp.array([1024, 700], jnp.int32)
    q, k, v = arrays()
    units = common.sum_units(spec, 1024)
    interpret = {} if backend is chunked else {"interpret": True}
    found = sums(backend, q, k, v, lengths, spec, units, **interpret)
    for ints, unit, want in zip(found, units, oracle(q, k, v, lengths, spec), strict=True):
        assert ints.dtype == jnp.int32
        # Half a unit for each of two chunks, and float32's rounding of up to 512 terms.
        assert np.abs(np.asarray(ints) * unit - want).max() <= unit + 1e-6 * np.abs(want).max()


def test_parts_add_exactly():
    spec, lengths = make_spec(), jnp.array([4096], jnp.int32)
    q, k, v = arrays((1, 40, 4096, 2, 1, 32))
    units = common.sum_units(spec, 4096)
    run = jax.jit(lambda k, v, lengths: sums(chunked, q, k, v, lengths, spec, units))
    whole = run(k, v, lengths)
    for count in (2, 8):
        size = 4096 // count
        parts = [
            run(k[:, i : i + size], v[:, i : i + size], jnp.clip(lengths - i, 0, size))
            for i in range(0, 4096, size)
        ]
        for total, *ints in zip(whole, *parts, strict=True):
            np.testing.assert_array_equal(total, sum(map(np.asarray, ints)))


def test_the_release_of_sums_is_that_of_floats():
    """The same noise, up to rounding to the units; and N + noise lies on the public grid."""
    spec = make_spec()
    units = common.sum_units(spec, 1024)
    q, k, v = arrays()
    lengths = jnp.array([1024, 700], jnp.int32)
    numerator, denominator = sums(chunked, q, k, v, lengths, spec, units)
    denominator = denominator.swapaxes(1, 2)
    words = jnp.arange(8, dtype=jnp.uint32)
    noise = common.Noise(words, jnp.arange(2, dtype=jnp.uint32), jnp.uint32(3))
    rows = jnp.arange(5, 75, dtype=jnp.uint32)
    out, stat = common.release_sums(spec, units, numerator, denominator, noise, rows)
    floats = [
        x.astype(jnp.float32) * jnp.float32(u)
        for x, u in zip((numerator, denominator), units, strict=True)
    ]
    want = common.release_record(spec, *floats, *noise[:2], rows, noise.first_head)
    step = spec.spacing(spec.numerator_std) + spec.spacing(spec.denominator_std)
    bound = 2 * step * (1 + np.abs(np.asarray(want))) / np.asarray(stat)[..., None]
    assert (np.abs(np.asarray(out - want)) <= bound).all()
    noisy = np.asarray(out, np.float64) * np.asarray(stat, np.float64)[..., None]
    cells = noisy / spec.spacing(spec.numerator_std)
    assert np.abs(cells - np.round(cells)).max() < 0.02  # float32 rounds the quotient


@pytest.mark.gpu
@pytest.mark.parametrize("depth", [64, 128, 256])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("backend", [mosaic_gpu, triton])
def test_sums_on_a_gpu(backend, is_causal, depth):
    """Ragged, several chunks, grouped queries; twice the same integers."""
    spec, lengths = make_spec(is_causal=is_causal), jnp.array([3000, 2100], jnp.int32)
    q, k, v = arrays((2, 300, 3000, 4, 2, depth), jnp.bfloat16)
    units = common.sum_units(spec, 3000)
    if backend.unsupported(spec, q, k, has_mask=False):
        pytest.fail("these kernels must be able to do this call")
    run = jax.jit(lambda q, k, v: sums(backend, q, k, v, lengths, spec, units))
    found, again = run(q, k, v), run(q, k, v)
    numerator, denominator = oracle(q, k, v, lengths, spec)
    # Weights and values are bfloat16: 2⁻⁸ of the sum of weights, each.
    errors = np.abs(np.asarray(found[0]) * units.numerator - numerator)
    scale = spec.value_clip * denominator.swapaxes(1, 2)[..., None]
    assert (errors <= 2.0**-7 * scale + 8 * units.numerator).all()
    errors = np.abs(np.asarray(found[1]) * units.denominator - denominator)
    assert (errors <= 1e-3 * denominator + 8 * units.denominator).all()
    for first, second in zip(found, again, strict=True):
        np.testing.assert_array_equal(first, second)
