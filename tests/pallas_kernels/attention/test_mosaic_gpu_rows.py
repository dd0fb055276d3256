"""Products of rows by the Hopper kernel, against their definition."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import mosaic_gpu_rows


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "dtype"), [((2, 200, 3, 128), "bfloat16"), ((1, 1000, 2, 256), "float16")]
)
def test_row_dots(shape, dtype):
    random = np.random.default_rng(1)
    first, second = (jnp.asarray(random.normal(size=shape)).astype(dtype) for _ in range(2))
    dots = np.asarray(mosaic_gpu_rows.row_dots(first, second))
    exact = np.einsum("btnh,btnh->bnt", *(np.asarray(x, np.float64) for x in (first, second)))
    np.testing.assert_allclose(dots, exact, rtol=0, atol=2.0**-20 * shape[3])
