"""Every refusal of ``clipped_grad``, and ``verify``."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpfa_jax import clipped_grad


def linear(w, x):
    return jnp.sum(w * x)


W, X = jnp.ones(3), jnp.arange(12.0).reshape(4, 3)


# --- construction ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", [0, -1.0, float("nan"), float("inf"), 1e-10, 1e10, "1", None, True]
)
def test_l2_clip_norm(value):
    with pytest.raises(ValueError, match=r"l2_clip_norm=.*allowed is a "):
        clipped_grad(linear, l2_clip_norm=value)


def test_engine():
    assert clipped_grad(linear, l2_clip_norm=1.0).engine == "auto"
    with pytest.raises(ValueError, match=r"engine='ghost'.*'auto', 'bookkeeping', .*'vmap'"):
        clipped_grad(linear, l2_clip_norm=1.0, engine="ghost")


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "all"])
def test_microbatch_size(value):
    with pytest.raises(ValueError, match="microbatch_size="):
        clipped_grad(linear, l2_clip_norm=1.0, microbatch_size=value)


@pytest.mark.parametrize("name", ["argnums", "batch_argnums"])
@pytest.mark.parametrize("value", [-1, (), (0.5,), (3, -2), ("0",)])
def test_argument_numbers(name, value):
    with pytest.raises(ValueError, match=f"{name}="):
        clipped_grad(linear, l2_clip_norm=1.0, **{name: value})


def test_an_argument_is_not_both_differentiated_and_batched():
    with pytest.raises(ValueError, match=r"share \[1\]"):
        clipped_grad(linear, l2_clip_norm=1.0, argnums=(0, 1), batch_argnums=(1, 2))


# --- the call --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argnums", "batch_argnums", "name"), [(0, 2, "batch_argnums"), (2, 1, "argnums")]
)
def test_too_few_arguments(argnums, batch_argnums, name):
    grad = clipped_grad(linear, l2_clip_norm=1.0, argnums=argnums, batch_argnums=batch_argnums)
    with pytest.raises(ValueError, match=f"^{name}=.*only 2 positional arguments"):
        grad(W, X)


def test_integer_parameters():
    grad = clipped_grad(linear, l2_clip_norm=1.0)
    with pytest.raises(ValueError, match=r"argument 0 .*int32 leaf"):
        grad({"w": jnp.ones(3, jnp.int32)}, X)


@pytest.mark.parametrize(
    "batched",
    [
        {"x": jnp.ones((4, 3)), "y": jnp.ones(5)},
        {"x": jnp.ones((4, 3)), "y": jnp.float32(1)},
        {"x": jnp.float32(1)},
        {},
    ],
    ids=["4 and 5", "scalar beside", "scalar", "no leaf"],
)
def test_batched_leaves_that_do_not_share_a_batch_axis(batched):
    grad = clipped_grad(lambda w, b: jnp.sum(w), l2_clip_norm=1.0)
    with pytest.raises(ValueError, match="same leading batch axis"):
        grad(W, batched)


def test_batched_arguments_of_different_lengths():
    grad = clipped_grad(lambda w, x, y: jnp.sum(w * x) * y, l2_clip_norm=1.0, batch_argnums=(1, 2))
    with pytest.raises(ValueError, match=r"same leading batch axis.*\(4, 3\), \(5,\)"):
        grad(W, X, jnp.ones(5))


def test_an_empty_batch():
    with pytest.raises(ValueError, match="the batch is empty"):
        clipped_grad(linear, l2_clip_norm=1.0)(W, X[:0])


@pytest.mark.parametrize(
    "padding",
    [
        jnp.zeros(3, jnp.bool_),
        jnp.zeros((4, 1), jnp.bool_),
        jnp.zeros(4, jnp.int32),
        jnp.zeros(4),
        False,
    ],
    ids=["short", "two axes", "int", "float", "scalar"],
)
def test_a_padding_mask_that_does_not_fit(padding):
    with pytest.raises(ValueError, match=r"is_padding_example is .*bool\(4,\) is needed"):
        clipped_grad(linear, l2_clip_norm=1.0)(W, X, is_padding_example=padding)


@pytest.mark.parametrize(
    ("loss", "found"),
    [
        (lambda w, x: w * x, r"float32\(3,\)"),
        (lambda w, x: jnp.sum(w * x)[None], r"float32\(1,\)"),
        (lambda w, x: jnp.sum(w).astype(jnp.int32), r"int32\(\)"),
        (lambda w, x: jnp.sum(w * x) > 0, r"bool\(\)"),
        (lambda w, x: 3, r"int32\(\)"),
    ],
    ids=["vector", "length one", "int", "bool", "Python int"],
)
@pytest.mark.parametrize("microbatch_size", [None, 3])
def test_a_loss_that_is_no_floating_scalar(loss, found, microbatch_size):
    grad = clipped_grad(loss, l2_clip_norm=1.0, microbatch_size=microbatch_size)
    with pytest.raises(ValueError, match=f"loss_fn returned {found} for one example"):
        grad(W, X)
    with pytest.raises(ValueError, match="loss_fn returned"):
        jax.jit(grad)(W, X)


def test_a_vector_loss_with_aux():
    grad = clipped_grad(lambda w, x: (w * x, 0), l2_clip_norm=1.0, has_aux=True)
    with pytest.raises(ValueError, match="loss_fn returned"):
        grad(W, X)


# --- verify ----------------------------------------------------------------------------


@jax.custom_batching.custom_vmap
def averaged(x):
    """Harmless alone and in a batch of one; else it mixes, like BatchNorm's statistics."""
    return x


