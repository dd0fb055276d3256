"""Attention over many keys through XLA: memory for one chunk of keys and some rows at a time.

The functions are those of a back end of kernels (:class:`fused.Backend`), for devices that
have none. Record mode sums at most ``common.CHUNK`` keys in floating point and goes on in
integers, as the kernels do. No mode but ``record``'s sums adds noise here.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.attention import common, tile
from pallas_kernels.attention.common import CHUNK, Units
from pallas_kernels.attention.fused import NOTHING_SEEN
from pallas_kernels.attention.spec import AttentionSpec

row_dots = common.row_dots
value_scale = common.value_scale

# Always as many: products of another shape may be rounded otherwise, and devices that share
# the rows shall make the same integers as one.
ROWS = 128


def unsupported(spec: AttentionSpec, query: Any, key: Any, *, has_mask: bool) -> str | None:
    """See :class:`pallas_kernels.attention.fused.Backend`."""
    del spec, query, key
    return "a mask array is given; causal, window and lengths are known only" if has_mask else None


def sums(
    query: Float[Array, "b t n h"],
    key: Float[Array, "b s k h"],
    value: Float[Array, "b s k h"],
    value_scale: Float32[Array, "b k s"] | None,
    lengths: Int32[Array, "b"],
    spec: AttentionSpec,
    units: Units,
    *,
    blocks: Any = None,
    interpret: bool = False,
) -> tuple[Int32[Array, "b t n h"], Int32[Array, "b n t"]]:
    """See :class:`pallas_kernels.attention.fused.Backend`."""
    del blocks, interpret
    key, value = _whole_chunks(key), _whole_chunks(common.clipped(value, value_scale))
    heads = query.shape[2]

    def some_rows(rows: jax.Array, q: jax.Array) -> tuple[jax.Array, jax.Array]:
        def add(chunk: jax.Array, totals: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
            v = _chunk(value, chunk)
            logits, seen = _logits(q, _chunk(key, chunk), rows, chunk, lengths, spec)
            weights = common.bounded_weights(logits, spec.logit_bound, seen)
            numerator = _product("bkgts,bskh->btkgh", weights.astype(v.dtype), v)
            return (
                totals[0] + tile.fixed_point(numerator, units.numerator),
                totals[1] + tile.fixed_point(common.sum_by_halves(weights), units.denominator),
            )

        b, t, k, g, h = q.shape
        zeros = jnp.zeros((b, t, k, g, h), jnp.int32), jnp.zeros((b, k, g, t), jnp.int32)
        numerator, denominator = _over_chunks(key, add, zeros)
        return numerator.reshape(b, t, heads, h), denominator.reshape(b, heads, t).swapaxes(1, 2)

    numerator, denominator = _over_rows(some_rows, _grouped(query, key))
    return numerator, denominator.swapaxes(1, 2)


def forward(
    query: Float[Array, "b t n h"],
    key: Float[Array, "b s k h"],
    value: Float[Array, "b s k h"],
    value_scale: Float32[Array, "b k s"] | None,
    noise: None,
    lengths: Int32[Array, "b"],
    spec: AttentionSpec,
    *,
    blocks: Any = None,
    interpret: bool = False,
    keep_clean: bool = True,
) -> tuple[Float32[Array, "b t n h"], Float32[Array, "b n t"], None]:
    """Softmax attention and its log-sum-exp, no noise; the output stays in float32."""
    assert spec.mode == "exact"
    assert noise is None
    del blocks, interpret, keep_clean
    key, value = _whole_chunks(key), _whole_chunks(common.clipped(value, value_scale))
    heads = query.shape[2]

    def some_rows(rows: jax.Array, q: jax.Array) -> tuple[jax.Array, jax.Array]:
        def add(chunk: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            total, weight_sum, top = carry
            logits, seen = _logits(q, _chunk(key, chunk), rows, chunk, lengths, spec)
            logits = tile.hide(logits, seen, tile.HIDDEN)
            new_top = jnp.maximum(top, jnp.max(logits, axis=-1))
            weights, shrink = jnp.exp(logits - new_top[..., None]), jnp.exp(top - new_top)
            v = _chunk(value, chunk)
            part = _product("bkgts,bskh->bkgth", weights.astype(v.dtype), v)
            total = total * shrink[..., None] + part
            return total, weight_sum * shrink + jnp.sum(weights, axis=-1), new_top

        b, t, k, g, h = q.shape
        zeros = jnp.zeros((b, k, g, t, h), jnp.float32), jnp.zeros((b, k, g, t), jnp.float32)
        top = jnp.full((b, k, g, t), tile.LEAST)
        total, weight_sum, top = _over_chunks(key, add, (*zeros, top))
        is_empty = weight_sum == 0.0
        weight_sum = jnp.where(is_empty, 1.0, weight_sum)
        out = (total / weight_sum[..., None]).transpose(0, 3, 1, 2, 4).reshape(b, t, heads, h)
        lse = jnp.where(is_empty, NOTHING_SEEN, top + jnp.log(weight_sum))
        return out, lse.reshape(b, heads, t).swapaxes(1, 2)

    out, lse = _over_rows(some_rows, _grouped(query, key))
    return out, lse.swapaxes(1, 2), None


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
    blocks: Any = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See :class:`pallas_kernels.attention.fused.Backend`; gradients in float32."""
    del blocks, interpret
    num_rows, num_keys = query.shape[1], key.shape[1]
    k_all, v_all = _whole_chunks(key), _whole_chunks(common.clipped(value, value_scale))
    q_all, do_all = _whole_rows(_grouped(query, key)), _whole_rows(_grouped(d_out, key))
    # Rows that are not there have no weight anywhere.
    lse_all, delta_all = (
        _whole_rows(_grouped(x.swapaxes(1, 2), key), filler)
        for x, filler in ((lse, NOTHING_SEEN), (delta, 0.0))
    )

    def one_chunk(dq: jax.Array, chunk: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        k, v = _chunk(k_all, chunk), _chunk(v_all, chunk)

        def add(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            dq, dk, dv = carry
            q, do, row_lse, row_delta = (x[i] for x in (q_all, do_all, lse_all, delta_all))
            rows = i * q.shape[1] + jnp.arange(q.shape[1], dtype=jnp.int32)
            logits, seen = _logits(q, k, rows, chunk, lengths, spec)
            by_row = (x.transpose(0, 2, 3, 1)[..., None] for x in (row_lse, row_delta))
            row_lse, row_delta = by_row
            d_weights = _product("btkgh,bskh->bkgts", do, v)
            p, ds = tile.logit_gradient(spec, logits, d_weights, row_lse, row_delta, seen)
            short = ds.astype(q.dtype)
            dq = dq.at[i].add(_product("bkgts,bskh->btkgh", short, k))
            dk = dk + _product("bkgts,btkgh->bskh", short, q)
            return dq, dk, dv + _product("bkgts,btkgh->bskh", p.astype(do.dtype), do)

        zeros = jnp.zeros(k.shape, jnp.float32)
        dq, dk, dv = jax.lax.fori_loop(0, q_all.shape[0], add, (dq, zeros, zeros))
        return dq, (dk, dv)

    chunks = jnp.arange(k_all.shape[1] // CHUNK, dtype=jnp.int32)
    dq, parts = jax.lax.scan(one_chunk, jnp.zeros(q_all.shape, jnp.float32), chunks)
    dk, dv = (jnp.moveaxis(x, 0, 1).reshape(k_all.shape)[:, :num_keys] for x in parts)
    dq = jnp.moveaxis(dq, 0, 1).reshape(query.shape[0], -1, *query.shape[2:])[:, :num_rows]
    dv = common.value_gradient(dv, value, value_scale, spec)
    return dq * jnp.float32(spec.scale), dk * jnp.float32(spec.scale), dv


def _logits(
    q: Float[Array, "b t k g h"],
    k: Float[Array, "b s k h"],
    rows: Int32[Array, "t"],
    chunk: jax.Array,
    lengths: Int32[Array, "b"],
    spec: AttentionSpec,
) -> tuple[Float32[Array, "b k g t s"], jax.Array | None]:
    """Logits of some rows over one chunk of the keys, and which of them are seen."""
    logits = _product("btkgh,bskh->bkgts", q, k) * jnp.float32(spec.scale)
    start = chunk * CHUNK
    seen = common.allowed_columns(spec, rows - start, CHUNK, lengths - start, None)
    return logits, None if seen is None else seen[:, :, None]


def _product(subscripts: str, first: jax.Array, second: jax.Array) -> jax.Array:
    return jnp.einsum(
        subscripts, first, second, preferred_element_type=jnp.float32,
        precision=jax.lax.Precision.HIGHEST if first.dtype == jnp.float32 else None,
    )  # fmt: skip


def _grouped(x: Float[Array, "b t n *h"], key: jax.Array) -> Float[Array, "b t k g *h"]:
    """Query heads by the key head that they read."""
    kv_heads = key.shape[2]
    return x.reshape(*x.shape[:2], kv_heads, x.shape[2] // kv_heads, *x.shape[3:])


def _chunk(x: jax.Array, chunk: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, chunk * CHUNK, CHUNK, axis=1)


def _whole_chunks(x: jax.Array) -> jax.Array:
    """Zero rows up to a multiple of a chunk: beyond every length."""
    missing = -x.shape[1] % CHUNK
    return jnp.pad(x, [(0, 0), (0, missing), (0, 0), (0, 0)]) if missing else x


def _over_chunks(key: jax.Array, add: Callable[..., Any], carry: Any) -> Any:
    return jax.lax.fori_loop(0, key.shape[1] // CHUNK, add, carry)


def _whole_rows(x: Float[Array, "b t *d"], filler: float = 0.0) -> Float[Array, "c b r *d"]:
    """Rows as chunks of ``ROWS``, the last one filled up."""
    missing = -x.shape[1] % ROWS
    x = jnp.pad(x, [(0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)], constant_values=filler)
    return jnp.moveaxis(x.reshape(x.shape[0], -1, ROWS, *x.shape[2:]), 1, 0)


def _over_rows(
    run: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]], x: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """``run(numbers, rows)`` for chunks of the rows, its results [b, rows, ...] put together."""
    chunks = _whole_rows(x)
    numbers = jnp.arange(chunks.shape[0] * chunks.shape[2], dtype=jnp.int32)
    parts = jax.lax.map(lambda a: run(*a), (numbers.reshape(chunks.shape[0], -1), chunks))
    first, second = (
        jnp.moveaxis(part, 0, 1).reshape(x.shape[0], -1, *part.shape[3:])[:, : x.shape[1]]
        for part in parts
    )
    return first, second
