"""One example's clipped gradient is not longer than C (1 + 2⁻¹⁰), whatever the engine rounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpfa_jax import clipped_grad
from dpfa_jax.clipping import plan

LIMIT = 1 + 2.0**-10


def norm(tree):
    return np.sqrt(sum(np.sum(np.asarray(x, np.float64) ** 2) for x in jax.tree.leaves(tree)))


def product(w, x, t):
    return jnp.sum((x @ w) * t)


def product_in_float32(w, x, t):
    return jnp.sum(jnp.dot(x, w, preferred_element_type=jnp.float32) * t)


def scale(w, x, t):
    return jnp.sum(w * x[0]) + 0 * jnp.sum(t)


def deep(w, x, t):
    for _ in range(5):
        x = jnp.tanh(x @ w)
    return jnp.sum(x * t)


# name: loss, dtypes of x and t, rows, widths
CASES = {
    "bfloat16": (product, "bfloat16", "bfloat16", 1, (2, 64)),
    "bfloat16, many rows": (product, "bfloat16", "bfloat16", 16, (8, 8)),
    "bfloat16 to float32": (product_in_float32, "bfloat16", "float32", 1, (2, 64)),
    "bfloat16 to float32, one column": (product_in_float32, "bfloat16", "float32", 1, (64, 1)),
    "bfloat16, no product": (scale, "bfloat16", "bfloat16", 1, (8, 8)),
    "bfloat16, five layers": (deep, "bfloat16", "bfloat16", 2, (8, 8)),
    "float16": (product, "float16", "float16", 1, (64, 32)),
    "float32": (product, "float32", "float32", 4, (8, 8)),
}


# Two passes in float16 are refused: test_two_passes_in_float16_are_refused.
RUNS = [
    (case, engine)
    for case in CASES
    for engine in ("bookkeeping", "two_pass")
    if (case, engine) != ("float16", "two_pass")
]


@pytest.mark.parametrize("form", ["gram", "materialised"])
@pytest.mark.parametrize(("case", "engine"), RUNS)
def test_one_example_is_no_longer_than_the_clip(case, engine, form, monkeypatch):
    monkeypatch.setattr(plan, "_PREFERENCE", 1e9 if form == "gram" else 0.0)
    loss, left, right, rows, (a, b) = CASES[case]
    w = jnp.asarray(0.3 * np.random.default_rng(1).normal(size=(a, b)), left)
    grad = jax.jit(clipped_grad(loss, l2_clip_norm=0.1, engine=engine, batch_argnums=(1, 2)))
    rng = np.random.default_rng(0)
    worst = 0.0
    for _ in range(40):
        x = jnp.asarray(3 * rng.normal(size=(1, rows, a)), left)
        t = jnp.asarray(rng.normal(size=(1, rows, b)), right)
        worst = max(worst, norm(grad(w, x, t)) / 0.1)
    assert 0.98 < worst <= LIMIT


@pytest.mark.parametrize("form", ["gram", "materialised"])
def test_small_numbers_of_float16_are_not_rounded_up(form, monkeypatch):
    """6e-8 is float16's smallest number: a factor of 0.6 would leave it as it is."""
    monkeypatch.setattr(plan, "_PREFERENCE", 1e9 if form == "gram" else 0.0)
    x, t = jnp.ones((1, 1, 64), jnp.float16), jnp.full((1, 1, 32), 6e-8, jnp.float16)
    w = jnp.ones((64, 32), jnp.float16)
    whole = norm(clipped_grad(product, l2_clip_norm=1e3, batch_argnums=(1, 2))(w, x, t))
    assert whole > 1e-6
    grad = clipped_grad(
        product, l2_clip_norm=0.6 * whole, engine="bookkeeping", batch_argnums=(1, 2)
    )
    assert norm(grad(w, x, t)) <= 0.6 * whole * LIMIT


def test_two_passes_in_float16_are_refused(monkeypatch):
    """Also where only part of the loss is in float16, and where memory is short."""

    def loss(w, x):
        return jnp.sum(jnp.tanh(x.astype(jnp.float16) @ w.astype(jnp.float16)).astype(jnp.float32))

    w, x = jnp.ones((64, 64)), jnp.ones((2, 3, 64))
    with pytest.raises(ValueError, match="engine='two_pass': the loss computes in float16"):
        clipped_grad(loss, l2_clip_norm=1.0, engine="two_pass")(w, x)
    monkeypatch.setattr(plan, "_PREFERENCE", 1e9)
    monkeypatch.setattr("dpfa_jax.clipping.explain.device_memory", lambda: 1)
    assert clipped_grad(loss, l2_clip_norm=1.0).explain(w, x).engine == "bookkeeping"
