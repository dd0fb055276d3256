"""The backward pass of the Triton kernels: one kernel for dq, one for dk and dv.

Each recomputes the weights of a tile from the logits and the row's statistic, so that
nothing is kept but the inputs and two float32 a row. No program adds to what another one
writes: results do not depend on the order in which programs run.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.attention import common, tile, triton_tile
from pallas_kernels.attention.fused import NOTHING_SEEN
from pallas_kernels.attention.spec import AttentionSpec


@dataclasses.dataclass(frozen=True)
class BackwardBlocks:
    """Sizes of the backward kernels' blocks. The defaults fit every shape on every card.

    Attributes:
        rows: query rows of a program that computes dq.
        row_keys: keys of one step of its loop.
        keys: keys of a program that computes dk and dv.
        key_rows: query rows of one step of its loop.
        row_warps: warps of a program that computes dq.
        row_stages: blocks that are on their way from memory at a time there.
        key_warps: the same for dk and dv.
        key_stages: the same for dk and dv.

    Raises:
        ValueError: for a size that is not a power of two from 16 to 512, or a number of
            warps or stages that no card has.
    """

    rows: int = 32
    row_keys: int = 16
    keys: int = 32
    key_rows: int = 16
    row_warps: int = 8
    row_stages: int = 1
    key_warps: int = 8
    key_stages: int = 1

    def __post_init__(self) -> None:
        triton_tile.check_blocks(self)


def default_blocks(depth: int, dtype: Any) -> BackwardBlocks:
    """Block sizes for a head dimension and a dtype.

    They fit into the 99 KB of shared memory that the cards of capability 8.6 and 8.9 have.
    """
    if jnp.dtype(dtype) == jnp.float32:
        step = 16 if depth == 256 else 32
        return BackwardBlocks(row_keys=step, key_rows=step)
    if depth == 256:
        return BackwardBlocks(rows=64, row_keys=32, keys=32, key_rows=32)
    warps = 8 if depth == 128 else 4
    return BackwardBlocks(64, 64, 64, 64, warps, 2, warps, 2)


def backward(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    value_scale: Float32[Array, "B K S"] | None,
    lengths: Int32[Array, "B"],
    lse: Float32[Array, "B N T"],
    delta: Float32[Array, "B N T"],
    d_out: Float[Array, "B T N H"],
    spec: AttentionSpec,
    *,
    blocks: BackwardBlocks | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients for query, key and value.

    See :class:`pallas_kernels.attention.fused.Backend` for the arguments.
    """
    batch, num_rows, heads, depth = query.shape
    num_keys, kv_heads = key.shape[1:3]
    groups = heads // kv_heads
    blocks = blocks or default_blocks(depth, query.dtype)
    operands = (query, key, value, value_scale, lengths, lse, delta, d_out)
    row_params = plgpu.CompilerParams(num_warps=blocks.row_warps, num_stages=blocks.row_stages)
    key_params = plgpu.CompilerParams(num_warps=blocks.key_warps, num_stages=blocks.key_stages)

    def specs(per: int | None, kv_head: Any) -> list[pl.BlockSpec | None]:
        """``per`` query heads (None: one) and the key head ``kv_head(n)`` they belong to."""
        rows = pl.BlockSpec((None, num_rows, per, depth), lambda i, n, b: (b, 0, n, 0))
        keys = pl.BlockSpec((None, num_keys, None, depth), lambda i, n, b: (b, 0, kv_head(n), 0))
        stat = pl.BlockSpec((None, per, num_rows), lambda i, n, b: (b, n, 0))
        scale = pl.BlockSpec((None, None, num_keys), lambda i, n, b: (b, kv_head(n), 0))
        length = pl.BlockSpec((batch,), lambda i, n, b: (0,))
        no_scale = value_scale is None
        return [rows, keys, keys, None if no_scale else scale, length, stat, stat, rows]

    in_specs = specs(None, lambda n: n // groups)
    dq = pl.pallas_call(
        functools.partial(
            _query_kernel, spec=spec, num_rows=num_rows, block=blocks.rows, step=blocks.row_keys
        ),
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
        grid=(pl.cdiv(num_rows, blocks.rows), heads, batch),
        in_specs=in_specs,
        out_specs=in_specs[0],
        compiler_params=row_params,
        interpret=interpret,
        name=f"attention_{spec.mode}_dq",
    )(*operands)
    in_specs = specs(groups, lambda n: n)
    d_key = jax.ShapeDtypeStruct(key.shape, key.dtype)
    dk, dv = pl.pallas_call(
        functools.partial(
            _key_kernel,
            spec=spec,
            num_rows=num_rows,
            num_keys=num_keys,
            groups=groups,
            block=blocks.keys,
            step=blocks.key_rows,
        ),
        out_shape=(d_key, d_key),
        grid=(pl.cdiv(num_keys, blocks.keys), kv_heads, batch),
        in_specs=in_specs,
        out_specs=(in_specs[1], in_specs[2]),
        compiler_params=key_params,
        interpret=interpret,
        name=f"attention_{spec.mode}_dkv",
    )(*operands)
    return dq, dk, dv


def _weights(
    spec: AttentionSpec, logits: jax.Array, seen: jax.Array, lse: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """p, and where a gradient reaches the logit (None: everywhere).

    ``logits`` and ``lse`` are in units of ln 2.
    """
    if spec.mode == "record":
        bound = jnp.float32(spec.logit_bound * triton_tile.LOG2_E)
        weights = triton_tile.bounded_weights(logits, bound, seen)
        return weights * jnp.exp2(bound - lse), logits < bound
    if spec.mode == "sequence":
        free = logits == logits
        # Huge logits cancel to more than 0 after rounding.
        logits = jnp.minimum(tile.sequence_logits(logits) - lse, 0.0)
        return jnp.where(seen, jnp.exp2(logits), 0.0), free
    return jnp.where(seen, jnp.exp2(logits - lse), 0.0), None


def _logit_gradient(
    weights: jax.Array, free: jax.Array | None, d_weights: jax.Array, delta: jax.Array
) -> jax.Array:
    """P (dp − delta), and 0 where the bound clamps."""
    gradient = weights * (d_weights - delta)
    return gradient if free is None else jnp.where(free, gradient, 0.0)


def _load_values(
    v_ref: Any, scale_ref: Any, start: jax.Array, size: int, exists: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """Unclipped values and their factors; rows with the factor 0 may hold NaN: not read."""
    v = v_ref.at[pl.ds(start, size), :]
    if scale_ref is None:
        return triton_tile.load(v, exists[:, None]), None
    scale = triton_tile.load(scale_ref.at[pl.ds(start, size)], exists)
    return triton_tile.load(v, (scale > 0.0)[:, None]), scale


def _query_kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    scale_ref: Any,
    lengths_ref: Any,
    lse_ref: Any,
    delta_ref: Any,
    d_out_ref: Any,
    dq_ref: Any,
    *,
    spec: AttentionSpec,
    num_rows: int,
    block: int,
    step: int,
) -> None:
    """Dq of one block of query rows of one head."""
    first_row = (pl.num_programs(0) - 1 - pl.program_id(0)) * block
    length = lengths_ref[pl.program_id(2)]
    rows = first_row + jnp.arange(block, dtype=jnp.int32)
    row_slice = pl.ds(first_row, block)
    in_bounds = rows < num_rows
    q = triton_tile.load(q_ref.at[row_slice, :], in_bounds[:, None])
    d_out = triton_tile.load(d_out_ref.at[row_slice, :], in_bounds[:, None])
    lse = triton_tile.load(lse_ref.at[row_slice], in_bounds, NOTHING_SEEN)
    lse = lse[:, None] * jnp.float32(triton_tile.LOG2_E)
    delta = triton_tile.load(delta_ref.at[row_slice], in_bounds)[:, None]
    low, high = triton_tile.visible_columns(spec, rows, length)
    first = triton_tile.visible_columns(spec, first_row, length)[0]
    last = triton_tile.visible_columns(spec, first_row + (block - 1), length)[1]

    def body(j: jax.Array, dq: jax.Array) -> jax.Array:
        columns = j * step + jnp.arange(step, dtype=jnp.int32)
        exists = columns < length
        k = triton_tile.load(k_ref.at[pl.ds(j * step, step), :], exists[:, None])
        v, scale = _load_values(v_ref, scale_ref, j * step, step, exists)
        x = triton_tile.dot(q, k, transpose_b=True)
        x = x * jnp.float32(spec.scale * triton_tile.LOG2_E)
        seen = triton_tile.is_seen(spec, columns[None, :], low[:, None], high[:, None])
        weights, free = _weights(spec, x, seen, lse)
        d_weights = triton_tile.dot(d_out, v, transpose_b=True)
        if scale is not None:
            d_weights = d_weights * scale[None, :]
        d_logits = _logit_gradient(weights, free, d_weights, delta)
        return dq + triton_tile.dot(d_logits.astype(k.dtype), k)

    bounds = first // step, pl.cdiv(last, step)
    dq = jax.lax.fori_loop(*bounds, body, jnp.zeros(q.shape, jnp.float32))
    dq = (dq * jnp.float32(spec.scale)).astype(q.dtype)
    plgpu.store(dq_ref.at[row_slice, :], dq, mask=in_bounds[:, None])


def _key_kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    scale_ref: Any,
    lengths_ref: Any,
    lse_ref: Any,
    delta_ref: Any,
    d_out_ref: Any,
    dk_ref: Any,
    dv_ref: Any,
    *,
    spec: AttentionSpec,
    num_rows: int,
    num_keys: int,
    groups: int,
    block: int,
    step: int,
) -> None:
    """Dk and dv of one block of keys of one key head, summed over its query heads.

    Tiles are transposed, keys by rows: then p and ds multiply from the left.
    """
    first_key = pl.program_id(0) * block
    length = lengths_ref[pl.program_id(2)]
    columns = first_key + jnp.arange(block, dtype=jnp.int32)
    key_slice = pl.ds(first_key, block)
    exists = columns < length
    k = triton_tile.load(k_ref.at[key_slice, :], exists[:, None])
    v, scale = _load_values(v_ref, scale_ref, first_key, block, exists)

    before, after = tile.reach(spec)
    first = 0 if after is None else jnp.maximum(first_key - after, 0)
    end = jnp.int32(num_rows)
    if before is not None:
        end = jnp.minimum(end, first_key + (block + before))
    first = jnp.int32(first) // step
    blocks = jnp.maximum(pl.cdiv(end, step) - first, 0)
    # One loop over heads and rows: the pipeline does not run dry between heads.
    count = jnp.where(first_key < length, groups * blocks, 0)

    def body(j: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        dk, dv = sums
        head = jnp.int32(0) if groups == 1 else j // blocks
        start = (first + (j if groups == 1 else j % blocks)) * step
        rows = start + jnp.arange(step, dtype=jnp.int32)
        in_bounds = rows < num_rows
        row_slice = pl.ds(start, step)
        q = triton_tile.load(q_ref.at[row_slice, head, :], in_bounds[:, None])
        d_out = triton_tile.load(d_out_ref.at[row_slice, head, :], in_bounds[:, None])
        lse = triton_tile.load(lse_ref.at[head, row_slice], in_bounds, NOTHING_SEEN)
        delta = triton_tile.load(delta_ref.at[head, row_slice], in_bounds)
        x = triton_tile.dot(k, q, transpose_b=True)
        x = x * jnp.float32(spec.scale * triton_tile.LOG2_E)
        low, high = triton_tile.visible_columns(spec, rows, length)
        seen = triton_tile.is_seen(spec, columns[:, None], low[None, :], high[None, :])
        lse = lse[None, :] * jnp.float32(triton_tile.LOG2_E)
        weights, free = _weights(spec, x, seen, lse)
        dv = dv + triton_tile.dot(weights.astype(q.dtype), d_out)
        d_weights = triton_tile.dot(v, d_out, transpose_b=True)
        if scale is not None:
            d_weights = d_weights * scale[:, None]
        d_logits = _logit_gradient(weights, free, d_weights, delta[None, :])
        return dk + triton_tile.dot(d_logits.astype(q.dtype), q), dv

    zeros = jnp.zeros(k.shape, jnp.float32)
    dk, dv = jax.lax.fori_loop(0, count, body, (zeros, zeros))
    dk = dk * jnp.float32(spec.scale)
    if scale is not None:
        dv = common.through_clip(dv, v.astype(jnp.float32), scale[:, None], spec.value_clip)
    stored = (columns < num_keys)[:, None]
    plgpu.store(dk_ref.at[key_slice, :], dk.astype(k.dtype), mask=stored)
    plgpu.store(dv_ref.at[key_slice, :], dv.astype(k.dtype), mask=stored)
