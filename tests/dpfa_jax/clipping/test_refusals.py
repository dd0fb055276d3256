"""Losses that could mix examples raise under every engine, before anything is computed."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from dpfa_jax import clipped_grad

ENGINES = ["auto", "bookkeeping", "two_pass", "per_layer", "vmap"]
W, X = jnp.ones(3), jnp.ones((4, 3))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_collective(engine):
    def loss(w, x):
        return jnp.sum(w * (x - jax.lax.pmean(x, "batch")))

    grad = clipped_grad(loss, l2_clip_norm=1.0, engine=engine)
    with pytest.raises(ValueError, match=r"loss_fn: it communicates over a named axis"):
        grad(W, X)
    # Where the axis exists, the loss would run: across devices, or under an outer vmap.
    with pytest.raises(ValueError, match=r"loss_fn: it communicates over a named axis"):
        jax.vmap(grad, in_axes=(None, 0), axis_name="batch")(W, X[:, None])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_collective_inside_is_fine(engine):
    """An axis that lies within one example."""

    def loss(w, x):
        return jnp.sum(w * jax.vmap(lambda v: v - jax.lax.pmean(v, "own"), axis_name="own")(x))

    clipped_grad(loss, l2_clip_norm=1.0, engine=engine)(W, X)


@pytest.mark.parametrize("engine", ENGINES)
def test_batch_normalisation_across_the_batch(engine):
    model = nn.BatchNorm(use_running_average=False, axis_name="batch")
    variables = {
        "params": {"scale": jnp.ones(3), "bias": jnp.zeros(3)},
        "batch_stats": {"mean": jnp.zeros(3), "var": jnp.ones(3)},
    }

    def loss(params, x):
        out, _ = model.apply({**variables, "params": params}, x[None], mutable=["batch_stats"])
        return jnp.sum(jnp.square(out))

    grad = clipped_grad(loss, l2_clip_norm=1.0, engine=engine)
    with pytest.raises(ValueError, match="named axis"):
        grad(variables["params"], X)


@pytest.mark.parametrize("engine", ENGINES)
def test_running_statistics_that_are_written(engine):
    """A mutable array that the loss closes over."""
    mean = jax.new_ref(jnp.zeros(3))

    def loss(w, x):
        mean[...] = 0.9 * mean[...] + 0.1 * x
        return jnp.sum(w * x)

    grad = clipped_grad(loss, l2_clip_norm=1.0, engine=engine)
    with pytest.raises(ValueError, match=r"loss_fn: has a side effect"):
        grad(W, X)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_loss_of_a_whole_batch(engine):
    def loss(w, x):
        return jnp.sum(w * x, axis=-1)

    with pytest.raises(ValueError, match=r"loss_fn returned float32\(2,\) for one example"):
        clipped_grad(loss, l2_clip_norm=1.0, engine=engine)(W, jnp.ones((4, 2, 3)))


def test_options_that_do_not_fit():
    def loss(w, x):
        return jnp.sum(w * x)

    for value in (0.0, -1.0, True, "1", float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"automatic=.*allowed is None or a number"):
            clipped_grad(loss, l2_clip_norm=1.0, automatic=value)
    with pytest.raises(ValueError, match=r"groups=3: allowed is None or a function"):
        clipped_grad(loss, l2_clip_norm=1.0, groups=3)
    with pytest.raises(ValueError, match=r"trainable=\[\]: allowed is None or a function"):
        clipped_grad(loss, l2_clip_norm=1.0, trainable=[])
    with pytest.raises(ValueError, match=r"groups: engine='two_pass' clips one norm"):
        clipped_grad(loss, l2_clip_norm=1.0, engine="two_pass", groups=str)
    with pytest.raises(ValueError, match=r"no arrays that trainable\(\) accepts"):
        clipped_grad(loss, l2_clip_norm=1.0, trainable=lambda p, x: False)(W, X)
