import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpfa_jax import AttentionPrivacy
from dpfa_jax.keys import reproducible_key
from dpfa_jax.linen import DPMultiHeadDotProductAttention

SEQUENCE = AttentionPrivacy(
    unit="sequence", noise_multiplier=0.5, value_clip=2.0, adjacency="replace_one"
)
RECORD = AttentionPrivacy(
    unit="record", noise_multiplier=0.5, value_clip=2.0, adjacency="add_remove", logit_bound=1.0
)

Exact = functools.partial(DPMultiHeadDotProductAttention, num_heads=2)
Noisy = functools.partial(Exact, privacy=SEQUENCE)
# Values are zero: what comes out is the noise.
PureNoise = functools.partial(
    Noisy, kernel_init=nn.initializers.zeros, out_kernel_init=nn.initializers.lecun_normal()
)


def normal(seed, shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def rngs(seed=0):
    return {"params": jax.random.key(0), "privacy": reproducible_key(seed)}


def init(model, *args):
    return jax.jit(model.init)(rngs(), *args)


@functools.partial(jax.jit, static_argnums=0)
def run(model, key, variables, args):
    return model.apply(variables, *args, rngs={"privacy": key})


def apply(model, variables, *args, seed=1):
    """Jitted, with the key as an argument."""
    return run(model, reproducible_key(seed), variables, args)


def abstractly(model, *args, rngs=rngs, **kwargs):
    """Traces ``init`` and computes nothing."""
    return jax.eval_shape(lambda rngs, args: model.init(rngs, *args, **kwargs), rngs(), args)


X = normal(0, (3, 6, 8))
Y = normal(1, (3, 5, 4))


# --- without privacy ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "attributes", "dtype"),
    [
        ((X,), {}, jnp.float32),
        ((X,), {"dtype": jnp.bfloat16}, jnp.bfloat16),
        ((X,), {"normalize_qk": True, "qkv_features": 16, "out_features": 3}, jnp.float32),
        ((X, Y), {"use_bias": False}, jnp.float32),
        ((X, Y, Y + 1.0), {"dropout_rate": 0.5, "deterministic": True}, jnp.float32),
    ],
    ids=["float32", "bfloat16", "normalize_qk", "cross", "three inputs"],
)
def test_exact_has_flax_parameters_and_output(inputs, attributes, dtype):
    mask = np.random.default_rng(2).random((3, 1, 6, inputs[-1].shape[1])) < 0.7
    mask[..., 0] = True
    ours, flax = Exact(**attributes), nn.MultiHeadDotProductAttention(num_heads=2, **attributes)

    @jax.jit
    def run():
        variables = flax.init(jax.random.key(0), *inputs)
        own = ours.init(jax.random.key(0), *inputs)
        out = [m.apply(variables, *inputs, mask=mask) for m in (ours, flax)]
        return variables, own, out

    variables, own, (out, wanted) = run()
    jax.tree.map(np.testing.assert_array_equal, own, variables)
    assert out.dtype == wanted.dtype == dtype
    tolerance = 2e-2 if dtype == jnp.bfloat16 else 2e-6
    np.testing.assert_allclose(
        out.astype(jnp.float32), wanted.astype(jnp.float32), atol=tolerance, rtol=tolerance
    )


def test_is_causal_is_flax_causal_mask():
    variables = init(Exact(), X)
    causal = jax.jit(Exact(is_causal=True).apply)(variables, X)
    mask = nn.make_causal_mask(X[..., 0])
    masked = jax.jit(nn.MultiHeadDotProductAttention(num_heads=2).apply)(variables, X, mask=mask)
    np.testing.assert_allclose(causal, masked, atol=2e-6)


def test_exact_decodes_like_flax():
    def decode(model):
        def run():
            variables = model.init(jax.random.key(0), X)
            outputs = []
            for t in range(3):
                out, cache = model.apply(variables, X[:, t : t + 1], mutable=["cache"])
                variables = {**variables, **cache}
                outputs.append(out)
            return jnp.stack(outputs)

        return jax.jit(run)()

    wanted = decode(nn.MultiHeadDotProductAttention(num_heads=2, decode=True))
    np.testing.assert_allclose(decode(Exact(decode=True, is_causal=True)), wanted, atol=2e-6)


