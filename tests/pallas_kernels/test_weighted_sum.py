"""Weighted sums over examples: both implementations, compiled and on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import weighted_sum as module
from pallas_kernels.weighted_sum import weighted_sum

IMPLEMENTATIONS = [
    functools.partial(weighted_sum, implementation="xla"),
    functools.partial(weighted_sum, implementation="xla", all_finite=True),
    functools.partial(weighted_sum, implementation="triton", interpret=True),
]


def make(shape, dtype):
    random = np.random.default_rng(0)
    rows = jnp.asarray(random.normal(size=shape), jnp.float32).astype(dtype)
    return rows, jnp.asarray(random.uniform(size=shape[0]), jnp.float32)


def check(got, rows, weights):
    rows, weights = (np.asarray(x, np.float64) for x in (rows, weights))
    expected = np.tensordot(weights, rows, 1)
    assert got.dtype == jnp.float32
    assert got.shape == expected.shape
    scale = np.tensordot(weights, np.abs(rows), 1)
    # Each term meets a rounding a sum, and one of its own.
    assert (np.abs(got - expected) <= len(rows) * 2.0**-23 * scale).all()


@pytest.mark.parametrize("call", IMPLEMENTATIONS)
@settings(max_examples=12, deadline=None)
@given(
    count=st.integers(1, 9),
    dims=st.sampled_from([(), (1,), (3, 5), (2048,), (41, 100)]),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
)
def test_is_the_sum_in_float64(call, count, dims, dtype):
    rows, weights = make((count, *dims), dtype)
    check(call(rows, weights), rows, weights)


@pytest.mark.parametrize("call", IMPLEMENTATIONS[::2])
def test_what_weighs_nothing_is_not_there(call):
    rows, weights = make((6, 50), "bfloat16")
    weights = weights.at[jnp.asarray([1, 4])].set(0.0)
    poisoned = rows.at[1].set(jnp.nan).at[4, 7].set(jnp.inf)
    np.testing.assert_array_equal(call(poisoned, weights), call(rows, weights))
    assert np.isfinite(call(poisoned, weights)).all()


@pytest.mark.parametrize(
    ("rows", "weights", "options", "message"),
    [
        ((3, 2), (2,), {}, r"weights has shape \(2,\)"),
        ((3, 2), (3, 1), {}, r"weights has shape \(3, 1\)"),
        ((3, 2), (3,), {"implementation": "cuda"}, "implementation='cuda'"),
    ],
)
def test_refuses(rows, weights, options, message):
    with pytest.raises(ValueError, match=message):
        weighted_sum(jnp.ones(rows), jnp.ones(weights), **options)


def test_a_kernel_that_cannot_run_says_why(monkeypatch):
    monkeypatch.setattr(module, "wrong_device", lambda name: "needs a GPU")
    with pytest.raises(ValueError, match="cannot do this call: needs a GPU"):
        weighted_sum(jnp.ones((3, 2)), jnp.ones(3), implementation="triton")


@pytest.mark.aot
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("card", ["a100", "h100"])
def test_compiles(offline, card, dtype):
    rows = jax.ShapeDtypeStruct((18, 768, 3001), jnp.dtype(dtype))
    weights = jax.ShapeDtypeStruct((18,), jnp.float32)
    run = functools.partial(module._triton, interpret=False)
    compiled = offline.compile_for(card, run, rows, weights, allow_spills=False)
    assert compiled.as_text().count("__gpu$xla.gpu.triton") == 1
    assert compiled.memory_analysis().temp_size_in_bytes <= 1024


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("shape", [(16, 768, 3072), (1, 600, 500), (7, 2**18 + 1)])
def test_on_a_gpu(shape, dtype):
    rows, weights = make(shape, dtype)
    check(weighted_sum(rows, weights, implementation="triton"), rows, weights)
    weights = weights.at[0].set(0.0)
    got = weighted_sum(rows.at[0].set(jnp.nan), weights, implementation="triton")
    check(got, rows.at[0].set(0), weights)


@pytest.mark.parametrize("call", IMPLEMENTATIONS[::2])
def test_under_vmap(call):
    """Audits run whole training steps side by side."""
    rows, weights = make((4, 3, 20), "float32")
    several = jnp.stack([weights[:3], 2 * weights[1:]])
    got = jax.vmap(call, in_axes=(0, None))(rows, several[0])
    for one, result in zip(rows, got, strict=True):
        check(result, one, several[0])
    for one, result in zip(
        several, jax.vmap(call, in_axes=(None, 0))(rows[0], several), strict=True
    ):
        check(result, rows[0], one)
