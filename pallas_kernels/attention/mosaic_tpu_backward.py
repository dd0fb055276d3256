"""The backward pass of :mod:`pallas_kernels.attention.mosaic_tpu`: two kernels.

Both compute the tile's probabilities p = exp(min(x, U) − lse) again. The one for the keys
goes through the rows that see a block of keys, for every query head of the group, with
the keys along the sublanes: the statistics of the rows then broadcast as they lie in
memory, and no product needs a transposed tile. The one for the queries goes through the
keys that a block of rows sees, with the rows along the sublanes.

Two kernels multiply seven times a tile where one could do with five; but one kernel would
have to add into the gradient of the queries from all blocks of keys, which takes a
float32 copy of it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.attention import common, tile
from pallas_kernels.attention.fused import NOTHING_SEEN
from pallas_kernels.attention.mosaic_tpu_tiling import (
    Blocks,
    Tiling,
    by_head,
    kv_head,
    pick,
    product,
    to_column,
)
from pallas_kernels.attention.spec import AttentionSpec


def backward(
    query: Float[Array, "b t n h"],
    key: Float[Array, "b s k h"],
    value: Float[Array, "b s k h"],
    value_scale: Float32[Array, "b k s"] | None,
    lengths: Int32[Array, "b"],
    lse: Float32[Array, "b n t"],
    delta: Float32[Array, "b n t"],
    d_out: Float[Array, "b t n h"],
    spec: AttentionSpec,
    *,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See :class:`pallas_kernels.attention.fused.Backend`."""
    num_rows, num_keys = query.shape[1], key.shape[1]
    tiling = Tiling.make(spec, num_rows, num_keys, blocks or Blocks())
    q, do = (by_head(x, tiling.query) for x in (query, d_out))
    k, v = (by_head(x, tiling.key) for x in (key, common.clipped(value, value_scale)))
    # Rows that are not there have no weight anywhere.
    padding = ((0, 0), (0, 0), (0, 0), (0, -num_rows % tiling.query))
    lse = jnp.pad(lse[:, :, None], padding, constant_values=NOTHING_SEEN)
    delta = jnp.pad(delta[:, :, None], padding)
    operands = (lengths, q, k, v, do, lse, delta)
    dk, dv = _key_gradients(operands, tiling, interpret)
    dq = _query_gradient(operands, tiling, interpret)
    dq, dk, dv = (jnp.swapaxes(x, 1, 2) for x in (dq, dk, dv))
    dq, dk, dv = dq[:, :num_rows], dk[:, :num_keys], dv[:, :num_keys]
    return dq, dk, common.value_gradient(dv, value, value_scale, spec)


def _key_gradients(
    operands: tuple[jax.Array, ...], tiling: Tiling, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    lengths, q, k, v, do, lse, delta = operands
    batch, heads, _, depth = q.shape
    kv_heads = k.shape[1]
    groups = heads // kv_heads

    def row_index(b: Any, h: Any, j: Any, g: Any, step: Any, lengths: Any) -> Any:
        first, last = tiling.query_span(j, lengths[b])
        return b, h * groups + g, pick(first, step, last)

    def row_block(*index: Any) -> Any:
        return *row_index(*index), 0

    def row_statistic(*index: Any) -> Any:
        b, h, i = row_index(*index)
        return b, h, 0, i

    def key_block(b: Any, h: Any, j: Any, g: Any, step: Any, lengths: Any) -> Any:
        return b, h, j, 0

    rows = pl.BlockSpec((1, 1, tiling.query, depth), row_block)
    statistic = pl.BlockSpec((1, 1, 1, tiling.query), row_statistic)
    keys = pl.BlockSpec((1, 1, tiling.key, depth), key_block)
    gradient = jax.ShapeDtypeStruct(k.shape, k.dtype)
    dk, dv = pl.pallas_call(
        functools.partial(_key_kernel, tiling=tiling, groups=groups),
        out_shape=[gradient, gradient],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, kv_heads, tiling.key_blocks, groups, tiling.query_steps()),
            in_specs=[rows, keys, keys, rows, statistic, statistic],
            out_specs=[keys, keys],
            scratch_shapes=[pltpu.VMEM((tiling.key, depth), jnp.float32)] * 2,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * 3 + ("arbitrary",) * 2
        ),
        cost_estimate=tiling.cost(q, products=4, once=(k, v, k, v), moving=tiling.query),
        interpret=interpret,
        name=f"attention_{tiling.spec.mode}_backward_keys",
    )(lengths, q, k, v, do, lse, delta)
    return dk, dv


