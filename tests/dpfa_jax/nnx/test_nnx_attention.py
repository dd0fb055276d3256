import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dpfa_jax import AttentionPrivacy
from dpfa_jax.keys import reproducible_key
from dpfa_jax.linen import DPMultiHeadDotProductAttention
from dpfa_jax.nnx import DPMultiHeadAttention

SEQUENCE = AttentionPrivacy(
    unit="sequence", noise_multiplier=0.5, value_clip=2.0, adjacency="replace_one"
)
RECORD = AttentionPrivacy(
    unit="record", noise_multiplier=0.5, value_clip=2.0, adjacency="add_remove", logit_bound=1.0
)


def normal(seed, shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


X = normal(0, (3, 6, 8))
Y = normal(1, (3, 5, 4))


def make(seed=1, *, privacy=SEQUENCE, **kwargs):
    """A layer; ``seed=None`` makes it without a noise key."""
    streams = {} if seed is None else {"privacy": reproducible_key(seed)}
    rngs = nnx.Rngs(params=0, **streams)
    return DPMultiHeadAttention(2, 8, privacy=privacy, decode=False, rngs=rngs, **kwargs)


# What comes out is the noise: the values are zero.
pure_noise = functools.partial(
    make, kernel_init=nn.initializers.zeros, out_kernel_init=nn.initializers.lecun_normal()
)


@nnx.jit
def call(layer, *inputs, rngs=None):
    return layer(*inputs, rngs=rngs)


def distinct(*outputs):
    return all(not (a == b).any() for i, a in enumerate(outputs) for b in outputs[:i])


# --- without privacy ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "attributes", "dtype"),
    [
        ((X,), {}, jnp.float32),
        ((X,), {"dtype": jnp.bfloat16}, jnp.bfloat16),
        ((X,), {"normalize_qk": True, "qkv_features": 16, "out_features": 3}, jnp.float32),
        ((X, Y), {"in_kv_features": 4, "num_kv_heads": 1}, jnp.float32),
        ((X, Y, Y + 1.0), {"in_kv_features": 4, "use_bias": False}, jnp.float32),
    ],
    ids=["float32", "bfloat16", "normalize_qk", "cross, grouped", "three inputs"],
)
@pytest.mark.parametrize("is_causal", [False, True])
def test_exact_has_flax_parameters_and_output(inputs, attributes, dtype, is_causal):
    mask = np.random.default_rng(2).random((3, 2, 6, inputs[-1].shape[1])) < 0.7
    mask[..., 0] = True
    ours, flax = (
        kind(2, 8, decode=False, rngs=nnx.Rngs(0), **attributes)
        for kind in (DPMultiHeadAttention, nnx.MultiHeadAttention)
    )
    states = [nnx.to_pure_dict(nnx.state(layer)) for layer in (ours, flax)]
    jax.tree.map(np.testing.assert_array_equal, *states)

    run = nnx.jit(lambda layer, *inputs: layer(*inputs, mask=mask, is_causal=is_causal))
    out = run(ours, *inputs)
    with jax.numpy_dtype_promotion("standard"):  # Flax's own needs it in bfloat16.
        wanted = run(flax, *inputs)
    assert out.dtype == wanted.dtype == dtype
    tolerance = 2e-2 if dtype == jnp.bfloat16 else 2e-6
    np.testing.assert_allclose(
        out.astype(jnp.float32), wanted.astype(jnp.float32), atol=tolerance, rtol=tolerance
    )


def test_exact_decodes_like_flax():
    def decode(kind):
        layer = kind(2, 8, decode=True, rngs=nnx.Rngs(0))
        layer.init_cache(X.shape)
        step = nnx.jit(lambda layer, x: layer(x, is_causal=True))
        return jnp.stack([step(layer, X[:, t : t + 1]) for t in range(3)])

    np.testing.assert_allclose(
        decode(DPMultiHeadAttention), decode(nnx.MultiHeadAttention), atol=2e-6
    )


def test_exact_needs_no_key_and_takes_the_rngs_of_a_private_model():
    layer = make(None, privacy=None)
    rngs = nnx.Rngs(privacy=reproducible_key(0))
    np.testing.assert_array_equal(call(layer, X), call(layer, X, rngs=rngs))
    assert int(rngs.privacy.count[...]) == 0


