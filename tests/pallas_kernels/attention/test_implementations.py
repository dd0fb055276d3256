"""What runs on any machine against one float64 oracle, forward and backward, noise included.

The kernels, which need their own shapes and devices, have files of their own.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.attention import AttentionSpec, attention

WORDS = jnp.arange(1, 9, dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)
# Largest relative error of a row of the output, and of each gradient as a whole. float32
# means without the grid. A short format rounds inputs of the products and the output.
TOLERANCE = {"float32": (1e-5, 1e-5), "bfloat16": (2e-2, 1e-2), "float16": (4e-3, 2e-3)}
MODES = ("exact", "record", "sequence")


def make_spec(mode, depth, **options):
    """Numbers that send a part of the data through every clamp, clip and floor."""
    noisy = {
        "exact": {},
        "record": {
            "value_clip": 0.9 * depth**0.5,
            "logit_bound": 0.8,
            "numerator_std": 0.7,
            "denominator_std": 0.6,
            "denominator_floor": 0.9,
            "grid": None,
        },
        "sequence": {"value_clip": 0.9 * depth**0.5, "numerator_std": 0.7, "grid": None},
    }
    return AttentionSpec(mode=mode, scale=depth**-0.5, **noisy[mode], **options)


def make_inputs(shape, dtype="float32", seed=0):
    """Random q, k, v and cotangent for (B, T, S, N, K, H)."""
    batch, num_rows, num_keys, heads, kv_heads, depth = shape
    random = np.random.default_rng(seed)
    shapes = [(batch, num_rows, heads, depth)] + [(batch, num_keys, kv_heads, depth)] * 2
    shapes.append(shapes[0])
    return [jnp.asarray(random.normal(size=s).astype(np.float32)).astype(dtype) for s in shapes]


@functools.partial(jax.jit, static_argnames=("spec", "implementation"))
def run(q, k, v, dout, words, lengths=None, mask=None, *, spec, implementation):
    """The output, and the gradients for ``dout``."""

    def f(q, k, v):
        return attention(
            q,
            k,
            v,
            spec,
            key_words=words if spec.is_noisy else None,
            lengths=lengths,
            mask=mask,
            implementation=implementation,
        )

    out, pull = jax.vjp(f, q, k, v)
    return out, pull(dout)


def compare(plain, oracle, implementation, spec, inputs, lengths=None, mask=None):
    """Runs both, asserts that they agree, and returns the oracle's result."""
    q, k, v, dout = inputs
    out, grads = run(*inputs, WORDS, lengths, mask, spec=spec, implementation=implementation)
    assert out.dtype == q.dtype
    assert out.shape == q.shape
    batch, num_rows, heads, depth = q.shape
    noise = None
    if spec.is_noisy:
        noise = plain.attention_noise(WORDS, batch, num_rows, heads, depth, spec.rounds)
    allowed = oracle.visible(
        (batch, heads, num_rows, k.shape[1]),
        is_causal=spec.is_causal,
        window=spec.window,
        lengths=lengths,
        mask=mask,
    )
    in_64 = [np.asarray(x.astype(jnp.float32), np.float64) for x in (q, k, v)]
    expected = oracle.attention(
        *in_64, spec, allowed=allowed, dout=np.asarray(dout.astype(jnp.float32)), noise=noise
    )
    limit, gradient_limit = TOLERANCE[str(q.dtype)]
    assert oracle.worst_row(out.astype(jnp.float32), expected.out) < limit
    for name, got, want in zip("qkv", grads, expected.grads, strict=True):
        assert got.shape == want.shape
        assert oracle.relative(got.astype(jnp.float32), want) < gradient_limit, f"d{name}"
    return expected


# (B, T, S, N, K, H) and options. Lengths and masks come in through the arrays.
FEATURES = {
    "plain": ((2, 5, 7, 2, 2, 8), {}, None),
    "causal, GQA, lengths": ((3, 9, 9, 4, 2, 20), {"is_causal": True}, (9, 0, 4)),
    "cross, MQA, window pair, blocks of keys": ((2, 6, 150, 3, 1, 5), {"window": (2, 140)}, None),
    "two column tiles, one key": ((1, 3, 1, 1, 1, 130), {}, None),
    "chunks of rows, causal window": (
        (1, 300, 300, 2, 1, 8),
        {"is_causal": True, "window": (40, 3), "rounds": 8},
        (290,),
    ),
}