def _key_kernel(
    lengths: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    do_ref: Any,
    lse_ref: Any,
    delta_ref: Any,
    dk_ref: Any,
    dv_ref: Any,
    dk_sum: Any,
    dv_sum: Any,
    *,
    tiling: Tiling,
    groups: int,
) -> None:
    spec = tiling.spec
    b, j, g, step = (pl.program_id(axis) for axis in (0, 2, 3, 4))
    length = lengths[b]
    first, last = tiling.query_span(j, length)

    @pl.when((g == 0) & (step == 0))
    def _() -> None:
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    def add(seen: jax.Array | None) -> None:
        """Tiles are [keys, rows]."""
        q, do = q_ref[0, 0], do_ref[0, 0]
        x = product(k_ref[0, 0], q, (1, 1)) * spec.scale
        dp = product(v_ref[0, 0], do, (1, 1))
        p, ds = tile.logit_gradient(spec, x, dp, lse_ref[0, 0], delta_ref[0, 0], seen)
        dv_sum[...] += product(p.astype(do.dtype), do, (1, 0))
        dk_sum[...] += product(ds.astype(q.dtype), q, (1, 0))

    tiling.visit(first + step, j, length, first + step <= last, 1, add)

    @pl.when((g == groups - 1) & (step == tiling.query_steps() - 1))
    def _() -> None:
        dk_ref[0, 0] = (dk_sum[...] * spec.scale).astype(dk_ref.dtype)
        dv_ref[0, 0] = dv_sum[...].astype(dv_ref.dtype)


def _query_gradient(operands: tuple[jax.Array, ...], tiling: Tiling, interpret: bool) -> jax.Array:
    lengths, q, k, v, do, lse, delta = operands
    batch, heads, _, depth = q.shape
    groups = heads // k.shape[1]

    def row_block(b: Any, h: Any, i: Any, step: Any, lengths: Any) -> Any:
        return b, h, i, 0

    def row_statistic(b: Any, h: Any, i: Any, step: Any, lengths: Any) -> Any:
        return b, h, 0, i

    def key_block(b: Any, h: Any, i: Any, step: Any, lengths: Any) -> Any:
        first, last = tiling.key_span(i, lengths[b])
        return b, kv_head(h, groups), pick(first, step, last), 0

    rows = pl.BlockSpec((1, 1, tiling.query, depth), row_block)
    statistic = pl.BlockSpec((1, 1, 1, tiling.query), row_statistic)
    keys = pl.BlockSpec((1, 1, tiling.key, depth), key_block)
    return pl.pallas_call(
        functools.partial(_query_kernel, tiling=tiling),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, heads, tiling.query_blocks, tiling.key_steps()),
            in_specs=[rows, keys, keys, rows, statistic, statistic],
            out_specs=rows,
            scratch_shapes=[
                pltpu.VMEM((tiling.query, depth), jnp.float32),
                pltpu.VMEM((tiling.query, 1), jnp.float32),
                pltpu.VMEM((tiling.query, 1), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        cost_estimate=tiling.cost(q, products=3, once=(q, do, q), moving=tiling.key),
        interpret=interpret,
        name=f"attention_{tiling.spec.mode}_backward_queries",
    )(lengths, q, k, v, do, lse, delta)


def _query_kernel(
    lengths: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    do_ref: Any,
    lse_ref: Any,
    delta_ref: Any,
    dq_ref: Any,
    dq_sum: Any,
    lse: Any,
    delta: Any,
    *,
    tiling: Tiling,
) -> None:
    spec = tiling.spec
    b, i, step = (pl.program_id(axis) for axis in (0, 2, 3))
    length = lengths[b]
    first, last = tiling.key_span(i, length)

    @pl.when(step == 0)
    def _() -> None:
        dq_sum[...] = jnp.zeros_like(dq_sum)
        lse[...] = to_column(lse_ref[0, 0])
        delta[...] = to_column(delta_ref[0, 0])

    def add(seen: jax.Array | None) -> None:
        """Tiles are [rows, keys]."""
        k = k_ref[0, 0]
        x = product(q_ref[0, 0], k, (1, 1)) * spec.scale
        dp = product(do_ref[0, 0], v_ref[0, 0], (1, 1))
        _, ds = tile.logit_gradient(spec, x, dp, lse[...], delta[...], seen)
        dq_sum[...] += product(ds.astype(k.dtype), k, (1, 0))

    tiling.visit(i, first + step, length, first + step <= last, 0, add)

    @pl.when(step == tiling.key_steps() - 1)
    def _() -> None:
        dq_ref[0, 0] = (dq_sum[...] * spec.scale).astype(dq_ref.dtype)