@averaged.def_vmap
def _(axis_size, in_batched, x):
    del axis_size, in_batched
    return jnp.broadcast_to(jnp.mean(x, axis=0), x.shape), True


def mixing(w, x):
    return jnp.sum(w * averaged(x))


def test_verify_catches_an_operation_that_mixes_examples():
    unguarded = clipped_grad(mixing, l2_clip_norm=5.0)(W, X)
    honest = clipped_grad(linear, l2_clip_norm=5.0)(W, X)
    assert not np.allclose(unguarded, honest)  # the leak is real
    with pytest.raises(ValueError, match=r"verify: the gradient of example \d .*mixes examples"):
        clipped_grad(mixing, l2_clip_norm=100.0, verify=True)(W, X)
    clipped_grad(mixing, l2_clip_norm=100.0, verify=True)(W, X[:1])  # nothing to mix


def test_verify_catches_it_with_microbatches_and_aux():
    def loss(w, x, y):
        return mixing(w["w"], x) + y, x

    grad = clipped_grad(
        loss,
        l2_clip_norm=1.0,
        batch_argnums=(1, 2),
        has_aux=True,
        microbatch_size=2,
        verify=True,
    )
    with pytest.raises(ValueError, match="mixes examples"):
        grad({"w": W}, X, jnp.ones(4))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_verify_lets_an_honest_loss_through(dtype, batch):
    def loss(w, x):
        return jnp.sum(jnp.tanh(w * x) ** 2)

    w, x = W.astype(dtype), X[:batch].astype(dtype)
    with_it = clipped_grad(loss, l2_clip_norm=1.0, verify=True)(w, x)
    np.testing.assert_array_equal(with_it, clipped_grad(loss, l2_clip_norm=1.0)(w, x))


def test_verify_with_keys_and_zero_gradients():
    def loss(w, x, key):
        return jnp.sum(w * x * jax.random.bernoulli(key, 0.5, x.shape).astype(x.dtype))

    grad = clipped_grad(loss, l2_clip_norm=1.0, batch_argnums=(1, 2), verify=True)
    grad(W, X, jax.random.split(jax.random.key(0), 4))
    grad(W, jnp.zeros_like(X), jax.random.split(jax.random.key(0), 4))


def test_verify_refuses_to_run_under_jit():
    grad = clipped_grad(linear, l2_clip_norm=1.0, verify=True)
    with pytest.raises(ValueError, match=r"verify=True: .*outside jit"):
        jax.jit(grad)(W, X)