class TestImplementations:
    @pytest.mark.parametrize("name", FEATURES)
    @pytest.mark.parametrize("mode", MODES)
    def test_features(self, plain, oracle, implementation, mode, name):
        shape, options, lengths = FEATURES[name]
        spec = make_spec(mode, shape[-1], **options)
        lengths = None if lengths is None else jnp.asarray(lengths, jnp.int32)
        result = compare(plain, oracle, implementation, spec, make_inputs(shape), lengths)
        if mode != "exact" and shape[2] > 1:
            assert 0 < result.clipped < 1
        if mode == "record" and shape[2] > 1:
            assert 0 < result.clamped < 1
        if mode == "record" and spec.is_causal:  # the first rows see few keys
            assert 0 < result.at_floor < 1

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    @pytest.mark.parametrize("mode", MODES)
    def test_short_formats(self, plain, oracle, implementation, mode, dtype):
        shape = (2, 6, 40, 2, 1, 16)
        mask = jnp.asarray(np.random.default_rng(1).random((2, 1, 6, 40)) < 0.8)
        spec = make_spec(mode, 16)
        compare(plain, oracle, implementation, spec, make_inputs(shape, dtype), None, mask)

    @pytest.mark.parametrize("num_rows", [4, 260])
    def test_masks_of_every_broadcastable_shape(self, oracle, implementation, num_rows):
        """One compiled function for all sixteen; who sees whom is the same in every mode."""
        shape = (2, num_rows, 5, 4, 2, 3)
        inputs = q, k, v, dout = make_inputs(shape)
        spec = make_spec("exact", 3)
        full = (2, 4, num_rows, 5)
        random = np.random.default_rng(2)
        sizes = list(itertools.product(*((1, n) for n in full)))
        masks = [jnp.asarray(random.random(s) < 0.7) for s in sizes]

        @jax.jit
        def outputs(q, k, v, masks):
            return [attention(q, k, v, spec, mask=m, implementation=implementation) for m in masks]

        for size, mask, out in zip(sizes, masks, outputs(q, k, v, masks), strict=True):
            allowed = oracle.visible(full, mask=mask)
            expected = oracle.attention(*inputs[:3], spec, allowed=allowed, dout=dout)
            assert oracle.worst_row(out, expected.out) < 1e-5, size

    @pytest.mark.parametrize("mode", ["record", "sequence"])
    def test_masks_lengths_and_noise_together_in_chunks(self, plain, oracle, implementation, mode):
        shape = (2, 270, 9, 2, 2, 4)
        mask = np.random.default_rng(3).random((1, 2, 270, 9)) < 0.6
        mask[:, :, 5] = False  # a row that sees nothing
        lengths = jnp.asarray([9, 6], jnp.int32)
        spec = make_spec(mode, 4)
        compare(plain, oracle, implementation, spec, make_inputs(shape), lengths, jnp.asarray(mask))

    @settings(max_examples=8, deadline=None, derandomize=True, database=None)
    @given(data=st.data())
    def test_random_shapes_and_options(self, plain, oracle, implementation, data):
        draw = data.draw
        kv_heads, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
        batch, num_rows = draw(st.integers(1, 3)), draw(st.integers(1, 12))
        num_keys, depth = draw(st.integers(1, 140)), draw(st.integers(1, 33))
        shape = (batch, num_rows, num_keys, kv_heads * groups, kv_heads, depth)
        small = st.integers(0, 12)
        mode = draw(st.sampled_from(MODES))
        spec = make_spec(
            mode,
            depth,
            is_causal=draw(st.booleans()),
            window=draw(st.none() | st.tuples(small, small)),
        )
        spec = dataclasses.replace(spec, scale=draw(st.sampled_from([0.1, -0.3, 1.0])))
        lengths = draw(st.none() | st.lists(st.integers(0, num_keys), min_size=3, max_size=3))
        if lengths is not None:
            lengths = jnp.asarray(lengths[:batch], jnp.int32)
        inputs = make_inputs(shape, seed=draw(st.integers(0, 99)))
        compare(plain, oracle, implementation, spec, inputs, lengths)

    def test_random_signs_of_the_denominator(self, plain, oracle, implementation):
        """Few visible keys and much noise: half of the noisy sums of weights are negative."""
        shape = (2, 40, 3, 2, 2, 4)
        spec = dataclasses.replace(
            make_spec("record", 4), denominator_std=5.0, denominator_floor=0.25
        )
        lengths = jnp.asarray([3, 0], jnp.int32)
        inputs = make_inputs(shape)
        result = compare(plain, oracle, implementation, spec, inputs, lengths)
        assert 0.3 < result.at_floor < 0.7
