"""Norms of sites: never understated, exact to rounding, float32 for any dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clipping_models import MODELS
from hypothesis import given, settings
from hypothesis import strategies as st

from dpfa_jax import clipped_grad
from dpfa_jax.clipping import sites
from dpfa_jax.clipping.sites import Factor, squared_norms


def norms(left, right):
    block = (Factor(left[:, None], left.shape[-1]), Factor(right[:, None], right.shape[-1]))
    return np.asarray(squared_norms([block]), np.float64)


def true_norms(left, right):
    product = np.einsum("nta,ntb->nab", np.asarray(left, np.float64), np.asarray(right, np.float64))
    return np.sum(product**2, axis=(1, 2))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.floats(-8, 8), st.floats(-8, 8),
    st.floats(0, 7), st.integers(0, 2**31),
)  # fmt: skip
def test_cancellation_never_understates_a_norm(rows, left, right, a, b, gap, seed):
    """Rows that nearly cancel: ‖Σ l⊗r‖ far below Σ |l||r|, where Gram matrices lose digits."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2, 1, left)) + 10.0**-gap * rng.normal(size=(2, rows, left))
    g = rng.normal(size=(2, rows, right))
    g -= g.mean(axis=1, keepdims=True) * (1.0 - 10.0**-gap)
    x, g = jnp.asarray(x * 10.0**a, jnp.float32), jnp.asarray(g * 10.0**b, jnp.float32)
    true, found = true_norms(x, g), norms(x, g)
    assert (found >= true * (1 - 1e-6)).all()
    outer = np.sum(np.linalg.norm(x, axis=2) * np.linalg.norm(g, axis=2), axis=1)
    assert (found <= true + 3e-6 * outer**2 + 1e-30).all()


@pytest.mark.parametrize(("a", "b"), [(1e18, 1e-19), (1e-19, 1e18), (1e-25, 1e3), (1e15, 1e-22)])
def test_squares_that_vanish_in_float32_are_not_lost(a, b):
    """|g|² = 0 in float32, and |x||g| is not."""
    x, g = jnp.full((1, 3, 4), a, jnp.float32), jnp.full((1, 3, 5), b, jnp.float32)
    true = 9 * 4 * 5 * (float(x[0, 0, 0]) * float(g[0, 0, 0])) ** 2
    # Below 1e-9, the least clip norm, a norm may vanish.
    assert norms(x, g)[0] >= true * (1 - 1e-5) or true < 1e-20


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_norms_of_short_rows_are_float32(dtype):
    """4,096 equal products: a bfloat16 sum would stall at 256."""
    x = jnp.ones((1, 64, 64), dtype)
    np.testing.assert_allclose(norms(x, x), [64.0**4], rtol=1e-3)
    assert squared_norms([(Factor(x[:, None], 64),) * 2]).dtype == jnp.float32


@pytest.mark.parametrize(
    "name", ["shared_weights", "rnn", "scanned_layers", "bfloat16_mlp", "slices_and_casts"]
)
def test_no_example_contributes_more_than_c(name):
    """By itself in a batch, far above C: its contribution's norm in float64."""
    loss, params, batch = MODELS[name]()
    numbers = range(1, 1 + len(batch))
    count = len(batch[0])
    for engine in ("bookkeeping", "two_pass"):
        for clip in (3e-2,):
            grad = clipped_grad(loss, l2_clip_norm=clip, engine=engine, batch_argnums=numbers)
            call = jax.jit(lambda p, g=grad: g(params, *batch, is_padding_example=p))
            for i in range(0, count, 2):
                leaves = jax.tree.leaves(call(jnp.arange(count) != i))
                norm = np.sqrt(sum(np.sum(np.asarray(x, np.float64) ** 2) for x in leaves))
                assert norm <= clip


def cut(x):
    """To float32 towards zero, as matrix units round their sums."""
    rounded = x.astype(np.float32)
    return np.where(np.abs(rounded) > np.abs(x), np.nextafter(rounded, np.float32(0)), rounded)


def cut_gram(x):
    """x xᵀ, sixteen products at a time onto a sum that is cut each time."""
    total = np.zeros((len(x), len(x)), np.float32)
    for k in range(0, x.shape[1], 16):
        part = x[:, k : k + 16].astype(np.float64)
        total = cut(total.astype(np.float64) + part @ part.T)
    return total


@pytest.mark.parametrize("alike", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("rows", [1, 9])
def test_the_raise_covers_sums_that_are_cut(rows, alike, monkeypatch):
    """Rows that are all alike lose most: every entry's sum grows with every product."""
    rng = np.random.default_rng(0)
    widths = (768, 3072)
    sides = []
    for width in widths:
        common = np.abs(rng.normal(size=(1, width))) * alike
        row = common + (1 - alike) * rng.normal(size=(rows, width))
        sides.append(np.asarray(jnp.asarray(row).astype(jnp.bfloat16), np.float32))
    x, g = sides
    true = float(true_norms(x[None], g[None])[0])
    found = np.sum(cut_gram(x).astype(np.float64) * cut_gram(g))
    if alike == 1.0:
        assert found < true * (1 - 2.0**-20)  # without the share for it, too little
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    block = tuple(
        Factor(jnp.asarray(y)[None, None].astype(jnp.bfloat16), y.shape[1]) for y in sides
    )
    assert found * (1 + sites._truncation([block])) >= true


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(1, 6), st.booleans(),
    st.sampled_from(["float32", "bfloat16"]), st.integers(0, 2**31),
)  # fmt: skip
def test_a_product_and_looked_up_rows_are_one_gradient(
    rows, looked_up, width, on_left, dtype, seed
):
    """‖P + S‖ with P in its dtype and S only as rows and their numbers, some of them absent."""
    rng, height = np.random.default_rng(seed), 7

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32).astype(dtype)

    dense = Factor(draw(3, 2, rows, height), height), Factor(draw(3, 2, rows, width), width)
    numbers = jnp.asarray(rng.integers(-1, height, (3, 2, looked_up)), jnp.int32)
    found = jnp.where((numbers >= 0)[..., None], draw(3, 2, looked_up, width), 0)
    index = Factor(numbers, height), Factor(found, width)
    blocks = [dense, index] if on_left else [dense[::-1], index[::-1]]
    product = sites.product_of(blocks[0])
    assert product.dtype == dtype
    whole = np.asarray(product, np.float64)
    place = np.asarray(numbers)[..., None] == np.arange(height)
    rest = np.einsum("nsta,nstb->nsab", place.astype(np.float64), np.asarray(found, np.float64))
    whole = whole + (rest if on_left else rest.swapaxes(2, 3))
    true = np.sum(whole**2, axis=(1, 2, 3))
    got = np.asarray(squared_norms(blocks[1:], None, product), np.float64)
    spread = np.linalg.norm(product.astype(jnp.float32).reshape(3, -1), axis=1)
    spread = spread + np.sum(np.linalg.norm(found.astype(jnp.float32), axis=3), axis=(1, 2))
    assert (got >= true * (1 - 1e-6)).all()
    assert (got <= true + 3e-6 * spread**2 + 1e-30).all()
