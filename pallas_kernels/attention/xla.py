"""Attention through XLA, with memory linear in the number of query rows.

Up to 256 rows it is one einsum; above, chunks of 256 rows go through ``lax.map`` under
``jax.checkpoint``, so that the backward pass recomputes a chunk's weights (and its
noise, from the counters) instead of keeping them.

Matrix products take the inputs in their own format and accumulate in float32. In
record mode the sum over the keys has the fixed shape of
:func:`pallas_kernels.attention.common.sum_over_keys`.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.attention import common, tile
from pallas_kernels.attention.common import Noise
from pallas_kernels.attention.spec import AttentionSpec

ROWS = 256


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    spec: AttentionSpec,
    *,
    noise: Noise | None,
    lengths: jax.Array | None,
    mask: jax.Array | None,
) -> jax.Array:
    """See :func:`pallas_kernels.attention.attention`, whose checks have passed."""
    batch, num_rows, heads, depth = query.shape
    if spec.is_noisy:
        value = common.clip_rows(value, spec.value_clip).astype(value.dtype)

    def chunk(rows: jax.Array, q: jax.Array, m: jax.Array | None) -> jax.Array:
        return _chunk(q, key, value, spec, rows=rows, noise=noise, lengths=lengths, mask=m)

    if num_rows <= ROWS:
        return chunk(jnp.arange(num_rows, dtype=jnp.uint32), query, mask)

    chunks = -(-num_rows // ROWS)
    padding = chunks * ROWS - num_rows
    q = jnp.pad(query, ((0, 0), (0, padding), (0, 0), (0, 0)))
    q = q.reshape(batch, chunks, ROWS, heads, depth).swapaxes(0, 1)
    rows = jnp.arange(chunks * ROWS, dtype=jnp.uint32).reshape(chunks, ROWS)
    if mask is not None and mask.shape[2] > 1:
        m = jnp.pad(mask, ((0, 0), (0, 0), (0, padding), (0, 0)))
        m = jnp.moveaxis(m.reshape(*m.shape[:2], chunks, ROWS, m.shape[3]), 2, 0)
        out = jax.lax.map(jax.checkpoint(lambda x: chunk(x[0], x[1], x[2])), (rows, q, m))
    else:
        out = jax.lax.map(jax.checkpoint(lambda x: chunk(x[0], x[1], mask)), (rows, q))
    return out.swapaxes(0, 1).reshape(batch, chunks * ROWS, heads, depth)[:, :num_rows]


def _chunk(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    spec: AttentionSpec,
    *,
    rows: jax.Array,
    noise: Noise | None,
    lengths: jax.Array | None,
    mask: jax.Array | None,
) -> jax.Array:
    """Attention of some rows over all keys; ``value`` is clipped already."""
    batch, num_rows, heads, depth = query.shape
    num_keys, kv_heads = key.shape[1:3]
    groups = heads // kv_heads
    q = query.reshape(batch, num_rows, kv_heads, groups, depth)
    precision = _precision(query.dtype)
    logits = jnp.einsum(
        "btkgh,bskh->bkgts", q, key, precision=precision, preferred_element_type=jnp.float32
    )
    logits = logits * jnp.float32(spec.scale)
    allowed = common.allowed_columns(spec, rows, num_keys, lengths, mask)
    if allowed is not None:
        # [B|1, N|1, t, S] → [B|1, K|1, G|1, t, S]
        split = (kv_heads, groups) if allowed.shape[1] == heads else (1, 1)
        allowed = allowed.reshape(allowed.shape[0], *split, *allowed.shape[2:])

    if spec.mode == "record":
        assert noise is not None
        weights = common.bounded_weights(logits, spec.logit_bound, allowed)
        numerator, denominator = common.sum_over_keys(weights, value)
        numerator = numerator.transpose(0, 3, 1, 2, 4).reshape(batch, num_rows, heads, depth)
        denominator = denominator.transpose(0, 3, 1, 2).reshape(batch, num_rows, heads)
        out = common.release_record(
            spec, numerator, denominator, *noise[:2], rows, noise.first_head
        )
        return out.astype(query.dtype)

    if spec.mode == "sequence":
        logits = tile.sequence_logits(logits)
    if allowed is not None:
        logits = jnp.where(allowed, logits, -jnp.inf)
    top = jnp.max(logits, axis=-1, keepdims=True)
    top = jax.lax.stop_gradient(jnp.where(jnp.isneginf(top), 0.0, top))
    weights = jnp.exp(logits - top)
    if spec.mode == "sequence":
        total = common.sum_by_halves(weights)[..., None]
    else:
        total = jnp.sum(weights, axis=-1, keepdims=True)
    # Not a division, which some programs make this of.
    weights = (weights * (1.0 / jnp.where(total == 0.0, 1.0, total))).astype(value.dtype)
    out = jnp.einsum(
        "bkgts,bskh->btkgh", weights, value, precision=precision, preferred_element_type=jnp.float32
    )
    out = out.reshape(batch, num_rows, heads, depth)
    if spec.mode == "sequence":
        assert noise is not None
        out = common.release_sequence(spec, out, *noise[:2], rows, noise.first_head)
    return out.astype(query.dtype)


def _precision(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """Float32 operands are multiplied as they are.

    Accelerators shorten them by default (to TF32, to bfloat16), which may lengthen a
    clipped row by more than the sensitivity counts, and errs by 1e-3 where float32 was
    asked for. Who wants that speed passes bfloat16.
    """
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