def test_exact_needs_no_privacy_key_and_ignores_one():
    variables = jax.jit(Exact().init)(jax.random.key(0), X)
    np.testing.assert_array_equal(
        apply(Exact(), variables, X), jax.jit(Exact().apply)(variables, X)
    )


# --- noise ----------------------------------------------------------------------------------


def identity(key, shape, dtype=jnp.float32):
    """[D, N, H] or [N, H, D] with D = N·H, as a matrix the identity."""
    return jnp.eye(max(shape), dtype=dtype).reshape(shape)


def test_noise_has_the_standard_deviation_of_the_spec():
    x = normal(0, (8, 64, 16)) / 10.0  # no value is clipped
    model = functools.partial(Exact, kernel_init=identity)
    variables = init(model(), x)
    noise = apply(model(privacy=SEQUENCE), variables, x) - apply(model(), variables, x)
    std = SEQUENCE.spec(scale=8**-0.5, head_dim=8, num_keys=64, dtype="float32").numerator_std
    assert np.asarray(noise).std() == pytest.approx(std, rel=0.04)  # 8,192 values


def test_record_noise_is_on_keys_and_values_of_another_input():
    variables = init(Exact(), X, Y)
    out = apply(Exact(privacy=RECORD), variables, X, Y)
    again = apply(Exact(privacy=RECORD), variables, X, Y)
    other = apply(Exact(privacy=RECORD), variables, X, Y, seed=2)
    np.testing.assert_array_equal(out, again)
    assert not (out == other).any()


class Layer(nn.Module):
    """One more level of names."""

    inner: str

    @nn.compact
    def __call__(self, x):
        return PureNoise(name=self.inner)(x)


class TwoLayersTwoCalls(nn.Module):
    @nn.compact
    def __call__(self, x):
        # Flax hashes these two paths as one and the same string.
        first, second = Layer("bc", name="a"), Layer("c", name="ab")
        return jnp.stack([first(x), second(x), first(x), second(x)])


def test_layers_and_calls_have_their_own_noise():
    variables = init(TwoLayersTwoCalls(), X)
    out = np.asarray(apply(TwoLayersTwoCalls(), variables, X))
    for i in range(4):
        for j in range(i):
            assert not (out[i] == out[j]).any(), (i, j)
    np.testing.assert_array_equal(out, apply(TwoLayersTwoCalls(), variables, X))
    assert not (out == apply(TwoLayersTwoCalls(), variables, X, seed=2)).any()


class Remat(nn.Module):
    remat: bool

    @nn.compact
    def __call__(self, x):
        layer_type = DPMultiHeadDotProductAttention
        if self.remat:
            layer_type = nn.remat(layer_type)
        layer = layer_type(num_heads=2, privacy=SEQUENCE, name="layer")
        return layer(layer(x))


def test_remat_regenerates_the_same_noise():
    @functools.partial(jax.jit, static_argnums=0)
    def output_and_gradient(remat, params, key):
        def loss(params):
            out = Remat(remat).apply({"params": params}, X, rngs={"privacy": key})
            return (out**2).sum(), out

        return jax.grad(loss, has_aux=True)(params)

    params = init(Noisy(), X)["params"]
    plain = output_and_gradient(False, {"layer": params}, reproducible_key(1))
    remat = output_and_gradient(True, {"layer": params}, reproducible_key(1))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), plain, remat)
    for name in ("query", "key", "value", "out"):
        assert float(jnp.abs(plain[0]["layer"][name]["kernel"]).max()) > 0.1, name


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        noise = PureNoise()(x)
        return x + noise, noise


def scanned(split):
    options = {} if split is None else {"privacy": split}
    return nn.scan(
        Block,
        variable_axes={"params": 0},
        split_rngs={"params": True, **options},
        length=3,
    )()


def test_scan_over_layers_has_its_own_noise_in_each():
    variables = init(scanned(True), X)
    _, noise = apply(scanned(True), variables, X)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert not (noise[i] == noise[j]).any()


def test_scan_that_would_repeat_the_noise_raises():
    with pytest.raises(ValueError, match="outside the function that JAX is tracing"):
        abstractly(scanned(False), X)
    with pytest.raises(ValueError, match="split_rngs"):
        abstractly(scanned(None), X)


