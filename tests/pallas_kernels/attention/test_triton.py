"""The Triton kernels, interpreted on the CPU, against the float64 oracle and the reference."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import attention as api
from pallas_kernels.attention import AttentionSpec, common, fused, triton, triton_tile
from pallas_kernels.attention.triton_backward import BackwardBlocks

WORDS = jnp.arange(1, 9, dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)
MODES = ("exact", "record", "sequence")
# Largest relative error of a row of the output, and of each gradient as a whole.
TOLERANCE = {"float32": (1e-5, 1e-5), "bfloat16": (1e-2, 1e-2), "float16": (2e-3, 2e-3)}


def make_spec(mode, depth, **options):
    """Numbers that send a part of the data through every clamp, clip and floor."""
    noisy = {
        "exact": {},
        "record": {
            "value_clip": 0.95 * depth**0.5,
            "logit_bound": 0.8,
            "numerator_std": 0.7,
            "denominator_std": 0.6,
            "denominator_floor": 0.9,
            "grid": None,
        },
        "sequence": {"value_clip": 0.95 * depth**0.5, "numerator_std": 0.7, "grid": None},
    }
    return AttentionSpec(mode=mode, scale=depth**-0.5, **(noisy[mode] | options))


def make_inputs(shape, dtype="float32", seed=0):
    """Random q, k, v and cotangent for (B, T, S, N, K, H)."""
    batch, num_rows, num_keys, heads, kv_heads, depth = shape
    random = np.random.default_rng(seed)
    shapes = [(batch, num_rows, heads, depth)] + [(batch, num_keys, kv_heads, depth)] * 2
    shapes.append(shapes[0])
    return [jnp.asarray(random.normal(size=s).astype(np.float32)).astype(dtype) for s in shapes]


def noise_of(spec, batch, **first):
    if not spec.is_noisy:
        return None
    return fused.pack_noise(WORDS, jnp.arange(batch, dtype=jnp.uint32), **first)


def in_64(*arrays):
    return [np.asarray(x.astype(jnp.float32), np.float64) for x in arrays]


# Most of the time goes into compiling: the interpreter makes long programs.
FAST = {"xla_backend_optimization_level": 0}


@functools.partial(jax.jit, static_argnames=("spec", "blocks"), compiler_options=FAST)
def run(q, k, v, dout, lengths=None, *, spec, blocks=(None, None)):
    """The output, and the gradients for ``dout``."""
    noise = noise_of(spec, q.shape[0])

    def f(q, k, v):
        return fused.attention(
            triton, q, k, v, spec, noise=noise, lengths=lengths, blocks=blocks, interpret=True
        )

    out, pull = jax.vjp(f, q, k, v)
    return out, pull(dout)


@functools.partial(jax.jit, static_argnames="spec", compiler_options=FAST)
def forward(q, k, v, lengths, noise, *, spec):
    """What the back end itself returns: output, statistic, output before the noise."""
    scale = None
    if spec.is_noisy:
        scale = common.row_scales(v, spec.value_clip).swapaxes(1, 2)
    return triton.forward(q, k, v, scale, noise, lengths, spec, interpret=True)


OWN = (None, None)
SMALL = (triton.Blocks(rows=16, keys=16), BackwardBlocks(16, 16, 16, 16))
# (B, T, S, N, K, H), dtype, lengths, options, blocks.
CASES = {
    "ragged, GQA": ((2, 37, 70, 4, 2, 64), "float32", None, {}, SMALL),
    "causal, lengths": ((2, 70, 70, 2, 2, 64), "float32", (70, 19), {"is_causal": True}, SMALL),
    "more rows than keys": ((1, 50, 21, 2, 1, 64), "float32", None, {"is_causal": True}, SMALL),
    "window, two chunks": ((1, 40, 600, 1, 1, 128), "float32", None, {"window": (3, 540)}, OWN),
    "causal window, lengths": (
        *((2, 90, 90, 3, 1, 64), "float32", (90, 33)),
        *({"is_causal": True, "window": (20, 5)}, SMALL),
    ),
    "bfloat16, padded depth": ((2, 33, 70, 2, 1, 100), "bfloat16", None, {"rounds": 12}, OWN),
    "float16, two column tiles": ((1, 20, 40, 2, 1, 256), "float16", None, {"rounds": 8}, OWN),
    "nobody there": ((2, 18, 33, 1, 1, 64), "float32", (0, 33), {"rounds": 8}, SMALL),
}


# Record mode runs every case, the other two some of them.
PAIRS = [
    *(("record", name) for name in CASES),
    *(("exact", name) for name in list(CASES)[::3]),
    *(("sequence", name) for name in list(CASES)[1::3]),
]


@pytest.mark.parametrize(("mode", "name"), PAIRS)
def test_against_the_oracle(plain, oracle, mode, name):
    shape, dtype, lengths, options, blocks = CASES[name]
    batch, num_rows, num_keys, heads, _, depth = shape
    spec = make_spec(mode, depth, **options)
    inputs = q, k, v, dout = make_inputs(shape, dtype)
    lengths = None if lengths is None else jnp.asarray(lengths, jnp.int32)
    out, grads = run(*inputs, lengths, spec=spec, blocks=blocks)
    assert out.dtype == q.dtype

    noise = None
    if spec.is_noisy:
        noise = plain.attention_noise(WORDS, batch, num_rows, heads, depth, spec.rounds)
    allowed = oracle.visible(
        (batch, heads, num_rows, num_keys),
        is_causal=spec.is_causal,
        window=spec.window,
        lengths=lengths,
    )
    expected = oracle.attention(
        *in_64(q, k, v), spec, allowed=allowed, dout=in_64(dout)[0], noise=noise
    )
    limit, gradient_limit = TOLERANCE[dtype]
    assert oracle.worst_row(*in_64(out), expected.out) < limit
    for which, got, want in zip("qkv", grads, expected.grads, strict=True):
        assert got.shape == want.shape
        assert oracle.relative(*in_64(got), want) < gradient_limit, f"d{which}"
    if mode == "record":
        assert 0 < expected.clamped < 1
    if mode != "exact":
        assert 0 < expected.clipped < 1


@pytest.mark.parametrize("mode", MODES)
def test_the_same_release_as_the_reference(mode):
    """Grid included: noise and rounding agree, not only on average."""
    depth = 64
    spec = make_spec(mode, depth, grid=6) if mode != "exact" else make_spec(mode, depth)
    inputs = make_inputs((2, 20, 30, 2, 2, depth))
    out, _ = run(*inputs, spec=spec)
    words = WORDS if spec.is_noisy else None
    expected = api.attention(*inputs[:3], spec, key_words=words, implementation="reference")
    error = np.abs(np.asarray(out - expected))
    if mode == "sequence":
        # Both are multiples of the grid; a sum near the middle may fall on either side.
        steps = np.asarray(out) / spec.spacing(0.7)
        np.testing.assert_array_equal(steps, np.round(steps))
        assert np.mean(error > 1e-5) < 1e-3
    else:
        assert np.mean(error > 1e-5) < 2e-3


@pytest.mark.parametrize("mode", MODES)
def test_statistics(oracle, plain, mode):
    shape = (2, 20, 40, 2, 1, 64)
    spec = make_spec(mode, 64)
    q, k, v, _ = make_inputs(shape)
    lengths = jnp.asarray([40, 0], jnp.int32)
    out, stat, clean = forward(q, k, v, lengths, noise_of(spec, 2), spec=spec)
    q64, k64 = in_64(q, k)
    logits = np.einsum("btnh,bsh->bnts", q64, k64[:, :, 0]) / 8.0
    if mode == "record":
        g = np.moveaxis(plain.attention_noise(WORDS, 2, 20, 2, 64)[1], 2, 1)
        sums = np.exp(np.minimum(logits, 0.8) - 0.8).sum(-1)
        sums[1] = 0.0
        np.testing.assert_allclose(stat, np.maximum(sums + 0.6 * g, 0.9), rtol=1e-5)
        assert clean is None
        return
    np.testing.assert_allclose(stat[0], np.log(np.exp(logits[0]).sum(-1)), rtol=1e-5)
    assert np.all(np.asarray(stat[1]) == 1e30)
    if mode == "exact":
        assert clean is None
        assert not np.any(out[1])
        return
    assert not np.any(clean[1])
    g = plain.attention_noise(WORDS, 2, 20, 2, 64)[0]
    np.testing.assert_allclose(out - clean, 0.7 * g, atol=1e-5)


def test_chunk_sums_are_multiples_of_the_public_unit():
    """Without noise the denominators are the integer sums themselves."""
    num_keys = 1100
    spec = make_spec(
        "record", 64, logit_bound=9.0, denominator_std=0.0, numerator_std=0.0, denominator_floor=0.0
    )
    q, k, v, _ = make_inputs((1, 16, num_keys, 1, 1, 64))
    unit = common.fixed_point_unit(1.0, num_keys)
    lengths = jnp.asarray([num_keys], jnp.int32)
    _, stat, _ = forward(q, k, v, lengths, noise_of(spec, 1), spec=spec)
    units = np.asarray(stat, np.float64) / unit
    assert 0 < units.min() < units.max() < 2**24  # float32 still tells them apart
    np.testing.assert_array_equal(units, np.round(units))
    assert np.any(units % 2)
    logits = np.einsum("btnh,bsnh->bts", *in_64(q, k)) / 8.0
    # Three chunks, each rounded by at most half a unit.
    error = np.asarray(stat[0], np.float64) - np.exp(logits - 9.0).sum(-1)
    assert np.max(np.abs(error)) < 1.6 * unit


@pytest.mark.parametrize("mode", ["record", "sequence"])
def test_values_that_are_not_numbers_count_as_zero(mode):
    spec = make_spec(mode, 64, is_causal=True)
    q, k, v, dout = make_inputs((1, 20, 40, 2, 2, 64))
    rows, columns = [1, 7, 39], [0, 9, 63]
    bad = v.at[0, jnp.array(rows), 1, jnp.array(columns)].set(
        jnp.array([jnp.nan, jnp.inf, -jnp.inf], jnp.float32)
    )
    zeroed = v.at[0, jnp.array(rows), 1].set(0.0)
    out, grads = run(q, k, bad, dout, spec=spec)
    expected, expected_grads = run(q, k, zeroed, dout, spec=spec)
    np.testing.assert_array_equal(out, expected)
    for got, want in zip(grads[:2], expected_grads[:2], strict=True):
        np.testing.assert_array_equal(got, want)
    assert np.all(np.isfinite(grads[2]))


def test_logits_that_are_not_numbers_in_record_mode():
    """NaN gets weight 0, +inf weight 1, as in the reference."""
    spec = make_spec("record", 64)
    q, k, v, dout = make_inputs((1, 20, 40, 1, 1, 64))
    bad = k.at[0, 3].set(jnp.nan).at[0, 5].set(jnp.inf * jnp.sign(q[0, 0, 0]))
    out, _ = run(q, bad, v, dout, spec=spec)
    expected = api.attention(q, bad, v, spec, key_words=WORDS, implementation="reference")
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_logits_that_are_not_numbers_in_sequence_mode():
    spec = make_spec("sequence", 64)
    q, k, v, dout = make_inputs((1, 20, 40, 1, 1, 64))
    bad = k.at[0, 3].set(jnp.nan).at[0, 5].set(jnp.inf * jnp.sign(q[0, 0, 0]))
    out, _ = run(q, bad, v, dout, spec=spec)
    expected = api.attention(q, bad, v, spec, key_words=WORDS, implementation="reference")
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_what_no_row_sees_is_not_read(mode):
    """NaN beyond the length or the window changes nothing, forward or backward."""
    spec = make_spec(mode, 64, window=(70, 0))
    q, k, v, dout = make_inputs((1, 20, 96, 1, 1, 64))
    lengths = jnp.asarray([50], jnp.int32)
    blank, nan = (x.at[:, 48:].set(c) for x, c in ((k, 0.0), (k, jnp.nan)))
    blank_v, nan_v = (x.at[:, 50:].set(c) for x, c in ((v, 0.0), (v, jnp.nan)))
    out, grads = run(q, nan, nan_v, dout, lengths, spec=spec, blocks=SMALL)
    expected, expected_grads = run(q, blank, blank_v, dout, lengths, spec=spec, blocks=SMALL)
    np.testing.assert_array_equal(out, expected)
    for got, want in zip(grads, expected_grads, strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("mode", ["record", "sequence"])
def test_noise_follows_its_counters(mode):
    """Rows and heads computed by themselves get the noise that they have in the whole."""
    spec = make_spec(mode, 64)
    q, k, v, _ = make_inputs((2, 40, 20, 4, 4, 64))
    lengths = jnp.full((2,), 20, jnp.int32)
    whole = forward(q, k, v, lengths, noise_of(spec, 2), spec=spec)
    noise = noise_of(spec, 2, first_row=23, first_head=2)
    part = forward(q[:, 23:, 2:], k[:, :, 2:], v[:, :, 2:], lengths, noise, spec=spec)
    np.testing.assert_allclose(part[0], whole[0][:, 23:, 2:], rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(part[1], whole[1][:, 2:, 23:], rtol=2e-6)


@pytest.mark.parametrize("mode", ["exact", "record"])
def test_block_sizes_change_nothing_but_rounding(oracle, mode):
    spec = make_spec(mode, 64, is_causal=True, window=(600, 0))
    inputs = make_inputs((1, 70, 70, 2, 1, 64))
    sizes = [
        SMALL,
        (triton.Blocks(rows=128, keys=32), BackwardBlocks(32, 128, 64, 16)),
    ]
    (out, grads), *others = (run(*inputs, spec=spec, blocks=blocks) for blocks in sizes)
    for other, other_grads in others:
        for a, b in zip((out, *grads), (other, *other_grads), strict=True):
            assert oracle.relative(a, b) < 2e-6


def test_vmap_gives_every_lane_its_noise():
    spec = make_spec("record", 64)
    q, k, v, _ = (jnp.stack([x] * 3) for x in make_inputs((2, 8, 12, 1, 1, 64)))
    noise = noise_of(spec, 6).reshape(3, 2, 11)

    def call(q, k, v, noise):
        return fused.attention(triton, q, k, v, spec, noise=noise, lengths=None, interpret=True)

    flat = call(*(x.reshape(-1, *x.shape[2:]) for x in (q, k, v, noise)))
    lanes = jax.vmap(call)(q, k, v, noise)
    np.testing.assert_array_equal(lanes.reshape(flat.shape), flat)
    assert len({float(x) for x in lanes[:, :, 0, 0, 0].ravel()}) == 6


def test_reasons_for_what_it_cannot_do():
    spec = make_spec("exact", 64)
    shape = jax.ShapeDtypeStruct((1, 8, 2, 64), jnp.bfloat16)
    assert triton.unsupported(spec, shape, shape, has_mask=False) is None
    assert "mask" in triton.unsupported(spec, shape, shape, has_mask=True)
    wide = jax.ShapeDtypeStruct((1, 8, 2, 300), jnp.bfloat16)
    assert "300" in triton.unsupported(spec, wide, wide, has_mask=False)
    double = jax.ShapeDtypeStruct((1, 8, 2, 64), jnp.float64)
    assert "float64" in triton.unsupported(spec, double, double, has_mask=False)


@pytest.mark.parametrize("field", ["rows", "keys", "warps", "stages"])
@pytest.mark.parametrize("size", [0, 48, 1024])
def test_block_sizes_are_checked(field, size):
    with pytest.raises(ValueError, match=f"{field}={size}"):
        dataclasses.replace(triton.Blocks(), **{field: size})


def test_rounding_is_numpys():
    x = np.array([0.0, 0.5, 1.5, 2.5, -0.5, -1.5, 0.49999997, 8388607.5, 8388609.0, 3e9, -3e38])
    x = np.concatenate([x, np.random.default_rng(0).normal(0.0, 1e4, 1000)]).astype(np.float32)
    # Compiled: a simplification of the compiler may undo a way of rounding.
    rounded = jax.jit(triton_tile.round_half_even)(jnp.asarray(x))
    np.testing.assert_array_equal(rounded, np.round(x))
