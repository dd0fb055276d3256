import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dpfa_jax import AttentionPrivacy, dp_dot_product_attention
from dpfa_jax.attention_fn import attention_fn, noise_key
from dpfa_jax.keys import allow_reuse_for_tests, reproducible_key

SEQUENCE = AttentionPrivacy(
    unit="sequence", noise_multiplier=0.5, value_clip=2.0, adjacency="replace_one"
)
RECORD = AttentionPrivacy(
    unit="record",
    noise_multiplier=0.5,
    value_clip=2.0,
    adjacency="add_remove",
    logit_bound=1.0,
    public_queries=True,
)


def normal(seed, shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def coin(shape):
    return np.random.default_rng(3).random(shape) < 0.7


def qkv(batch=(), t=5, s=7, n=4, k=4, h=8, dtype=jnp.float32):
    return (
        normal(0, (*batch, t, n, h), dtype),
        normal(1, (*batch, s, k, h), dtype),
        normal(2, (*batch, s, k, h), dtype),
    )


def close(a, b, dtype=jnp.float32):
    tolerance = 2e-2 if dtype == jnp.bfloat16 else 2e-6
    assert a.dtype == b.dtype
    np.testing.assert_allclose(
        np.asarray(a, np.float32), np.asarray(b, np.float32), atol=tolerance, rtol=tolerance
    )


# --- without privacy: Flax's own result ---------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "mask_shape", "dtype"),
    [
        ((), (5, 7), jnp.float32),
        ((), (4, 5, 7), jnp.bfloat16),
        ((3,), (3, 1, 1, 7), jnp.float32),
        ((3,), (1, 4, 5, 7), jnp.bfloat16),
        ((2, 3), (2, 1, 4, 5, 7), jnp.float32),
        ((2, 3), (1, 1, 5, 1), jnp.float32),
    ],
)
def test_exact_equals_flax(batch, mask_shape, dtype):
    q, k, v = qkv(batch, dtype=dtype)
    mask = coin(mask_shape).astype(np.float32)
    mask[..., 0] = 1.0  # A row that sees nothing is a mean of the values in Flax.
    ours = jax.jit(attention_fn(None))(q, k, v, mask=mask)
    close(ours, jax.jit(nn.dot_product_attention)(q, k, v, mask=mask), dtype)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_exact_grouped_and_causal_equals_nnx(implementation):
    q, k, v = qkv((2, 3), t=7, n=4, k=2)

    @jax.jit
    def both():
        ours = attention_fn(None, implementation=implementation)
        theirs = nnx.dot_product_attention(q, k, v, is_causal=True)
        return ours(q, k, v, is_causal=True), theirs

    close(*both())


def test_dtype_argument_and_zero_for_a_row_that_sees_nothing():
    q, k, v = qkv()

    @jax.jit
    def half(q, k, v):
        return [
            f(q, k, v, dtype=jnp.bfloat16) for f in (attention_fn(None), nn.dot_product_attention)
        ]

    close(*half(q, k, v), jnp.bfloat16)
    blind = jax.jit(lambda: attention_fn(None)(q, k, v, mask=jnp.zeros((5, 7), jnp.bool_)))
    np.testing.assert_array_equal(blind(), 0.0)


# --- with privacy: the op's result, in unmodified layers ------------------------------------


@pytest.mark.parametrize(("privacy", "batch"), [(SEQUENCE, ()), (RECORD, (2, 3))])
def test_noisy_is_the_op_under_the_folded_key(privacy, batch):
    q, k, v = qkv(batch)
    mask = coin((*batch, 1, 5, 7))

    @jax.jit
    def both(key, same_key):
        attend = attention_fn(privacy)
        with noise_key(key):
            ours = attend(q, k, v, mask=mask), attend(q, k, v, mask=mask)
        op = []
        for i in range(2):
            out = dp_dot_product_attention(
                *(x.reshape(-1, *x.shape[-3:]) for x in (q, k, v)),
                privacy=privacy,
                rng=jax.random.fold_in(same_key, i),
                mask=mask.reshape(-1, 1, 5, 7),
            )
            op.append(out.reshape(q.shape))
        return ours, op

    ours, op = both(reproducible_key(0), reproducible_key(0))
    close(ours[0], op[0])
    close(ours[1], op[1])
    assert not (ours[0] == ours[1]).any()


class LinenLayer:
    def __init__(self, fn):
        self.layer = nn.MultiHeadDotProductAttention(num_heads=2, attention_fn=fn)

    def __call__(self, params, x, mask):
        return self.layer.apply({"params": params}, x, mask=mask)


class NNXLayer:
    def __init__(self, fn):
        rngs = nnx.Rngs(0)
        self.layer = nnx.MultiHeadAttention(2, 8, attention_fn=fn, decode=False, rngs=rngs)

    def __call__(self, params, x, mask):
        for name, leaves in params.items():
            for leaf, value in leaves.items():
                getattr(getattr(self.layer, name), leaf)[...] = value
        return self.layer(x, mask=mask)


