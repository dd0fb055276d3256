"""Adaptive clipping: its sensitivity, its target, and its refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clipping_models import MODELS

from dpfa_jax import add_noise, keys
from dpfa_jax.clipping import Adapted, adaptive_clipped_grad


def linear(w, x):
    return jnp.sum(w * x)


def flat(adapted):
    leaves = jax.tree.leaves(adapted)
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in leaves])


@pytest.mark.parametrize("weight", [0.1, 1.0, 3.0])
def test_neighbours_differ_by_at_most_the_sensitivity(weight):
    """Over clip norms and examples of all sizes; reached by examples at and above C."""
    adaptive = adaptive_clipped_grad(linear, initial_l2_clip_norm=1.0, count_weight=weight)
    call = jax.jit(lambda c, x, p: adaptive(c, jnp.ones(3), x, is_padding_example=p))
    rng = np.random.default_rng(0)
    none = np.zeros(4, bool)
    worst = dict.fromkeys(("add_remove", "replace_one"), 0.0)
    for trial in range(60):
        clip = 10.0 ** rng.uniform(-6, 6)
        x = rng.normal(size=(4, 3)) * clip * 10.0 ** rng.uniform(-2, 2, (4, 1))
        other = x.copy()
        other[2] = -x[2] * (1.0 if trial % 2 else 1e-4)
        if trial % 7 == 0:
            other[2] = np.nan
        full = flat(call(clip, x, none))
        removed = flat(call(clip, x, np.arange(4) == 2))
        replaced = flat(call(clip, other, none))
        worst["add_remove"] = max(worst["add_remove"], np.linalg.norm(full - removed))
        worst["replace_one"] = max(worst["replace_one"], np.linalg.norm(full - replaced))
    for adjacency, found in worst.items():
        assert found <= adaptive.sensitivity(adjacency) * (1 + 1e-6)
    # A record of norm C adds (1, a); opposite gradients, or opposite signs, are 2 or 2a apart.
    assert worst["add_remove"] > 0.99 * np.sqrt(1 + weight**2)
    assert worst["replace_one"] > 0.99 * 2 * max(1.0, min(weight, 1.0))


@pytest.mark.parametrize("engine", ["bookkeeping", "two_pass", "vmap"])
@pytest.mark.parametrize("size", [None, 2])
def test_the_sum_is_that_of_fixed_clipping_in_units_of_c(engine, size):
    loss, params, batch = MODELS["shared_weights"]()
    options = {"engine": engine, "batch_argnums": (1, 2), "microbatch_size": size}
    adaptive = adaptive_clipped_grad(loss, initial_l2_clip_norm=1.0, **options)
    norms = []
    for i in range(5):
        g = jax.grad(loss)(params, *(x[i] for x in batch))
        norms.append(np.sqrt(sum(np.sum(np.asarray(v) ** 2) for v in jax.tree.leaves(g))))
    clip = float(np.sort(norms)[2] * 1.01)
    fixed = type(adaptive.grad)(**{**vars(adaptive.grad), "l2_clip_norm": clip})
    found = jax.jit(adaptive)(jnp.float32(clip), params, *batch)
    for x, y in zip(
        jax.tree.leaves(found.gradient), jax.tree.leaves(fixed(params, *batch)), strict=True
    ):
        np.testing.assert_allclose(clip * x, y, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.below, 0.1 * (3 - 2), rtol=1e-5)


@pytest.mark.parametrize("start", [1e-2, 50.0])
def test_the_clip_norm_finds_the_quantile(start):
    """Norms uniform on (0, 1): the clip norm ends near 0.7 from either side."""
    adaptive = adaptive_clipped_grad(
        linear, initial_l2_clip_norm=start, quantile=0.7, learning_rate=0.3
    )
    noise = add_noise(adaptive.l2_clip_norm, 0.5, 500, keys.reproducible_key(9100 + int(start)))
    x = jnp.linspace(0.0, 1.0, 500)[:, None]

    @jax.jit
    def step(clip, state):
        released, state = noise.update(adaptive(clip, jnp.zeros(1), x), state)
        mean, clip = adaptive.update(clip, released)
        return mean, clip, state

    clip, state, tail = adaptive.init(), noise.init(None), []
    for i in range(120):
        mean, clip, state = step(clip, state)
        tail += [float(clip)] if i >= 90 else []
    # The share's noise is 0.005 a step; the mean of 30 steps is off by far less than 0.05.
    assert np.mean(tail) == pytest.approx(0.7, abs=0.05)
    # E[min(u, C)] for u uniform, off by the noise 0.5 C / 500.
    assert float(mean[0]) == pytest.approx(float(clip - clip**2 / 2), abs=0.02)


def test_a_clip_norm_out_of_range_is_moved_into_it():
    adaptive = adaptive_clipped_grad(linear, initial_l2_clip_norm=1.0)
    x = jnp.asarray([[3.0, 4.0]])
    for clip in (0.0, -1.0, float("nan"), float("inf"), 1e30):
        total = flat(adaptive(jnp.float32(clip), jnp.ones(2), x))
        assert np.linalg.norm(total) <= adaptive.sensitivity("add_remove") * (1 + 1e-6)
    _, after = adaptive.update(jnp.float32(1e9), Adapted(jnp.zeros(2), jnp.float32(-100.0)))
    assert after == 1e9


def test_options_that_are_not_allowed():
    for name, value in (("quantile", 0.0), ("quantile", 1), ("learning_rate", -1.0),
                        ("count_weight", True), ("learning_rate", float("nan"))):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name}=.*allowed is a number"):
            adaptive_clipped_grad(linear, initial_l2_clip_norm=1.0, **{name: value})
    with pytest.raises(ValueError, match="automatic: adaptive clipping follows one norm"):
        adaptive_clipped_grad(linear, initial_l2_clip_norm=1.0, automatic=0.1)
    with pytest.raises(ValueError, match="engine='per_layer': adaptive"):
        adaptive_clipped_grad(linear, initial_l2_clip_norm=1.0, engine="per_layer")
    with pytest.raises(ValueError, match="l2_clip_norm="):
        adaptive_clipped_grad(linear, initial_l2_clip_norm=0)
