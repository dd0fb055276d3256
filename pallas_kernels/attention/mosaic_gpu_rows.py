"""Products of rows for the gradients of the Hopper kernels, in one pass over the arrays.

XLA would reduce a row in one thread.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention import mosaic_gpu_registers as regs

_ROWS = 64
_GRID: dict[str, Any] = {
    "grid_names": ("batch", "row_tile", "head"),
    "compiler_params": plgpu.CompilerParams(
        approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
    ),
}


def row_dots(first: jax.Array, second: jax.Array) -> jax.Array:
    """The products of corresponding rows: float32 [B, N, T] from two [B, T, N, H].

    Args:
        first: bfloat16 or float16 [B, T, N, H], T a multiple of 8, H of 64.
        second: likewise.
    """
    batch, num_rows, heads, depth = first.shape
    tiles = pl.cdiv(num_rows, _ROWS)
    tile = plgpu.SMEM((_ROWS, depth), first.dtype, transforms=regs.SWIZZLED)
    dots: jax.Array = plgpu.kernel(
        _dot_kernel,
        out_type=jax.ShapeDtypeStruct((batch, heads, tiles * _ROWS), jnp.float32),
        scratch_types={
            "tiles": (tile, tile),
            "line": plgpu.SMEM((_ROWS,), jnp.float32),
            "barrier": plgpu.Barrier(num_arrivals=2),
        },
        grid=(batch, tiles, heads),
        kernel_name="row_dots",
        **_GRID,
    )(first, second)
    return dots[:, :, :num_rows]


def _dot_kernel(
    first_ref: Any, second_ref: Any, dots_ref: Any, *, tiles: Any, line: Any, barrier: Any
) -> None:
    batch, head = lax.axis_index("batch"), lax.axis_index("head")
    rows = pl.ds(lax.axis_index("row_tile") * _ROWS, _ROWS)
    for ref, tile in zip((first_ref, second_ref), tiles, strict=True):
        plgpu.copy_gmem_to_smem(ref.at[batch, rows, head], tile, barrier)
    plgpu.barrier_wait(barrier)
    first, second = (plgpu.load(x, layout=regs.TILE).astype(jnp.float32) for x in tiles)
    line[...] = jnp.sum(first * second, axis=1)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(line, dots_ref.at[batch, head, rows])
    plgpu.wait_smem_to_gmem(0)