@pytest.mark.parametrize("privacy", [None, SEQUENCE, RECORD], ids=["exact", "sequence", "record"])
def test_unmodified_linen_and_nnx_layers_agree(privacy):
    x = normal(0, (3, 6, 8))
    mask = nn.make_causal_mask(x[..., 0])
    params = nn.MultiHeadDotProductAttention(num_heads=2).init(jax.random.key(1), x)["params"]

    def output(layer_type, key):
        def run(key, params):
            with noise_key(key):
                return layer_type(attention_fn(privacy))(params, x, mask)

        return jax.jit(run)(key, params)

    linen = output(LinenLayer, reproducible_key(0))
    close(output(NNXLayer, reproducible_key(0)), linen)
    exact = LinenLayer(nn.dot_product_attention)(params, x, mask)
    if privacy is None:
        close(linen, exact)
    else:
        assert float(jnp.abs(linen - exact).max()) > 0.1
        other = output(LinenLayer, reproducible_key(1))
        assert float(jnp.abs(linen - other).max()) > 0.1


def test_noise_has_the_standard_deviation_of_the_spec():
    q, k, v = qkv((8,), t=64, s=16, n=2, k=2, h=8)
    v = v / 10.0  # no row is clipped

    def run(key):
        with noise_key(key):
            return attention_fn(SEQUENCE)(q, k, v) - attention_fn(None)(q, k, v)

    noise = np.asarray(jax.jit(run)(reproducible_key(0)))
    std = SEQUENCE.spec(scale=8**-0.5, head_dim=8, num_keys=16, dtype="float32").numerator_std
    assert noise.std() == pytest.approx(std, rel=0.04)  # 8,192 values: 5 standard errors
    assert abs(noise.mean()) < 5 * std / 8192**0.5


def test_vmap_lanes_have_their_own_noise():
    q, k, v = (x[None].repeat(3, 0) for x in qkv())

    def run(key):
        with noise_key(key):
            return jax.vmap(attention_fn(SEQUENCE))(q, k, v)

    out = jax.jit(run)(reproducible_key(0))
    assert not (out[0] == out[1]).any()
    assert not (out[1] == out[2]).any()


# --- keys ---------------------------------------------------------------------------------


def test_inner_context_wins_and_outer_continues():
    x = jnp.zeros((2, 1, 4))
    attend = attention_fn(SEQUENCE)

    @jax.jit
    def nested(a, b):
        with noise_key(a):
            first = attend(x, x, x)
            with noise_key(b):
                inner = attend(x, x, x)
            return first, inner, attend(x, x, x)

    @jax.jit
    def flat(key):
        with noise_key(key):
            return attend(x, x, x), attend(x, x, x)

    first, inner, second = nested(reproducible_key(0), reproducible_key(1))
    for got, wanted in zip((first, second), flat(reproducible_key(0)), strict=True):
        np.testing.assert_array_equal(got, wanted)
    np.testing.assert_array_equal(inner, flat(reproducible_key(1))[0])


def test_one_key_cannot_open_two_contexts():
    def twice(key):
        with noise_key(key):
            pass
        with noise_key(key):
            pass

    with pytest.raises(ValueError, match="has made noise before"):
        twice(reproducible_key(1234))
    with pytest.raises(ValueError, match="has made noise before"):
        jax.jit(twice)(reproducible_key(0))
    with allow_reuse_for_tests():
        twice(reproducible_key(1234))


def test_without_a_context_it_raises_also_after_one():
    x = jnp.zeros((2, 1, 4))
    with pytest.raises(ValueError, match="noise_key"):
        attention_fn(SEQUENCE)(x, x, x)
    with pytest.raises(ZeroDivisionError), noise_key(reproducible_key(4321)):
        _ = 1 // 0
    with pytest.raises(ValueError, match="noise_key"):
        attention_fn(SEQUENCE)(x, x, x)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (None, "key=None"),
        (jax.random.key(0), "too short"),
        (jax.random.split(reproducible_key(0), 2), "shape"),
    ],
)
def test_unsuited_keys_raise(key, message):
    with pytest.raises(ValueError, match=message), noise_key(key):
        pass


def noisy(key, x):
    with noise_key(key):
        return attention_fn(SEQUENCE)(x, x, x).sum()


def outside_jit(key, x):
    with noise_key(key):
        return jax.jit(attention_fn(SEQUENCE))(x, x, x)


def outside_scan(key, x):
    with noise_key(key):
        return jax.lax.map(lambda x: attention_fn(SEQUENCE)(x, x, x), x[None])


