"""Numbers of single rows for the Hopper kernels, each in one pass over the arrays.

XLA makes three launches of the clipping factors, and reduces a row for the gradients in one
thread.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention import mosaic_gpu_ops as ops
from pallas_kernels.attention import mosaic_gpu_registers as regs

_ROWS = 64
_MULTIPLE = 128
_GRID: dict[str, Any] = {
    "grid_names": ("batch", "row_tile", "head"),
    "compiler_params": plgpu.CompilerParams(
        approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
    ),
}


class Factors(NamedTuple):
    """``common.row_scales`` of a [B, S, K, H] array.

    Attributes:
        scale: [B, K, S] in the dtype of the values, rounded towards zero; S padded to a
            multiple of 128 with ones.
        dirty: int32 [B, K], 1 where a row of the head is not finite.
    """

    scale: jax.Array
    dirty: jax.Array


def value_factors(value: jax.Array, bound: float) -> Factors:
    """The factors min(1, bound/‖v‖); 0 for a row that is not finite.

    Args:
        value: bfloat16 or float16 [B, S, K, H], S a multiple of 8, H of 64.
        bound: the clip C.
    """
    batch, num_keys, heads, depth = value.shape
    padded = pl.cdiv(num_keys, _MULTIPLE) * _MULTIPLE
    scale: jax.Array = plgpu.kernel(
        functools.partial(_factor_kernel, bound),
        out_type=jax.ShapeDtypeStruct((batch, heads, padded), value.dtype),
        scratch_types={
            "tile": plgpu.SMEM((_ROWS, depth), value.dtype, transforms=regs.SWIZZLED),
            "line": plgpu.SMEM((_ROWS,), value.dtype),
            "barrier": plgpu.Barrier(),
        },
        grid=(batch, padded // _ROWS, heads),
        kernel_name="value_factors",
        **_GRID,
    )(value)
    return Factors(scale, jnp.any(scale == 0.0, axis=2).astype(jnp.int32))


def _factor_kernel(
    bound: float, value_ref: Any, scale_ref: Any, *, tile: Any, line: Any, barrier: Any
) -> None:
    batch, head = lax.axis_index("batch"), lax.axis_index("head")
    rows = pl.ds(lax.axis_index("row_tile") * _ROWS, _ROWS)
    # Rows beyond the last come as zeros, whose factor is 1.
    plgpu.copy_gmem_to_smem(value_ref.at[batch, rows, head], tile, barrier)
    plgpu.barrier_wait(barrier)
    value = plgpu.load(tile, layout=regs.TILE).astype(jnp.float32)
    square = jnp.sum(value * value, axis=1)
    factor = jnp.where(square > bound * bound, bound * lax.rsqrt(square), 1.0)
    factor = jnp.where(square < jnp.inf, factor, 0.0)  # neither infinite nor NaN
    line[...] = ops.round_towards_zero(factor, value_ref.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(line, scale_ref.at[batch, head, rows])
    plgpu.wait_smem_to_gmem(0)


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
