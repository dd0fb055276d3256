"""The clip itself: never above C, never less than it could be."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpfa_jax.clipping.tree import check_clip_norm, clip_and_sum, per_example_norms

# One float32 example in two leaves; every component has an exponent of its own.
SIZES = (5, 12)
exponents = st.lists(st.floats(-20, 20), min_size=sum(SIZES), max_size=sum(SIZES)) | st.floats(
    -20, 20
).flatmap(
    # ... or all alike, up to a little: the norm then sums terms of one size
    lambda e: st.lists(st.floats(e - 0.01, e), min_size=sum(SIZES), max_size=sum(SIZES))
)
signs = st.lists(st.sampled_from([-1.0, 0.0, 1.0]), min_size=sum(SIZES), max_size=sum(SIZES))
clip_norms = st.floats(-9, 9).map(lambda e: 10.0**e)


def example(exponents, signs):
    flat = (np.array(signs) * 10.0 ** np.array(exponents)).astype(np.float32)
    return flat, {"a": flat[None, : SIZES[0]], "b": flat[SIZES[0] :].reshape(1, 3, 4)}


def clipped(tree, l2_clip_norm):
    total = clip_and_sum({k: jnp.asarray(v) for k, v in tree.items()}, l2_clip_norm, None)
    flat = np.concatenate([np.asarray(total[k], np.float64).ravel() for k in ("a", "b")])
    return flat, np.linalg.norm(flat)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(exponents, signs, clip_norms)
def test_the_clipped_norm_is_at_most_c(exponents, signs, l2_clip_norm):
    """Exactly: the norm is taken in float64, and C has no tolerance."""
    _, tree = example(exponents, signs)
    _, norm = clipped(tree, l2_clip_norm)
    assert norm <= l2_clip_norm


@settings(max_examples=200, deadline=None, derandomize=True)
@given(exponents, signs, clip_norms)
def test_clipping_takes_no_more_than_it_must(exponents, signs, l2_clip_norm):
    flat, tree = example(exponents, signs)
    result, norm = clipped(tree, l2_clip_norm)
    true = np.linalg.norm(flat.astype(np.float64))
    # Squares leave float32's normal range below 1e-18 and above 1.8e19.
    if not 1e-15 < true < 1e19:
        return
    if true <= l2_clip_norm * (1 - 1e-5):
        np.testing.assert_array_equal(result, flat)
    else:
        assert norm >= min(true, l2_clip_norm) * (1 - 1e-5)
        np.testing.assert_allclose(result / norm, flat / true, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda n: np.full(n, 1.2345),
        lambda n: np.full(n, 1e-3) + (np.arange(n) == 0),
        lambda n: np.full(n, 1e-3) + (np.arange(n) == n - 1),
        lambda n: np.geomspace(1e-8, 1.0, n),
        lambda n: np.random.default_rng(0).normal(size=n),
    ],
    ids=["equal", "large first", "large last", "geometric", "normal"],
)
def test_a_million_coordinates_are_not_underestimated(make):
    """A float32 running sum of a million squares may lose small terms: C must still hold."""
    x = make(1_000_000).astype(np.float32)
    total = clip_and_sum([jnp.asarray(x)[None]], 0.01, None)[0]
    assert 0.01 * (1 - 1e-5) <= np.linalg.norm(np.asarray(total, np.float64)) <= 0.01


@pytest.mark.parametrize("l2_clip_norm", [0.1, 1.0, 3.0])
def test_just_above_and_just_below_c(l2_clip_norm):
    for ulps in range(-40, 41):
        x = np.float32(l2_clip_norm) * np.float32(1 + ulps * 2.0**-23)
        total = clip_and_sum(jnp.full((1, 1), x), l2_clip_norm, None)
        assert abs(float(total[0])) <= l2_clip_norm


@pytest.mark.parametrize("l2_clip_norm", [1e-9, 0.3, 1e9])
def test_extreme_finite_examples_in_a_batch_harm_no_other(l2_clip_norm):
    x = np.array([[1e-30, 1e-30], [3e18, 4e18], [3e30, 4e30], [0.003, 0.004]], np.float32)
    total = np.asarray(clip_and_sum(jnp.asarray(x), l2_clip_norm, None), np.float64)
    direction = np.array([0.6, 0.8])
    # 5e30 overflows the norm and counts as not finite: it contributes zero.
    expected = direction * (min(l2_clip_norm, 5e18) + min(l2_clip_norm, 0.005))
    np.testing.assert_allclose(total, expected, rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
def test_bad_examples_are_replaced_not_multiplied_away(bad):
    x = {"a": jnp.array([[3.0, 4.0], [bad, 0.0]]), "b": jnp.array([0.0, 1.0])}
    total = clip_and_sum(x, 1.0, None)
    good = clip_and_sum({k: v[:1] for k, v in x.items()}, 1.0, None)
    np.testing.assert_array_equal(total["a"], good["a"])
    np.testing.assert_array_equal(total["b"], good["b"])


def test_all_examples_bad_gives_exact_zeros():
    total = clip_and_sum(jnp.full((3, 2), jnp.nan), 1.0, None)
    np.testing.assert_array_equal(total, [0.0, 0.0])


def test_padding_of_a_bad_example():
    x = jnp.array([[jnp.nan, jnp.inf], [3.0, 4.0]])
    total = clip_and_sum(x, 10.0, jnp.array([True, False]))
    np.testing.assert_array_equal(total, [3.0, 4.0])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_norms_and_sums_are_float32(dtype):
    x = {"a": jnp.ones((2, 1000), dtype), "b": jnp.ones((2, 3, 8), jnp.float32)}
    norms = per_example_norms(x)
    assert norms.dtype == jnp.float32
    np.testing.assert_allclose(norms, np.sqrt([1024.0, 1024.0]), rtol=1e-6)
    total = clip_and_sum(x, 1.0, None)
    assert {v.dtype for v in total.values()} == {jnp.dtype(jnp.float32)}
    assert total["a"].shape == (1000,)
    assert total["b"].shape == (3, 8)


def test_float16_overflow_does_not_reach_the_norm():
    """60,000² is beyond float16, not beyond float32."""
    total = clip_and_sum(jnp.full((1, 4), 60_000.0, jnp.float16), 1.0, None)
    np.testing.assert_allclose(total, np.full(4, 0.5), rtol=1e-5)


def test_scalar_parameters_have_vectors_of_gradients():
    total = clip_and_sum(jnp.array([5.0, -0.25, 3.0]), 1.0, None)
    assert total.shape == ()
    assert float(total) == pytest.approx(1.75, rel=1e-5)


@pytest.mark.parametrize(
    "value", [0, 0.0, -1.0, 1e-10, 1e10, float("nan"), float("inf"), "1", None, True, 1 + 0j, [1.0]]
)
def test_a_clip_norm_that_is_not_allowed(value):
    with pytest.raises(ValueError, match="l2_clip_norm="):
        check_clip_norm(value)