@pytest.mark.parametrize("options", [{}, {"normalize_qk": True}], ids=str)
def test_equal_weights_give_the_output_of_the_linen_layer(options):
    linen = DPMultiHeadDotProductAttention(num_heads=2, **options)
    params = jax.jit(linen.init)(jax.random.key(5), X)["params"]
    layer = make(None, privacy=None, **options)
    nnx.update(layer, nnx.State(params))
    np.testing.assert_allclose(
        call(layer, X), jax.jit(linen.apply)({"params": params}, X), atol=2e-6
    )


# --- noise ----------------------------------------------------------------------------------


def identity(key, shape, dtype=jnp.float32, out_sharding=None):
    """Flax's flat [D, N·H] kernel."""
    return jnp.eye(shape[0], shape[1], dtype=dtype)


def test_noise_has_the_standard_deviation_of_the_spec():
    x = normal(0, (16, 64, 8)) / 10.0  # no value is clipped
    noise = call(make(kernel_init=identity), x) - call(
        make(None, privacy=None, kernel_init=identity), x
    )
    std = SEQUENCE.spec(scale=4**-0.5, head_dim=4, num_keys=64, dtype="float32").numerator_std
    assert np.asarray(noise).std() == pytest.approx(std, rel=0.04)  # 8,192 values


def test_calls_layers_and_keys_have_their_own_noise():
    rngs = nnx.Rngs(params=0, privacy=reproducible_key(1))
    a, b = (
        DPMultiHeadAttention(
            2,
            8,
            privacy=SEQUENCE,
            decode=False,
            rngs=rngs,
            kernel_init=nn.initializers.zeros,
            out_kernel_init=nn.initializers.lecun_normal(),
        )
        for _ in range(2)
    )
    b.out.kernel[...] = a.out.kernel[...]
    # The first two calls run one compiled function twice; then two calls within another.
    outputs = [call(a, X), call(a, X), call(b, X)]
    twice = nnx.jit(lambda layer, x: (layer(x), layer(x)))
    outputs += [*twice(a, X)]
    assert distinct(*outputs)
    np.testing.assert_array_equal(call(pure_noise(1), X), call(pure_noise(1), X))
    assert distinct(call(pure_noise(1), X), call(pure_noise(2), X))


def test_rngs_at_the_call_come_first():
    stored, bare = pure_noise(1), pure_noise(None)
    given = [call(layer, X, rngs=nnx.Rngs(privacy=reproducible_key(2))) for layer in (stored, bare)]
    np.testing.assert_array_equal(given[0], given[1])
    stream = call(bare, X, rngs=nnx.Rngs(privacy=reproducible_key(2)).privacy)
    np.testing.assert_array_equal(stream, given[0])
    own = call(stored, X, rngs=nnx.Rngs(dropout=0))
    assert distinct(own, given[0])
    np.testing.assert_array_equal(own, call(pure_noise(1), X))


def test_record_mode_across_inputs():
    layer = make(privacy=RECORD, in_kv_features=4)
    assert distinct(call(layer, X, Y), call(layer, X, Y))


def test_gradient_and_remat():
    def loss(layer, x):
        return (layer(x) ** 2).sum()

    def remat_loss(layer, x):
        return (nnx.remat(lambda layer, x: layer(x))(layer, x) ** 2).sum()

    plain, remat = (nnx.jit(nnx.grad(f))(make(), X) for f in (loss, remat_loss))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), plain, remat)
    for name in ("query", "key", "value", "out"):
        assert float(jnp.abs(plain[name]["kernel"][...]).max()) > 0.1, name


def test_scan_over_layers_has_its_own_noise_in_each():
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def stack(rngs):
        return DPMultiHeadAttention(
            2,
            8,
            privacy=SEQUENCE,
            decode=False,
            rngs=rngs,
            kernel_init=nn.initializers.zeros,
            out_kernel_init=nn.initializers.ones,
        )

    @nnx.jit
    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=(nnx.Carry, 0))
    def run(layer, x):
        noise = layer(x)
        return x, noise

    layers = stack(nnx.Rngs(params=0, privacy=reproducible_key(1)))
    _, noise = run(layers, X)
    assert distinct(*noise)


