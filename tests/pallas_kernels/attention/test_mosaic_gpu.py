"""The Hopper kernels on a Hopper GPU, against the definition with the same noise.

Nothing but the definition itself is trusted here: the other back ends are compared with
the float64 oracle, and the definition with it in test_implementations.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import AttentionSpec, attention, fused, mosaic_gpu

WORDS = jnp.arange(1, 9, dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)
MODES = ("record", "sequence", "exact")


def make_spec(mode, depth, **options):
    """Numbers that send a part of the data through every clamp and clip."""
    noisy = {
        "exact": {},
        "record": {
            "value_clip": 0.9 * depth**0.5,
            "logit_bound": 1.5,
            "numerator_std": 0.7,
            "denominator_std": 0.6,
            "denominator_floor": 5.0,
        },
        "sequence": {"value_clip": 0.9 * depth**0.5, "numerator_std": 0.7},
    }
    return AttentionSpec(mode=mode, **{"scale": depth**-0.5, **noisy[mode], **options})


def with_a_clear_bound(spec, q, k):
    """``spec`` with a bound near its own that no logit comes close to.

    The gradient stops at the bound: whether a logit that lies on it up to rounding passes
    one, two correct implementations need not agree.
    """
    groups = q.shape[-2] // k.shape[-2]
    q, k = (np.asarray(x, np.float64) for x in (q, k))
    k = np.repeat(k, groups, axis=-2)
    logits = np.sort(spec.scale * np.einsum("...tnh,...snh->...nts", q, k), axis=None)
    near = logits[np.abs(logits - spec.logit_bound) < 0.02]
    near = np.array([spec.logit_bound - 0.02, *near, spec.logit_bound + 0.02])
    widest = np.argmax(np.diff(near))
    assert near[widest + 1] - near[widest] > 5e-6
    return dataclasses.replace(spec, logit_bound=float(near[widest : widest + 2].mean()))


def shapes_of(shape, dtype="bfloat16"):
    """q, k, v and the cotangent of (B, T, S, N, K, H)."""
    batch, num_rows, num_keys, heads, kv_heads, depth = shape
    rows = jax.ShapeDtypeStruct((batch, num_rows, heads, depth), dtype)
    keys = jax.ShapeDtypeStruct((batch, num_keys, kv_heads, depth), dtype)
    return rows, keys, keys, rows


def make_inputs(shape, dtype="bfloat16", seed=0):
    random = np.random.default_rng(seed)
    return [
        jnp.asarray(random.normal(size=x.shape).astype(np.float32)).astype(dtype)
        for x in shapes_of(shape, dtype)
    ]


def run(q, k, v, *, spec, implementation, lengths=None):
    words = WORDS if spec.is_noisy else None
    return attention(q, k, v, spec, key_words=words, lengths=lengths, implementation=implementation)


@functools.partial(jax.jit, static_argnames=("spec", "implementation", "wrap"))
def run_with_gradients(q, k, v, dout, lengths=None, *, spec, implementation, wrap=lambda f: f):
    f = functools.partial(run, spec=spec, implementation=implementation, lengths=lengths)
    out, pull = jax.vjp(wrap(f), q, k, v)
    return (out, *pull(dout))


def distance(got, expected):
    """The largest error, relative to the largest magnitude."""
    got, expected = (np.asarray(x.astype(jnp.float32), np.float64) for x in (got, expected))
    assert got.shape == expected.shape
    assert np.all(np.isfinite(expected))
    return np.abs(got - expected).max() / np.abs(expected).max()


def compare(inputs, spec, lengths=None, **options):
    lengths = None if lengths is None else jnp.asarray(lengths, jnp.int32)
    if spec.mode == "record" and spec.bound_logits:
        spec = with_a_clear_bound(spec, *inputs[:2])
    ours, definition = (
        run_with_gradients(*inputs, lengths, spec=spec, implementation=name, **options)
        for name in ("mosaic_gpu", "reference")
    )
    assert ours[0].dtype == inputs[0].dtype
    limits = {"out": 1e-2, "dq": 1.5e-2, "dk": 1.5e-2, "dv": 1.5e-2}
    for (name, limit), got, want in zip(limits.items(), ours, definition, strict=True):
        assert distance(got, want) < limit, name


# (B, T, S, N, K, H), options, lengths. The gradients of heads above 128 are Triton's.
FEATURES = {
    "two tiles of rows, ChaCha8": ((2, 256, 256, 2, 2, 128), {"rounds": 8}, None),
    "causal, ragged, GQA, lengths": ((1, 1500, 1300, 4, 2, 128), {"is_causal": True}, (777,)),
    "window, MQA, D=64": ((2, 300, 700, 4, 1, 64), {"window": (100, 30)}, None),
    "causal window, nobody seen": (
        (2, 400, 130, 2, 2, 64), {"is_causal": True, "window": (20, 5)}, (130, 0),
    ),
    "chunks of keys": ((1, 2048, 2048, 2, 1, 64), {}, None),
    "chunks of keys, causal, ragged": ((1, 2100, 2500, 2, 2, 128), {"is_causal": True}, (2411,)),
    "chunks of keys, window": ((1, 1000, 3000, 2, 2, 128), {"window": (1200, 1100)}, None),
    "padded head, causal, ChaCha12": (
        (1, 200, 300, 2, 1, 96), {"is_causal": True, "rounds": 12}, (150,),
    ),
    "one row, three keys": ((3, 1, 3, 2, 1, 128), {}, None),
    "Threefry": ((1, 130, 190, 2, 2, 128), {"rounds": "threefry"}, None),
    "D=256": ((1, 200, 300, 2, 2, 256), {}, None),
    "D=256, causal, chunks": ((1, 1100, 1100, 2, 1, 256), {"is_causal": True}, (1090,)),
    "padded to 256, window": ((2, 129, 400, 2, 1, 192), {"window": (50, 60)}, (400, 200)),
}  # fmt: skip


@pytest.mark.gpu
class TestOnHopper:
    @pytest.mark.parametrize("name", FEATURES)
    @pytest.mark.parametrize("mode", MODES)
    def test_features(self, mode, name):
        shape, options, lengths = FEATURES[name]
        compare(make_inputs(shape), make_spec(mode, shape[-1], **options), lengths)

    @pytest.mark.parametrize("name", FEATURES)
    @pytest.mark.parametrize("mode", MODES)
    def test_float16(self, mode, name):
        shape, options, lengths = FEATURES[name]
        compare(make_inputs(shape, "float16", 1), make_spec(mode, shape[-1], **options), lengths)

    @pytest.mark.parametrize(
        ("depth", "blocks"),
        [
            (64, {"keys": 64, "warpgroups": 3, "stages": 4}),
            (64, {"keys": 128, "stages": 3}),
            (128, {"keys": 64, "stages": 3}),
            (128, {"keys": 128, "warpgroups": 1}),
        ],
    )
    @pytest.mark.parametrize("mode", MODES)
    def test_block_sizes(self, mode, depth, blocks):
        """More jobs than there are multiprocessors, so that blocks do several."""
        q, k, v, _ = make_inputs((2, 1300, 1500, 16, 4, depth))
        spec = make_spec(mode, depth, is_causal=True)
        lengths = jnp.array([1500, 77], jnp.int32)
        ours = jax.jit(
            functools.partial(
                fused.attention, mosaic_gpu, spec=spec,
                noise=fused.pack_noise(WORDS, jnp.arange(2, dtype=jnp.uint32)) if spec.is_noisy
                else None,
                lengths=lengths, blocks=(mosaic_gpu.Blocks(**blocks), None),
            )
        )(q, k, v)  # fmt: skip
        call = jax.jit(run, static_argnames=("spec", "implementation"))
        definition = call(q, k, v, spec=spec, implementation="reference", lengths=lengths)
        assert distance(ours, definition) < 1e-2

    @pytest.mark.parametrize("depth", [64, 128, 256])
    @pytest.mark.parametrize("mode", ["sequence", "exact"])
    def test_maxima_that_rise_in_some_rows_only(self, mode, depth):
        """Sums are rescaled at every second tile, by some of a warpgroup's warps."""
        q, k, v, dout = make_inputs((1, 300, 1500, 2, 2, depth))
        steep = jnp.where(jnp.arange(300) % 48 < 20, depth**0.5, 0.0)
        q = q.at[..., 0].set(steep[None, :, None].astype(q.dtype))
        # Up to 0: large numbers in the keys that weigh most would magnify the rounding of dq.
        k = k.at[..., 0].set(jnp.linspace(-60.0, 0.0, 1500)[None, :, None].astype(k.dtype))
        compare([q, k, v, dout], make_spec(mode, depth))

    def test_little_noise_and_a_bound_that_holds(self):
        """Fine units of the fixed point; queries and keys whose logits need no ``min``."""
        q, k, v, dout = make_inputs((1, 2048, 2048, 2, 1, 64))
        q, k = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
        spec = make_spec(
            "record", 64, scale=1.4, bound_logits=False, numerator_std=1e-2, denominator_std=1e-2
        )
        compare([q, k, v, dout], spec)

    @pytest.mark.parametrize("mode", ["record", "sequence"])
    @pytest.mark.parametrize("depth", [64, 128])
    def test_value_rows_that_are_not_numbers_count_as_zero(self, mode, depth):
        q, k, v, dout = make_inputs((2, 300, 700, 4, 2, depth))
        v = v.at[0, 3, 0, 5].set(jnp.nan).at[0, 70, 1, 1].set(jnp.inf).at[1, 699].set(-jnp.inf)
        compare([q, k, v, dout], make_spec(mode, depth, is_causal=True))

    @pytest.mark.parametrize("bad", [0, 2047, 2048, 4999])
    def test_one_value_row_of_many_that_is_not_a_number(self, bad):
        """A call finds it wherever it is."""
        for num_keys in (2048, 5000):
            q, k, v, dout = make_inputs((1, 130, num_keys, 2, 2, 64))
            v = v.at[0, min(bad, num_keys - 1), 1, 7].set(jnp.nan)
            compare([q, k, v, dout], make_spec("record", 64))

    @pytest.mark.parametrize("depth", [64, 128, 256])
    @pytest.mark.parametrize("mode", ["record", "sequence"])
    def test_keys_and_values_that_are_not_numbers(self, mode, depth):
        """Forward: what the gradient of a logit that is NaN should be nobody says."""
        q, k, v, _ = make_inputs((1, 200, 1200, 2, 2, depth))
        k = k.at[0, 9, 0, 1].set(jnp.nan).at[0, 1111, 1, 1].set(jnp.nan)
        v = v.at[0, 3, 0, 5].set(jnp.nan).at[0, 1170, 1, 1].set(jnp.inf)
        spec = make_spec(mode, depth)
        call = jax.jit(run, static_argnames=("spec", "implementation"))
        ours, definition = (
            call(q, k, v, spec=spec, implementation=name) for name in ("mosaic_gpu", "reference")
        )
        assert distance(ours, definition) < 1e-2

    @pytest.mark.parametrize("mode", ["record", "sequence"])
    @pytest.mark.parametrize("first_row", [70, 128])
    def test_noise_follows_its_counters(self, mode, first_row):
        """Rows and heads computed by themselves get the noise that they have in the whole."""
        spec = make_spec(mode, 128, numerator_std=9.0, denominator_std=9.0)
        q, k, v, _ = make_inputs((2, 400, 200, 4, 4, 128))

        def call(q, k, v, **first):
            noise = fused.pack_noise(WORDS, jnp.arange(2, dtype=jnp.uint32), **first)
            return fused.attention(mosaic_gpu, q, k, v, spec, noise=noise, lengths=None)

        whole = jax.jit(call)(q, k, v)
        part = jax.jit(functools.partial(call, first_row=first_row, first_head=2))(
            q[:, first_row:, 2:], k[:, :, 2:], v[:, :, 2:]
        )
        np.testing.assert_array_equal(
            np.asarray(part, np.float32), np.asarray(whole[:, first_row:, 2:], np.float32)
        )

    @pytest.mark.parametrize("mode", MODES)
    def test_checkpoint(self, mode):
        inputs = make_inputs((2, 200, 333, 2, 1, 128))
        compare(inputs, make_spec(mode, 128, is_causal=True), wrap=jax.checkpoint)

    @pytest.mark.parametrize("mode", MODES)
    def test_vmap(self, mode):
        """Three lanes of two elements, as the definition counts them, gradients included."""
        lanes = [make_inputs((2, 140, 200, 2, 1, 64), seed=i) for i in range(3)]
        inputs = [jnp.stack(x) for x in zip(*lanes, strict=True)]
        compare(inputs, make_spec(mode, 64), wrap=jax.vmap)

    @pytest.mark.parametrize("mode", MODES)
    def test_two_calls_agree_to_the_last_bit(self, mode):
        inputs = make_inputs((2, 1100, 2300, 4, 2, 128))
        spec = make_spec(mode, 128, is_causal=True)
        call = functools.partial(run_with_gradients, spec=spec, implementation="mosaic_gpu")
        for first, second in zip(call(*inputs), call(*inputs), strict=True):
            bits = [np.asarray(x).view(np.uint16) for x in (first, second)]
            np.testing.assert_array_equal(*bits)

    def test_sequence_outputs_lie_on_the_public_grid(self):
        """A grid so coarse that bfloat16 holds its multiples exactly."""
        q, k, v, _ = make_inputs((2, 200, 300, 2, 1, 128))
        spec = make_spec("sequence", 128, grid=2)
        out = jax.jit(functools.partial(run, spec=spec, implementation="mosaic_gpu"))(q, k, v)
        steps = np.asarray(out, np.float64) / spec.spacing(spec.numerator_std)
        assert np.abs(steps).max() < 2**8
        np.testing.assert_array_equal(steps, np.round(steps))

    def test_another_key_or_element_gives_other_noise(self):
        spec = make_spec("sequence", 128)
        q, k, v, _ = make_inputs((2, 128, 256, 2, 2, 128))
        call = jax.jit(
            lambda words: attention(
                q, k, 0 * v, spec, key_words=words, implementation="mosaic_gpu"
            ).astype(jnp.float32)
        )
        first, second = (np.asarray(call(w)) for w in (WORDS, WORDS + jnp.uint32(1)))
        for a, b in ((first, second), (first[0], first[1]), (first[:, :, 0], first[:, :, 1])):
            assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.03
            assert a.std() == pytest.approx(0.7, rel=0.02)

    @pytest.mark.parametrize("mode", MODES)
    def test_no_memory_beyond_a_few_numbers_a_row(self, mode):
        batch, length, heads, depth = 2, 4096, 8, 128
        spec = make_spec(mode, depth, is_causal=True)
        shapes = shapes_of((batch, length, length, heads, heads, depth))
        compiled = run_with_gradients.lower(
            *shapes, spec=spec, implementation="mosaic_gpu"
        ).compile()
        kept = compiled.memory_analysis().temp_size_in_bytes
        assert kept <= 40 * batch * heads * length + 2**20


TRACED = (
    "D=256",
    "causal, ragged, GQA, lengths",
    "chunks of keys, window",
    "padded head, causal, ChaCha12",
)


@pytest.mark.parametrize("name", TRACED)
@pytest.mark.parametrize("mode", MODES)
def test_traces_without_a_gpu(mode, name, monkeypatch):
    """Every step up to the compiler, as if there were a Hopper."""
    monkeypatch.setattr("pallas_kernels.attention.api._wrong_device", lambda name: None)
    shape, options, lengths = FEATURES[name]
    spec = make_spec(mode, shape[-1], **options)
    shapes = shapes_of(shape)
    lengths = None if lengths is None else jax.ShapeDtypeStruct((shape[0],), jnp.int32)
    results = jax.eval_shape(
        functools.partial(run_with_gradients, spec=spec, implementation="mosaic_gpu"),
        *shapes,
        lengths,
    )
    for got, x in zip(results, (shapes[3], *shapes[:3]), strict=True):
        assert (got.shape, got.dtype) == (x.shape, x.dtype)
