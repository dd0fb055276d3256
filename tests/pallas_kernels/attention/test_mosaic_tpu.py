"""The TPU kernels in Pallas's interpreter: against the oracle, the reference and themselves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import AttentionSpec, attention, common, fused, mosaic_tpu, tile
from pallas_kernels.attention import mosaic_tpu_tiling as tiling_module

WORDS = jnp.arange(1, 9, dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)
SMALL = mosaic_tpu.Blocks(query=128, key=128)
MODES = ("exact", "record", "sequence")


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
    return AttentionSpec(mode=mode, scale=depth**-0.5, **{"rounds": 8, **noisy[mode], **options})


def make_inputs(shape, dtype="float32", seed=0):
    """Random q, k, v and cotangent for (B, T, S, N, K, H)."""
    batch, num_rows, num_keys, heads, kv_heads, depth = shape
    random = np.random.default_rng(seed)
    keys = (batch, num_keys, kv_heads, depth)
    rows = (batch, num_rows, heads, depth)
    return [
        jnp.asarray(random.normal(size=s).astype(np.float32)).astype(dtype)
        for s in (rows, keys, keys, rows)
    ]


def pack(spec, batch, **first):
    if not spec.is_noisy:
        return None
    return fused.pack_noise(WORDS, jnp.arange(batch, dtype=jnp.uint32), **first)


def run(inputs, spec, lengths=None, blocks=SMALL):
    """Output and gradients."""
    q, k, v, dout = inputs

    def f(q, k, v):
        return fused.attention(
            mosaic_tpu,
            q,
            k,
            v,
            spec,
            noise=pack(spec, q.shape[0]),
            lengths=lengths,
            blocks=(blocks, blocks),
            interpret=True,
        )

    out, pull = jax.vjp(jax.jit(f), q, k, v)
    return out, pull(dout)


def run_forward(inputs, spec, lengths=None, noise=None, blocks=SMALL):
    """The back end's own three results."""
    q, k, v = inputs[:3]
    if lengths is None:
        lengths = jnp.full((q.shape[0],), k.shape[1], jnp.int32)
    noise = pack(spec, q.shape[0]) if noise is None else noise
    scale = common.value_scale(v, spec) if spec.is_noisy else None
    return jax.jit(
        lambda *x: mosaic_tpu.forward(*x, noise, lengths, spec, blocks=blocks, interpret=True)
    )(q, k, v, scale)


def expect(plain, oracle, inputs, spec, lengths=None):
    """The oracle's result."""
    q, k, v, dout = (np.asarray(x.astype(jnp.float32), np.float64) for x in inputs)
    batch, num_rows, heads, depth = q.shape
    noise = None
    if spec.is_noisy:
        noise = plain.attention_noise(WORDS, batch, num_rows, heads, depth, spec.rounds)
    allowed = oracle.visible(
        (batch, heads, num_rows, k.shape[1]),
        is_causal=spec.is_causal,
        window=spec.window,
        lengths=lengths,
    )
    return oracle.attention(q, k, v, spec, allowed=allowed, dout=dout, noise=noise)


# (B, T, S, N, K, H), options, lengths. Blocks are 128: most shapes have several, and
# ragged ends.
FEATURES = {
    "one ragged tile": ((1, 5, 7, 1, 1, 64), {}, None),
    "causal, GQA, lengths": ((2, 150, 280, 4, 2, 64), {"is_causal": True}, (280, 131)),
    "window": ((1, 260, 700, 1, 1, 64), {"window": (100, 30)}, None),
    "rows beyond the window, no key": ((2, 400, 130, 2, 1, 64), {"window": (20, 5)}, (130, 0)),
    "causal window, two column tiles": (
        (1, 140, 140, 1, 1, 256),
        {"is_causal": True, "window": (3, 9)},
        None,
    ),
}


