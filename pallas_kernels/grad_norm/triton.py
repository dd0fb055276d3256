"""The norms on NVIDIA GPUs from compute capability 8.0, through Triton: one kernel a form.

A program makes one tile of XᵀG, or of both Gram matrices, in registers and writes one
number. Nothing is padded: masks keep what lies beyond an array from being read.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Float32

from pallas_kernels.grad_norm import common
from pallas_kernels.manual import result


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes of a program, powers of two; the defaults fit every card.

    Attributes:
        rows: rows of its tile.
        columns: columns of its tile (the Gram form's tiles are square: ``rows``).
        step: how much of the summed axis is fetched at a time.
        warps: warps of a program.
        stages: fetches that are on their way at a time.
    """

    rows: int = 128
    columns: int = 128
    step: int = 32
    warps: int = 8
    stages: int = 3


def default_blocks(dtype: Any) -> Blocks:
    """Float32 tiles are multiplied on the vector units, from registers: smaller ones."""
    return Blocks(64, 64, 16, 8, 2) if jnp.dtype(dtype) == jnp.float32 else Blocks()


def unsupported(x: Any, g: Any, form: common.Form) -> str | None:
    """Why these kernels cannot take a call, whatever the device; None if they can."""
    del form
    if x.shape[0] > 65535:  # of a grid's second axis
        return f"{x.shape[0]} examples; 65535 fit"
    most = max(x.shape[1] * x.shape[2], g.shape[1] * g.shape[2])
    return f"an example has {most} numbers; offsets have 31 bits" if most >= 2**31 else None


def grad_norm_squared(
    x: Float[Array, "B T P"],
    g: Float[Array, "B T Q"],
    form: common.Form,
    *,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> Float32[Array, "B"]:
    """See :func:`pallas_kernels.grad_norm.grad_norm_squared`, whose checks have passed."""
    blocks = blocks or default_blocks(x.dtype)
    (batch, length, rows), columns = x.shape, g.shape[2]
    if form == "gram":
        across = pl.cdiv(length, blocks.rows)
        tiles, kernel = across * (across + 1) // 2, _gram_kernel
    else:
        across = pl.cdiv(columns, blocks.columns)
        tiles, kernel = across * pl.cdiv(rows, blocks.rows), _direct_kernel
    parts = pl.pallas_call(
        functools.partial(kernel, blocks=blocks, across=across),
        out_shape=result((batch, tiles), jnp.float32),
        grid=(tiles, batch),
        in_specs=[pl.BlockSpec((None, *y.shape[1:]), lambda i, b: (b, 0, 0)) for y in (x, g)],
        out_specs=pl.BlockSpec((None, tiles), lambda i, b: (b, 0)),
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
        name=f"grad_norm_{form}",
    )(x, g)
    norms = common.total(parts)
    return jnp.maximum(norms, 0.0) if form == "gram" else norms


def _load(ref: Any, row: Any, rows: int, column: Any, columns: int) -> jax.Array:
    """A block of a matrix, zeros where there is none."""
    i = row + jnp.arange(rows, dtype=jnp.int32)
    j = column + jnp.arange(columns, dtype=jnp.int32)
    mask = (i < ref.shape[0])[:, None] & (j < ref.shape[1])[None, :]
    return plgpu.load(ref.at[pl.ds(row, rows), pl.ds(column, columns)], mask=mask, other=0.0)


def _direct_kernel(x_ref: Any, g_ref: Any, out_ref: Any, *, blocks: Blocks, across: int) -> None:
    tile = pl.program_id(0)
    row = jax.lax.div(tile, jnp.int32(across)) * blocks.rows
    column = jax.lax.rem(tile, jnp.int32(across)) * blocks.columns

    def step(i: jax.Array, weight: jax.Array) -> jax.Array:
        x = _load(x_ref, i * blocks.step, blocks.step, row, blocks.rows)
        g = _load(g_ref, i * blocks.step, blocks.step, column, blocks.columns)
        return weight + common.product(x, g, 0)

    zeros = jnp.zeros((blocks.rows, blocks.columns), jnp.float32)
    weight = jax.lax.fori_loop(0, pl.cdiv(x_ref.shape[0], blocks.step), step, zeros)
    out_ref[tile] = jnp.sum(jnp.sum(weight * weight, axis=1), axis=0)


def _gram_kernel(x_ref: Any, g_ref: Any, out_ref: Any, *, blocks: Blocks, across: int) -> None:
    tile = pl.program_id(0)
    i, j = common.pair(tile, across)

    def gram(ref: Any) -> jax.Array:
        def step(k: jax.Array, sums: jax.Array) -> jax.Array:
            first, second = (
                _load(ref, t * blocks.rows, blocks.rows, k * blocks.step, blocks.step)
                for t in (i, j)
            )
            return sums + common.product(first, second, 1)

        zeros = jnp.zeros((blocks.rows, blocks.rows), jnp.float32)
        return jax.lax.fori_loop(0, pl.cdiv(ref.shape[1], blocks.step), step, zeros)

    part = jnp.sum(jnp.sum(gram(x_ref) * gram(g_ref), axis=1), axis=0)
    out_ref[tile] = jnp.where(i == j, part, part + part)