@pytest.mark.parametrize("split", [True, False])
def test_vmap_over_the_batch_has_its_own_noise_in_each_lane(split):
    model = nn.vmap(
        PureNoise, variable_axes={"params": None}, split_rngs={"params": False, "privacy": split}
    )()
    noise = apply(model, init(model, X), X)
    assert not (noise[0] == noise[1]).any()
    assert not (noise[1] == noise[2]).any()


def test_jax_vmap_of_per_example_gradients_has_its_own_noise_in_each_lane():
    variables = init(Noisy(), X[0])
    same = jnp.broadcast_to(X[0], X.shape)

    @jax.jit
    def gradients(key):
        def loss(variables, x):
            return Noisy().apply(variables, x, rngs={"privacy": key}).sum()

        return jax.vmap(jax.grad(loss), in_axes=(None, 0))(variables, same)

    kernel = gradients(reproducible_key(1))["params"]["out"]["kernel"]
    assert not (kernel[0] == kernel[1]).any()
    assert not (kernel[1] == kernel[2]).any()


class Jitted(nn.Module):
    @nn.compact
    def __call__(self, x):
        first, second = nn.jit(PureNoise)(name="first"), nn.jit(PureNoise)(name="second")
        return jnp.stack([first(x), second(x), first(x)])


def test_nn_jit_does_not_share_noise_between_layers_and_calls():
    noise = apply(Jitted(), init(Jitted(), X), X)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert not (noise[i] == noise[j]).any()


# --- keys -----------------------------------------------------------------------------------


def test_key_reuse_outside_jit_raises():
    variables = init(Noisy(), X)
    Noisy().apply(variables, X, rngs={"privacy": reproducible_key(11)})
    with pytest.raises(ValueError, match="has made noise before"):
        Noisy().apply(variables, X, rngs={"privacy": reproducible_key(11)})


def test_missing_short_and_constant_keys_raise():
    with pytest.raises(ValueError, match="no 'privacy' key"):
        abstractly(Noisy(), X, rngs=lambda: {"params": reproducible_key(0)})
    with pytest.raises(ValueError, match="no 'privacy' key"):
        abstractly(Noisy(), X, rngs=lambda: jax.random.key(0))
    with pytest.raises(ValueError, match="too short"):
        abstractly(
            Noisy(), X, rngs=lambda: {"params": jax.random.key(0), "privacy": jax.random.key(1)}
        )
    key = reproducible_key(1)
    with pytest.raises(ValueError, match=r"rngs\['privacy'\]: the key comes from outside"):
        jax.eval_shape(lambda x: Noisy().init({**rngs(), "privacy": key}, x), X)


# --- what is refused ------------------------------------------------------------------------


def test_records_of_the_queries_own_input_are_refused():
    public = AttentionPrivacy(
        unit="record",
        noise_multiplier=0.5,
        value_clip=2.0,
        adjacency="add_remove",
        logit_bound=1.0,
        public_queries=True,
    )

    class Model(nn.Module):
        privacy: AttentionPrivacy
        same: tuple[bool, ...]

        @nn.compact
        def __call__(self, x):
            inputs = (x, *(x if s else x + 0.0 for s in self.same))
            return Exact(privacy=self.privacy)(*inputs)

    for same in ((), (True,), (True, False), (False, True)):
        with pytest.raises(ValueError, match="inputs_k: unit='record'"):
            abstractly(Model(RECORD, same), X)
        abstractly(Model(public, same), X)
    abstractly(Model(RECORD, (False,)), X)
    abstractly(Model(RECORD, (False, False)), X)


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
    with pytest.raises(ValueError, match=message):
        abstractly(Exact(privacy=privacy, **attributes), X, **kwargs)


def test_refused_with_privacy_and_at_construction():
    with pytest.raises(ValueError, match="decode=True"):
        abstractly(Noisy(decode=True), X)
    with pytest.raises(ValueError, match="privacy is a float"):
        Exact(privacy=1.0)
    with pytest.raises(TypeError, match="attention_fn"):
        Exact(attention_fn=nn.dot_product_attention)


def test_layers_are_values():
    assert Noisy(parent=None) == Noisy(parent=None)
    assert Noisy(parent=None) != Exact(parent=None)
    assert Noisy(is_causal=True).clone(decode=True).is_causal
