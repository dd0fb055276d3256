"""Noise added in one pass: the kernel and XLA's form are one function, on a public grid."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import prng

KEY = jnp.arange(11, 19, dtype=jnp.uint32)
OPTIONS = {"std": 0.75, "spacing": 2.0**-10, "divisor": 3.0}


@settings(max_examples=5, deadline=None, derandomize=True)
@given(st.integers(1, 12_000), st.sampled_from([jnp.float32, jnp.bfloat16]))
def test_the_kernel_is_the_same_function(size, dtype):
    x = jnp.linspace(-3, 3, size).astype(dtype)
    plain = prng.add_normal(x, KEY, (1, 2, 3), implementation="xla", **OPTIONS)
    kernel = prng.add_normal(x, KEY, (1, 2, 3), implementation="triton", interpret=True, **OPTIONS)
    assert plain.dtype == kernel.dtype == dtype
    np.testing.assert_array_equal(plain, kernel)


def test_it_is_the_stream_on_the_grid():
    x = jnp.zeros((7, 300))
    got = prng.add_normal(x, KEY, (1, 2, 3), **OPTIONS) * 3.0
    expected = 0.75 * prng.normal_stream(KEY, x.size, (1, 2, 3)).reshape(x.shape)
    np.testing.assert_allclose(got, expected, atol=2.0**-11 + 1e-6)
    cells = np.asarray(got, np.float64) * 2**10
    np.testing.assert_allclose(cells, np.round(cells), atol=1e-2)


def test_refusals():
    x = jnp.zeros(4)
    for name, value in (("std", 0.0), ("spacing", 0.3), ("divisor", float("nan"))):
        with pytest.raises(ValueError, match=f"{name}="):
            prng.add_normal(x, KEY, (0, 0, 0), **OPTIONS | {name: value})
    with pytest.raises(ValueError, match="implementation='cuda'"):
        prng.add_normal(x, KEY, (0, 0, 0), implementation="cuda", **OPTIONS)
    if jax.default_backend() == "cpu":
        with pytest.raises(ValueError, match="needs a GPU"):
            prng.add_normal(x, KEY, (0, 0, 0), implementation="triton", **OPTIONS)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1,), (5119,), (768, 3072)])
def test_on_a_gpu(shape):
    x = jnp.ones(shape)
    made = [
        prng.add_normal(x, KEY, (1, 2, 3), implementation=i, **OPTIONS) for i in ("xla", "triton")
    ]
    # Logarithms and cosines of two compilers: some sums fall on the other side of a half.
    difference = np.abs(np.asarray(made[0] - made[1]))
    assert difference.max() <= 2.0**-10 / 3 * 1.01
    assert (difference > 0).mean() < 0.01


@pytest.mark.aot
@pytest.mark.parametrize("card", ["a100", "h100", "rtx4090"])
def test_compiles_without_spills(offline, card):
    """One kernel; what it needs beside the array is nothing."""

    def run(x, key):
        options = {"std": 0.75, "spacing": 2.0**-10, "divisor": 3.0}
        return prng.add_normal(x, key, (1, 2, 3), **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pallas_kernels.prng.adding.wrong_device", lambda name: None)
        shapes = (
            jax.ShapeDtypeStruct((768, 3072), jnp.float32),
            jax.ShapeDtypeStruct((8,), jnp.uint32),
        )
        compiled = offline.compile_for(card, run, *shapes, allow_spills=False)
    assert compiled.as_text().count("__gpu$xla.gpu.triton") == 1
