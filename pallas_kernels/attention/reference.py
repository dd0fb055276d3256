"""The definition: every logit and weight in memory, float32 throughout.

Slow and plain on purpose; gradients are JAX's own. Other implementations are compared
with it, and it is compared with a float64 NumPy oracle in the tests.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.attention import common, tile
from pallas_kernels.attention.common import Noise
from pallas_kernels.attention.spec import AttentionSpec

# float32 products even where the hardware's default is a shorter format.
_HIGHEST = jax.lax.Precision.HIGHEST


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
    groups = query.shape[2] // key.shape[2]
    rows = jnp.arange(query.shape[1], dtype=jnp.uint32)
    q = query.astype(jnp.float32)
    k = jnp.repeat(key.astype(jnp.float32), groups, axis=2)
    v = jnp.repeat(value.astype(jnp.float32), groups, axis=2)
    logits = jnp.einsum("btnh,bsnh->bnts", q, k, precision=_HIGHEST) * spec.scale
    allowed = common.allowed_columns(spec, rows, key.shape[1], lengths, mask)

    if spec.mode == "record":
        assert noise is not None
        v = common.clip_rows(v, spec.value_clip)
        w = common.bounded_weights(logits, spec.logit_bound, allowed)
        # [b, n, 1, t, s]: every query head is its own key head here.
        numerator, denominator = common.sum_over_keys(w[:, :, None], v)
        numerator = numerator[:, :, 0].transpose(0, 2, 1, 3)
        denominator = denominator[:, :, 0].transpose(0, 2, 1)
        out = common.release_record(
            spec, numerator, denominator, *noise[:2], rows, noise.first_head
        )
        return out.astype(query.dtype)

    if spec.mode == "sequence":
        v = common.clip_rows(v, spec.value_clip)
        logits = tile.sequence_logits(logits)
    shifted = logits if allowed is None else jnp.where(allowed, logits, -jnp.inf)
    # A row that sees nothing gives zero, not NaN.
    top = jnp.max(shifted, axis=-1, keepdims=True)
    top = jax.lax.stop_gradient(jnp.where(jnp.isneginf(top), 0.0, top))
    weights = jnp.exp(shifted - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / jnp.where(total == 0.0, 1.0, total)
    out = jnp.einsum("bnts,bsnh->btnh", weights, v, precision=_HIGHEST)
    if spec.mode == "sequence":
        assert noise is not None
        out = common.release_sequence(spec, out, *noise[:2], rows, noise.first_head)
    return out.astype(query.dtype)