class TestAgainstTheOracle:
    @pytest.mark.parametrize(
        ("mode", "name"),
        [
            *(("record", name) for name in FEATURES),
            ("exact", "causal, GQA, lengths"),
            ("exact", "rows beyond the window, no key"),
            # Exact mode's loop with clipped values and record mode's noise.
            ("sequence", "causal, GQA, lengths"),
            ("sequence", "causal window, two column tiles"),
        ],
    )
    def test_features(self, plain, oracle, mode, name):
        shape, options, lengths = FEATURES[name]
        lengths = None if lengths is None else jnp.asarray(lengths, jnp.int32)
        spec, inputs = make_spec(mode, shape[-1], **options), make_inputs(shape)
        out, grads = run(inputs, spec, lengths)
        expected = expect(plain, oracle, inputs, spec, lengths)
        assert oracle.worst_row(out, expected.out) < 1e-5
        for x, got, want in zip("qkv", grads, expected.grads, strict=True):
            assert got.shape == want.shape
            assert oracle.relative(got, want) < 1e-5, f"d{x}"
        if mode == "record" and spec.is_causal:
            assert 0 < expected.clamped < 1
            assert 0 < expected.at_floor < 1

    @pytest.mark.parametrize("mode", ["exact", "record"])
    def test_bfloat16(self, plain, oracle, mode):
        shape = (1, 140, 600, 2, 1, 128)
        spec, inputs = make_spec(mode, 128), make_inputs(shape, "bfloat16")
        out, grads = run(inputs, spec, blocks=None)
        expected = expect(plain, oracle, inputs, spec)
        assert out.dtype == jnp.bfloat16
        assert oracle.relative(out.astype(jnp.float32), expected.out) < 1e-2
        for got, want in zip(grads, expected.grads, strict=True):
            assert got.dtype == jnp.bfloat16
            assert oracle.relative(got.astype(jnp.float32), want) < 1e-2

    def test_without_the_bound_on_logits_that_keep_it(self):
        inputs = make_inputs((1, 20, 140, 2, 1, 64))
        spec = make_spec("record", 64, logit_bound=6.0, denominator_floor=1e-9)
        spec = dataclasses.replace(spec, numerator_std=0.0, denominator_std=0.0)
        bounded, free = (
            run(inputs, dataclasses.replace(spec, bound_logits=is_bounded))
            for is_bounded in (True, False)
        )
        for one, other in zip(jax.tree.leaves(bounded), jax.tree.leaves(free), strict=True):
            assert np.any(one)
            np.testing.assert_array_equal(one, other)

    @pytest.mark.parametrize("rounds", [20, "threefry"])
    def test_same_noise_as_the_reference(self, rounds):
        """With the grid of a real release, which the noise's last digits decide."""
        q, k, v, _ = make_inputs((2, 9, 20, 2, 1, 20))
        spec = make_spec("record", 20, rounds=rounds, grid=10)
        got, want = (
            attention(q, k, v, spec, key_words=WORDS, implementation=name, interpret=interpret)
            for name, interpret in (("mosaic_tpu", True), ("reference", False))
        )
        # A value in the middle of a cell of the grid falls to the same side nearly always.
        assert np.mean(np.abs(got - want) < 1e-5) > 0.98
        assert np.max(np.abs(got - want)) < 3 * spec.spacing(0.7) / spec.denominator_floor


