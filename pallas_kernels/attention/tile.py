"""What kernels compute on one tile of the attention matrix: plain arrays in and out.

A tile holds some query rows and some key columns, either way round: functions that need
to know where it lies take the numbers of its rows and columns, which broadcast against
it. Everything is float32, and every operation is one that all Pallas back ends lower.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.attention.spec import AttentionSpec

# Logit of a column that a row does not see, and the least maximum of a row's logits:
# exp(HIDDEN − LEAST) is zero, so that a row which sees nothing sums to zero.
HIDDEN, LEAST = -3e38, -1e38

# A finite logit larger than this in magnitude counts as this (noisy modes).
LARGEST = 1e30


def reach(spec: AttentionSpec) -> tuple[int | None, int | None]:
    """How far before and after its own number a row sees columns; None means all."""
    before, after = spec.window or (None, None)
    if spec.is_causal:
        after = 0 if after is None else min(after, 0)
    return before, after


def visible(
    spec: AttentionSpec, rows: jax.Array, columns: jax.Array, length: jax.Array
) -> jax.Array:
    """Which columns a row sees: they exist, and lie within its :func:`reach`."""
    before, after = reach(spec)
    seen = columns < length
    if before is not None:
        seen = seen & (columns >= rows - before)
    if after is not None:
        seen = seen & (columns <= rows + after)
    return seen


def hide(tile: jax.Array, seen: jax.Array | None, value: float) -> jax.Array:
    """``tile`` with ``value`` where a column is not seen; None sees all."""
    return tile if seen is None else jnp.where(seen, tile, value)


def sequence_logits(logits: jax.Array) -> jax.Array:
    """NaN and −inf become −1e30, +inf becomes 1e30."""
    return jnp.clip(jnp.where(jnp.isnan(logits), -LARGEST, logits), -LARGEST, LARGEST)


def probabilities(
    spec: AttentionSpec, logits: jax.Array, lse: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """Weights p = exp(x − lse) with x bounded as in the forward pass, and where it was not.

    Only where x was left alone a gradient reaches it; None means everywhere. In record mode
    NaN has no weight, as in :func:`common.bounded_weights`.
    """
    free = None
    if spec.mode == "record":
        bounded = logits
        if spec.bound_logits:
            free = logits < spec.logit_bound
            bounded = jnp.where(free, logits, spec.logit_bound)
        return jnp.where(jnp.isnan(logits), 0.0, jnp.exp(bounded - lse)), free
    if spec.mode == "sequence":
        free = jnp.abs(logits) < LARGEST
        logits = sequence_logits(logits)
    return jnp.exp(logits - lse), free


def logit_gradient(
    spec: AttentionSpec,
    logits: jax.Array,
    d_weights: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    seen: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Weights p and the scaled logits' gradient, p (dp − delta) where x was left alone."""
    p, free = probabilities(spec, logits, lse)
    p = hide(p, seen, 0.0)
    return p, hide(p * (d_weights - delta), free, 0.0)


def fixed_point(sums: jax.Array, unit: float) -> jax.Array:
    """``sums`` in multiples of ``unit``, a power of two, as int32."""
    return jnp.round(sums * (1.0 / unit)).astype(jnp.int32)