def test_vmap_over_the_batch_has_its_own_noise_in_each_lane():
    graph, state = nnx.split(pure_noise(None))

    @jax.jit
    def run(key, x):
        def one(x):
            return nnx.merge(graph, state)(x, rngs=nnx.Rngs(privacy=key))

        return jax.vmap(one)(x)

    assert distinct(*run(reproducible_key(1), X))


# --- keys -----------------------------------------------------------------------------------


def test_keep_rngs_false_stores_no_key():
    layer = make(1, keep_rngs=False)
    assert not jax.tree.leaves(nnx.state(layer, nnx.RngState))
    with pytest.raises(ValueError, match="no stream 'privacy'"):
        layer(X)
    assert jax.tree.leaves(nnx.state(make(1), nnx.RngState))


def test_missing_short_and_reused_keys_raise():
    with pytest.raises(ValueError, match="no stream 'privacy'"):
        make(None)(X)
    with pytest.raises(ValueError, match="no stream 'privacy'"):
        make(None)(X, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="too short"):
        make(None)(X, rngs=nnx.Rngs(privacy=0))
    with pytest.raises(ValueError, match="too short"):
        DPMultiHeadAttention(2, 8, privacy=SEQUENCE, rngs=nnx.Rngs(params=0, privacy=0))
    layer = make(None)
    layer(X, rngs=nnx.Rngs(privacy=reproducible_key(21)))
    with pytest.raises(ValueError, match="has made noise before"):
        layer(X, rngs=nnx.Rngs(privacy=reproducible_key(21)))


def test_a_key_that_would_repeat_its_noise_raises():
    layer, key = make(None), reproducible_key(1)
    with pytest.raises(ValueError, match="outside the function that JAX is tracing"):
        jax.jit(lambda x: layer(x, rngs=nnx.Rngs(privacy=key)))(X)
    stored = make(1)
    with pytest.raises(ValueError, match="outside the function that JAX is tracing"):
        jax.jit(lambda x: stored(x))(X)


# --- what is refused ------------------------------------------------------------------------


def test_records_of_the_queries_own_input_are_refused():
    layer = make(privacy=RECORD)
    for inputs in ((X,), (X, X), (X, X, X + 0.0), (X, X + 0.0, X)):
        with pytest.raises(ValueError, match="inputs_k: unit='record'"):
            layer(*inputs)
    public = AttentionPrivacy(
        unit="record",
        noise_multiplier=0.5,
        value_clip=2.0,
        adjacency="add_remove",
        logit_bound=1.0,
        public_queries=True,
    )
    assert call(make(privacy=public), X).shape == X.shape


@pytest.mark.parametrize(
    ("attributes", "kwargs", "message"),
    [
        ({"dropout_rate": 0.1}, {}, "dropout_rate=0.1"),
        ({"dropout_rate": 0.1, "deterministic": False}, {}, "dropout_rate=0.1"),
        ({"dropout_rate": 0.1}, {"deterministic": False}, "dropout_rate=0.1"),
        ({"precision": "highest"}, {}, "precision='highest'"),
        ({"implementation": "flash"}, {}, "implementation='flash'"),
        ({}, {"sow_weights": True}, "sow_weights"),
    ],
)
@pytest.mark.parametrize("privacy", [None, SEQUENCE], ids=["exact", "sequence"])
def test_refused_options(privacy, attributes, kwargs, message):
    rngs = nnx.Rngs(params=0, dropout=0, privacy=reproducible_key(1))
    layer = DPMultiHeadAttention(2, 8, privacy=privacy, decode=False, rngs=rngs, **attributes)
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda layer: layer(X, **kwargs), layer)


def test_refused_with_privacy_and_at_construction():
    with pytest.raises(ValueError, match="decode=True"):
        make()(X, decode=True)
    with pytest.raises(ValueError, match="privacy is a float"):
        make(privacy=1.0)
    with pytest.raises(ValueError, match="attention_fn"):
        make(attention_fn=nnx.dot_product_attention)