class TestResults:
    def test_record_statistic_is_the_denominator(self, plain):
        spec, inputs = make_spec("record", 64), make_inputs((1, 300, 200, 2, 1, 64))
        lengths = jnp.asarray([3], jnp.int32)  # few keys: part of the rows is at the floor
        _, stat, clean = run_forward(inputs, spec, lengths, blocks=mosaic_tpu.Blocks())
        q, k = (np.asarray(x, np.float64) for x in inputs[:2])
        x = np.einsum("btnh,bsh->bnts", q, k[:, :3, 0]) * spec.scale
        weights = np.exp(np.minimum(x, 0.8) - 0.8).sum(-1)
        g = plain.attention_noise(WORDS, 1, 300, 2, 64, 8)[1].swapaxes(1, 2)
        want = np.maximum(weights + 0.6 * g, 0.9)
        assert 0.05 < np.mean(want == 0.9) < 0.95
        np.testing.assert_allclose(stat, want, rtol=1e-5)
        assert clean is None

    @pytest.mark.parametrize("mode", ["exact", "sequence"])
    def test_log_sum_exp_and_clean_output(self, mode):
        spec, inputs = make_spec(mode, 64, is_causal=True), make_inputs((2, 140, 200, 2, 1, 64))
        lengths = jnp.asarray([200, 0], jnp.int32)
        out, stat, clean = run_forward(inputs, spec, lengths)
        q, k = (np.asarray(x, np.float64) for x in inputs[:2])
        x = np.einsum("tnh,sh->nts", q[0], k[0, :, 0]) * spec.scale
        x = np.where(np.arange(200) <= np.arange(140)[:, None], x, -np.inf)
        np.testing.assert_allclose(stat[0], np.log(np.exp(x).sum(-1)), rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(stat[1], np.float32(fused.NOTHING_SEEN))
        if mode == "exact":
            assert clean is None
            assert not np.any(out[1])
        else:
            assert not np.any(clean[1])
            np.testing.assert_allclose(np.std(out - clean), 0.7, rtol=0.03)
            silent = dataclasses.replace(spec, numerator_std=0.0)
            np.testing.assert_array_equal(run_forward(inputs, silent, lengths)[0], clean)

    def test_chunks_of_keys_add_exactly(self):
        """Record mode: chunks in another order give the same bits."""
        spec, (q, k, v, _) = make_spec("record", 64), make_inputs((1, 9, 2048, 1, 1, 64))
        spec = dataclasses.replace(spec, numerator_std=0.0)
        chunks = np.random.default_rng(1).permutation(4)
        order = (chunks[:, None] * 512 + np.arange(512)).reshape(-1)
        blocks = mosaic_tpu.Blocks()
        one = run_forward((q, k, v), spec, blocks=blocks)
        other = run_forward((q, k[:, order], v[:, order]), spec, blocks=blocks)
        np.testing.assert_array_equal(one[0], other[0])
        np.testing.assert_array_equal(one[1], other[1])

    def test_noise_of_a_shard(self):
        """Rows and heads computed apart, with their first counters, get the same noise."""
        spec = make_spec("sequence", 64)
        q, k, v, _ = make_inputs((2, 200, 30, 4, 2, 64))
        whole = run_forward((q, k, v), spec)[0]
        noise = pack(spec, 2, first_row=70, first_head=2)
        part = (q[:, 70:, 2:], k[:, :, 1:], v[:, :, 1:])
        got = run_forward(part, spec, noise=noise)[0]
        np.testing.assert_allclose(got, whole[:, 70:, 2:], rtol=1e-5, atol=1e-5)


class TestBadNumbers:
    @pytest.mark.parametrize("mode", ["record", "sequence"])
    def test_value_rows_that_are_not_finite_count_as_zero(self, mode):
        spec, inputs = make_spec(mode, 64), make_inputs((1, 9, 150, 1, 1, 64))
        q, k, v, dout = inputs
        bad = v.at[0, 3, 0, 5].set(jnp.nan).at[0, 140, 0, 0].set(jnp.inf)
        zero = v.at[0, 3].set(0.0).at[0, 140].set(0.0)
        got, want = (run((q, k, x, dout), spec) for x in (bad, zero))
        np.testing.assert_array_equal(got[0], want[0])
        for x, y in zip(got[1][:2], want[1][:2], strict=True):
            np.testing.assert_array_equal(x, y)
        assert np.all(np.isfinite(got[1][2]))
        assert not np.any(got[1][2][0, 3])

    @pytest.mark.parametrize("mode", ["record", "sequence"])
    def test_logits_that_are_not_finite(self, mode):
        """Like the reference: NaN has no weight and never spreads; +inf counts as U."""
        spec, (q, k, v, _) = make_spec(mode, 64), make_inputs((1, 9, 150, 1, 1, 64))
        large = 1e30
        bad = k.at[0, 2].set(jnp.nan).at[0, 3, 0, 0].set(jnp.inf)
        same = k.at[0, 2].set(q[0, 0] * 0.0).at[0, 3].set(0.0).at[0, 3, 0, 0].set(large)
        out, stat, _ = run_forward((q, bad, v), spec)
        expected = attention(q, bad, v, spec, key_words=WORDS, implementation="reference")
        np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)
        assert np.all(np.isfinite(stat))
        if mode == "record":
            # A logit of zero is below U; e^-U is what its weight has more than NaN's weight 0.
            more = run_forward((q, same, v), spec)[1]
            assert not np.any((stat == 0.9) | (more == 0.9))
            np.testing.assert_allclose(more - stat, np.full(stat.shape, np.exp(-0.8)), rtol=1e-4)

    def test_gradients_where_a_logit_is_nan(self):
        """It has no weight and no gradient, and does not reach the rows that pad the block."""
        spec = make_spec("record", 64)
        q, k, v, dout = make_inputs((1, 9, 150, 1, 1, 64))
        k = k.at[0, 2].set(jnp.nan)
        _, dk, dv = run((q, k, v, dout), spec)[1]

        def definition(k, v):
            return attention(q, k, v, spec, key_words=WORDS, implementation="reference")

        for got, want in zip((dk, dv), jax.vjp(definition, k, v)[1](dout), strict=True):
            assert not np.any(got[0, 2])
            assert np.all(np.any(got[0, 3:], axis=-1))
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)

    def test_tiles_that_no_row_sees_are_not_read(self):
        """NaN there would spread to every row: 0·NaN is NaN."""
        inputs = q, k, v, dout = make_inputs((1, 150, 700, 1, 1, 64))
        for options, hidden in (
            ({"is_causal": True}, slice(256, None)),
            ({"window": (20, 30)}, slice(384, None)),
        ):
            spec = make_spec("exact", 64, **options)
            bad = v.at[:, hidden].set(jnp.nan)
            out, grads = run((q, k, bad, dout), spec)
            want, want_grads = run(inputs, spec)
            np.testing.assert_array_equal(out, want)
            for got, x in zip(grads, want_grads, strict=True):
                np.testing.assert_array_equal(got, x)