@pytest.mark.parametrize(
    "run",
    [
        lambda key, x: jax.jit(lambda x: noisy(key, x))(x),
        lambda key, x: jax.grad(jax.checkpoint(lambda x: noisy(key, x)))(x),
        lambda key, x: jax.lax.map(lambda x: noisy(key, x), x[None]),
        lambda key, x: jax.lax.cond(x.sum() > 0, lambda: noisy(key, x), lambda: 0.0),
        outside_jit,
        outside_scan,
    ],
    ids=["jit", "checkpoint", "map", "cond", "context outside jit", "context outside scan"],
)
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "in jit"])
def test_a_key_that_would_repeat_its_noise_raises(run, jit):
    x = jnp.zeros((2, 1, 4))
    with (
        allow_reuse_for_tests(),
        pytest.raises(ValueError, match="outside the function that JAX is tracing"),
    ):
        (jax.jit(run) if jit else run)(reproducible_key(0), x)


@pytest.mark.parametrize(
    "run",
    [
        lambda key, x: jax.vmap(lambda x: noisy(key, x))(x[None]),
        lambda key, x: jax.vmap(noisy)(jax.random.split(key, 2), x[None].repeat(2, 0)),
        lambda key, x: jax.grad(lambda x: noisy(key, x))(x),
        lambda key, x: jax.vmap(jax.grad(lambda x: noisy(key, x)))(x[None]),
        lambda key, x: jax.jvp(lambda x: noisy(key, x), (x,), (x,)),
        lambda key, x: jax.linearize(lambda x: noisy(key, x), x)[0],
        lambda key, x: jax.checkpoint(noisy)(key, x),
        lambda key, x: jax.lax.map(
            lambda kx: noisy(*kx), (jax.random.split(key, 2), x[None].repeat(2, 0))
        ),
    ],
    ids=["vmap", "vmap keys", "grad", "vmap grad", "jvp", "linearize", "checkpoint", "map"],
)
def test_a_key_of_the_traced_function_passes(run):
    jax.eval_shape(run, reproducible_key(0), jnp.zeros((2, 1, 4)))


# --- what is refused ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"bias": jnp.zeros((5, 7))}, "bias"),
        ({"module": object()}, "sow_weights"),
        ({"dropout_rate": 0.1}, "dropout_rate=0.1"),
        ({"precision": jax.lax.Precision.HIGHEST}, "precision"),
        ({"precision": "highest"}, "precision"),
        ({"qk_attn_weights_einsum": jnp.einsum}, "qk_attn_weights_einsum"),
        ({"attn_weights_value_einsum": jnp.einsum}, "attn_weights_value_einsum"),
        ({"mask": jnp.ones((6, 7))}, "mask has shape"),
        ({"mask": jnp.ones((2, 4, 5, 7))}, "mask has shape"),
        ({"mask": jnp.ones((1, 3, 4, 5, 7))}, "mask has shape"),
    ],
)
@pytest.mark.parametrize("privacy", [None, SEQUENCE], ids=["exact", "sequence"])
def test_refused_arguments(privacy, kwargs, message):
    q, k, v = qkv((3,))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: attention_fn(privacy)(q, k, v, **kwargs))


def test_deterministic_dropout_and_default_precision_pass():
    q, k, v = qkv()
    kwargs = {"dropout_rate": 0.1, "deterministic": True, "precision": jax.lax.Precision.DEFAULT}
    close(attention_fn(None)(q, k, v, **kwargs), attention_fn(None)(q, k, v))


@pytest.mark.parametrize(
    "shapes",
    [
        ((5, 8), (7, 8)),
        ((2, 3, 5, 4, 8), (3, 2, 7, 4, 8)),  # equal once flattened
        ((3, 5, 4, 8), (1, 7, 4, 8)),
        ((0, 5, 4, 8), (0, 7, 4, 8)),
    ],
)
def test_shapes_that_do_not_fit(shapes):
    q, k = (jnp.ones(shape) for shape in shapes)
    with pytest.raises(ValueError, match="shape"):
        attention_fn(None)(q, k, k)


def test_privacy_that_a_layer_cannot_keep_raises_at_construction():
    record = {"unit": "record", "noise_multiplier": 1.0, "value_clip": 1.0, "logit_bound": 0.0}
    with pytest.raises(ValueError, match="public_queries=False"):
        attention_fn(AttentionPrivacy(adjacency="add_remove", **record))
    with pytest.raises(ValueError, match="rows_per_record=2"):
        attention_fn(
            AttentionPrivacy(
                adjacency="add_remove", rows_per_record=2, public_queries=True, **record
            )
        )
    with pytest.raises(ValueError, match="privacy is a float"):
        attention_fn(1.0)


def test_sowing_attention_weights_is_refused_in_unmodified_layers():
    x = normal(0, (3, 6, 8))
    linen, layer = (kind(attention_fn(None)).layer for kind in (LinenLayer, NNXLayer))
    with pytest.raises(ValueError, match="sow_weights"):
        linen.init(jax.random.key(0), x, sow_weights=True)
    with pytest.raises(ValueError, match="sow_weights"):
        layer(x, sow_weights=True)
