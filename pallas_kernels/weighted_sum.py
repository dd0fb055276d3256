"""Weighted sums of per-example gradients, in float32, in one pass over them.

XLA reads 16-bit entries of a sum over the leading axis a few bytes at a time, at a third of
an H100's bandwidth; on NVIDIA GPUs a kernel reads them sixteen bytes a thread and load.
"""

import functools
import math
from typing import Any, Literal

import jax
import jax.custom_batching
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Float32

from pallas_kernels import partition
from pallas_kernels.devices import wrong_device
from pallas_kernels.manual import result

Implementation = Literal["triton", "xla"]

_BLOCK = 2048  # entries of a program
_WARPS = 4
_AHEAD = 4  # examples whose entries are fetched together
# Smaller leaves are left to XLA, which makes one launch of several.
_LEAST = 2**16


def weighted_sum(
    rows: Float[Array, "B *dims"],
    weights: Float32[Array, "B"],
    *,
    all_finite: bool = False,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> Float32[Array, "*dims"]:
    """Σ_b w_b x_b over the leading axis; a row of weight 0 counts for nothing, whatever is in it.

    Products and sums are float32. Where a row's weight is 0 its entries are not multiplied: NaN
    and infinities there do not reach the sum.

    Args:
        rows: [B, *dims], float32, bfloat16 or float16.
        weights: float32 [B].
        all_finite: a promise that all entries are, which XLA then multiplies as a matrix; without
            it NaN and infinities may weigh nothing and be there.
        implementation: ``'triton'`` (NVIDIA GPUs) or ``'xla'``; None takes the faster one here.
        interpret: run the kernel in Pallas's interpreter, on any device; for tests.

    Returns:
        float32 [*dims].

    Raises:
        ValueError: for shapes or names that do not fit.

    Example:
        >>> rows = jnp.asarray([[1.0, 2.0], [jnp.nan, 1.0], [0.5, 0.0]])
        >>> weighted_sum(rows, jnp.asarray([2.0, 0.0, 1.0])).tolist()
        [2.5, 4.0]
    """
    if rows.ndim < 1 or weights.shape != rows.shape[:1]:
        raise ValueError(
            f"weights has shape {weights.shape}: allowed is one weight for each of the rows, "
            f"whose shape is {rows.shape}."
        )
    if implementation not in (None, "triton", "xla"):
        raise ValueError(f"implementation={implementation!r}: allowed are None, 'triton', 'xla'.")
    reason = None if interpret else wrong_device("triton")
    if implementation == "triton" and reason is not None:
        raise ValueError(f"implementation='triton' cannot do this call: {reason}.")
    size = math.prod(rows.shape[1:])
    fits = size >= _LEAST and rows.size < 2**31
    if implementation == "xla" or (implementation is None and (reason is not None or not fits)):
        return _xla(rows, weights, all_finite)
    if rows.size >= 2**31:
        raise ValueError(f"rows has {rows.size} entries: implementation='triton' takes 2³¹ - 1.")
    return _split(interpret)(rows, weights)


@functools.cache
def _split(interpret: bool) -> Any:
    """The kernel, for rows that may lie on several devices; under ``vmap`` it is XLA's sum."""
    split = partition.split_and_add(functools.partial(_triton, interpret=interpret))
    run = jax.custom_batching.custom_vmap(split)

    @run.def_vmap  # type: ignore[untyped-decorator]
    def _(_: int, batched: list[bool], rows: jax.Array, weights: jax.Array) -> tuple[Any, bool]:
        axes = [0 if b else None for b in batched]
        return jax.vmap(functools.partial(_xla, all_finite=False), axes)(rows, weights), True

    return run


def _xla(rows: jax.Array, weights: jax.Array, all_finite: bool) -> jax.Array:
    entries = rows.astype(jnp.float32)
    if not all_finite:
        counts = (weights != 0.0).reshape(-1, *[1] * (rows.ndim - 1))
        entries = jnp.where(counts, entries, 0.0)
    return jnp.einsum("b,b...->...", weights, entries, precision=jax.lax.Precision.HIGHEST)


def _triton(rows: jax.Array, weights: jax.Array, interpret: bool) -> jax.Array:
    count, *dims = rows.shape
    flat = rows.reshape(count, -1)
    size = flat.shape[1]
    made = pl.pallas_call(
        functools.partial(_kernel, count, size),
        out_shape=result((size,), jnp.float32),
        grid=(pl.cdiv(size, _BLOCK),),
        in_specs=[pl.BlockSpec(x.shape, lambda i, n=x.ndim: (0,) * n) for x in (flat, weights)],
        out_specs=pl.BlockSpec((size,), lambda i: (0,)),
        compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=1),
        interpret=interpret,
        name="weighted_sum",
    )(flat, weights)
    return made.reshape(dims)


def _kernel(count: int, size: int, rows_ref: Any, weights_ref: Any, out_ref: Any) -> None:
    start = pl.program_id(0) * _BLOCK
    place = pl.ds(start, _BLOCK)
    mask = start + jnp.arange(_BLOCK, dtype=jnp.int32) < size

    def add(total: jax.Array, first: Any, examples: int) -> jax.Array:
        entries = [
            plgpu.load(rows_ref.at[first + k, place], mask=mask, other=0.0) for k in range(examples)
        ]
        for k, x in enumerate(entries):
            weight = weights_ref[first + k]
            total = total + jnp.where(weight == 0.0, 0.0, weight * x.astype(jnp.float32))
        return total

    turns = count // _AHEAD
    total = jax.lax.fori_loop(
        0,
        turns,
        lambda i, total: add(total, i * _AHEAD, _AHEAD),
        jnp.zeros(_BLOCK, jnp.float32),
    )
    total = add(total, jnp.int32(turns * _AHEAD), count % _AHEAD)
    plgpu.store(out_ref.at[place], total, mask=mask)