class TestTiling:
    @pytest.mark.parametrize("window", [None, (0, 0), (100, 30), (600, 0), (0, 300)])
    @pytest.mark.parametrize("is_causal", [False, True])
    @pytest.mark.parametrize(("rows", "keys"), [(700, 700), (300, 1000), (1000, 200)])
    def test_spans_hold_exactly_the_tiles_that_are_seen(self, rows, keys, is_causal, window):
        spec = make_spec("exact", 64, is_causal=is_causal, window=window)
        blocks = mosaic_tpu.Blocks(query=256, key=128)
        tiling = tiling_module.Tiling.make(spec, rows, keys, blocks)
        for length in (keys, keys // 2, 0):
            t = np.arange(tiling.query_blocks * tiling.query)[:, None]
            s = np.arange(tiling.key_blocks * tiling.key)[None, :]
            seen = np.broadcast_to(tile.visible(spec, t, s, length), (t.size, s.size))
            seen = seen.reshape(tiling.query_blocks, tiling.query, tiling.key_blocks, -1)
            seen = seen.any(axis=(1, 3))
            from_rows, from_keys = np.zeros_like(seen), np.zeros_like(seen)
            for i in range(tiling.query_blocks):
                first, last = tiling.key_span(jnp.int32(i), jnp.int32(length))
                from_rows[i, int(first) : max(int(last), -1) + 1] = True
                assert int(last) - int(first) < tiling.key_steps()
            for j in range(tiling.key_blocks):
                first, last = tiling.query_span(jnp.int32(j), jnp.int32(length))
                from_keys[int(first) : max(int(last), -1) + 1, j] = True
                assert int(last) - int(first) < tiling.query_steps()
            np.testing.assert_array_equal(from_rows, seen)
            if not (is_causal and window):
                np.testing.assert_array_equal(from_keys, seen)
            assert np.all(from_keys >= seen)

    def test_cost_counts_the_tiles_that_run(self):
        query = jax.ShapeDtypeStruct((2, 3, 1024, 64), jnp.bfloat16)
        costs = []
        for options in ({}, {"is_causal": True}):
            spec = make_spec("exact", 64, **options)
            tiling = tiling_module.Tiling.make(spec, 1024, 1024, mosaic_tpu.Blocks())
            costs.append(tiling.cost(query, products=2, once=(query, query), moving=512))
        full, causal = costs
        assert full.flops == 4 * 2 * 3 * 1024 * 1024 * 64
        assert full.bytes_accessed == 2 * (2 * 2 * 3 * 1024 * 64) * (1 + 2)
        assert causal.flops == full.flops * 3 // 4
        seconds = [
            tiling_module.predicted_seconds([full], "v5e", dtype)
            for dtype in (jnp.bfloat16, jnp.float32)
        ]
        assert seconds[0] == max(full.flops / 197e12, full.bytes_accessed / 819e9)
        assert seconds[1] == 6 * full.flops / 197e12

    @pytest.mark.parametrize("sizes", [{"query": 100}, {"query": 0}, {"key": 384}, {"key": 1024}])
    def test_bad_block_sizes(self, sizes):
        name, size = next(iter(sizes.items()))
        with pytest.raises(ValueError, match=f"{name}={size}"):
            mosaic_tpu.Blocks(**sizes)


class TestUnsupported:
    def test_reasons(self):
        spec = make_spec("record", 64)
        array = jax.ShapeDtypeStruct((1, 8, 2, 64), jnp.bfloat16)
        assert mosaic_tpu.unsupported(spec, array, array, has_mask=False) is None
        assert "mask" in mosaic_tpu.unsupported(spec, array, array, has_mask=True)
        half = array.update(dtype=jnp.float16)
        assert "float16" in mosaic_tpu.unsupported(spec, half, half, has_mask=False)
        wide = array.update(shape=(1, 8, 2, 300))
        assert "300" in mosaic_tpu.unsupported(spec, wide, wide, has_mask=False)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("mode", MODES)
def test_lowers_for_tpu(mode, direction):
    """Every operation has a lowering for TPU. What Mosaic makes of it: test_compile_tpu.py."""
    spec = make_spec(mode, 128, is_causal=True, **({} if mode == "exact" else {"grid": 10}))
    rows = jax.ShapeDtypeStruct((1, 300, 4, 128), jnp.bfloat16)
    keys = jax.ShapeDtypeStruct((1, 600, 2, 128), jnp.bfloat16)
    noise = jax.ShapeDtypeStruct((1, 11), jnp.uint32) if spec.is_noisy else None

    def f(q, k, v, noise):
        return fused.attention(mosaic_tpu, q, k, v, spec, noise=noise, lengths=None)

    def gradients(q, k, v, noise):
        return jax.vjp(lambda *x: f(*x, noise), q, k, v)[1](q)

    run = jax.jit(f if direction == "forward" else gradients)
    text = jax.export.export(run, platforms=["tpu"])(rows, keys, keys, noise).mlir_module()
    assert text.count("tpu_custom_call") == (1 if direction == "forward" else 3)
