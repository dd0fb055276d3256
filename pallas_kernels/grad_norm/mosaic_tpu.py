"""The norms on TPUs: one kernel a form.

The grid walks (example, tile, step of the summed axis). The tile of XᵀG, or of XXᵀ and then
GGᵀ, is added up in VMEM; after its last step its square sum leaves as 8 × 128 numbers, as
wide as a vector register. Operands whose sizes are no multiples of the blocks are padded
with zeros first, in copies.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32

from pallas_kernels.grad_norm import common
from pallas_kernels.manual import result

_LANES = 128
_OUT = (8, _LANES)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes, multiples of 128; smaller where the operands are smaller.

    Attributes:
        tile: rows and columns of a tile.
        step: how much of the summed axis one step takes.
    """

    tile: int = 256
    step: int = 512


def unsupported(x: Any, g: Any, form: common.Form) -> str | None:
    """Why these kernels cannot take a call, whatever the device; None if they can."""
    del g, form
    return "float16 operands; the matrix unit takes bfloat16" if x.dtype == jnp.float16 else None


def grad_norm_squared(
    x: Float[Array, "B T P"],
    g: Float[Array, "B T Q"],
    form: common.Form,
    *,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> Float32[Array, "B"]:
    """See :func:`pallas_kernels.grad_norm.grad_norm_squared`, whose checks have passed."""
    blocks = blocks or Blocks()
    run = _gram if form == "gram" else _direct
    parts = run(x, g, blocks, interpret)
    norms = common.total(parts)
    return jnp.maximum(norms, 0.0) if form == "gram" else norms


def _block(size: int, most: int) -> int:
    """The block for an axis: ``most``, or the whole axis in multiples of 128."""
    return min(most, pl.cdiv(size, _LANES) * _LANES)


def _direct(x: jax.Array, g: jax.Array, blocks: Blocks, interpret: bool) -> jax.Array:
    batch, length = x.shape[:2]
    step = _block(length, blocks.step)
    tiles = [_block(y.shape[2], blocks.tile) for y in (x, g)]
    x, g = (common.pad(common.pad(y, 1, step), 2, n) for y, n in zip((x, g), tiles, strict=True))
    steps, across = x.shape[1] // step, g.shape[2] // tiles[1]
    grid = (batch, x.shape[2] // tiles[0], across, steps)

    def kernel(x_ref: Any, g_ref: Any, out_ref: Any, weight: Any) -> None:
        t = pl.program_id(3)

        @pl.when(t == 0)
        def _() -> None:
            weight[...] = jnp.zeros_like(weight)

        weight[...] += common.product(x_ref[0], g_ref[0], 0)

        @pl.when(t == steps - 1)
        def _() -> None:
            out_ref[0, 0] = _fold(weight[...] * weight[...])

    return pl.pallas_call(
        kernel,
        out_shape=result((batch, grid[1] * across, *_OUT), jnp.float32),
        grid=grid,
        in_specs=[
            pl.BlockSpec((1, step, tiles[0]), lambda b, i, j, t: (b, t, i)),
            pl.BlockSpec((1, step, tiles[1]), lambda b, i, j, t: (b, t, j)),
        ],
        out_specs=pl.BlockSpec((1, 1, *_OUT), lambda b, i, j, t: (b, i * across + j, 0, 0)),
        scratch_shapes=[pltpu.VMEM(tuple(tiles), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
        name="grad_norm_direct",
    )(x, g)


def _gram(x: jax.Array, g: jax.Array, blocks: Blocks, interpret: bool) -> jax.Array:
    batch, length = x.shape[:2]
    tile = _block(length, blocks.tile)
    widths = [_block(y.shape[2], blocks.step) for y in (x, g)]
    x, g = (common.pad(common.pad(y, 1, tile), 2, n) for y, n in zip((x, g), widths, strict=True))
    rows = x.shape[1] // tile
    # The steps over x come first, then those over g.
    x_steps, g_steps = (y.shape[2] // n for y, n in zip((x, g), widths, strict=True))
    grid = (batch, rows * (rows + 1) // 2, x_steps + g_steps)

    def spec(width: int, side: int, first: int, steps: int) -> pl.BlockSpec:
        def index(b: Any, i: Any, k: Any) -> Any:
            # Steps that are the other operand's fetch nothing new.
            return b, common.pair(i, rows)[side], jnp.clip(k - first, 0, steps - 1)

        return pl.BlockSpec((1, tile, width), index)

    in_specs = [spec(widths[0], side, 0, x_steps) for side in (0, 1)]
    in_specs += [spec(widths[1], side, x_steps, g_steps) for side in (0, 1)]
    return pl.pallas_call(
        functools.partial(_gram_kernel, rows=rows, x_steps=x_steps, steps=grid[2]),
        out_shape=result((*grid[:2], *_OUT), jnp.float32),
        grid=grid,
        in_specs=in_specs,
        out_specs=pl.BlockSpec((1, 1, *_OUT), lambda b, i, k: (b, i, 0, 0)),
        scratch_shapes=[pltpu.VMEM((tile, tile), jnp.float32)] * 2,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
        name="grad_norm_gram",
    )(x, x, g, g)


def _gram_kernel(
    xi_ref: Any,
    xj_ref: Any,
    gi_ref: Any,
    gj_ref: Any,
    out_ref: Any,
    x_gram: Any,
    g_gram: Any,
    *,
    rows: int,
    x_steps: int,
    steps: int,
) -> None:
    i, j = common.pair(pl.program_id(1), rows)
    k = pl.program_id(2)

    @pl.when(k == 0)
    def _() -> None:
        x_gram[...] = jnp.zeros_like(x_gram)
        g_gram[...] = jnp.zeros_like(g_gram)

    @pl.when(k < x_steps)
    def _() -> None:
        x_gram[...] += common.product(xi_ref[0], xj_ref[0], 1)

    @pl.when(k >= x_steps)
    def _() -> None:
        g_gram[...] += common.product(gi_ref[0], gj_ref[0], 1)

    @pl.when(k == steps - 1)
    def _() -> None:
        out_ref[0, 0] = _fold(x_gram[...] * g_gram[...]) * jnp.where(i == j, 1.0, 2.0)


def _fold(tile: jax.Array) -> jax.Array:
    """The sum of a tile's 8 × 128 pieces."""
    rows, columns = tile.shape
    lanes = sum(tile[:, n : n + _LANES] for n in range(0, columns, _LANES))
    return jnp.sum(jnp.asarray(lanes).reshape(rows // 8, *_OUT), axis=0)
