"""Clipping factors by the Hopper kernel, against their definition."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import common, mosaic_gpu_factors


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 200, 3, 128), "bfloat16"),
        ((1, 1000, 2, 64), "float16"),
        ((2, 264, 1, 256), "bfloat16"),
    ],
)
def test_factors_are_those_of_the_definition_and_never_larger(shape, dtype):
    random = np.random.default_rng(0)
    rows = random.normal(size=shape) * random.uniform(0, 2, size=(*shape[:3], 1))
    value = jnp.asarray(rows).astype(dtype)
    value = value.at[0, 5, 0, 3].set(jnp.nan).at[0, 70, 0, 1].set(jnp.inf).at[0, 9].set(0)
    clip = 0.9 * shape[3] ** 0.5
    factors = mosaic_gpu_factors.value_factors(value, clip)
    scale = np.asarray(factors.scale, np.float64)
    expected = np.asarray(common.row_scales(value, clip).swapaxes(1, 2), np.float64)
    num_keys = shape[1]
    assert scale.shape[2] % 128 == 0
    assert (scale[:, :, num_keys:] == 1).all()
    scale = scale[:, :, :num_keys]
    # The approximate reciprocal root is within a few units of float32's last place.
    assert (scale <= expected * (1 + 2.0**-21)).all()
    step = 2.0**-7 if dtype == "bfloat16" else 2.0**-10
    assert (expected - scale <= step * expected + 1e-7).all()
    assert scale[0, 0, 5] == scale[0, 0, 70] == 0
    assert scale[0, 0, 9] == 1
    dirty = np.zeros((shape[0], shape[2]), bool)
    dirty[0, 0] = True
    np.testing.assert_array_equal(np.asarray(factors.dirty) == 1, dirty)
