"""Norms and clipping of gradient trees, float32 throughout."""

import numbers
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, PyTree

# A clipped gradient is aimed this much below C, so that the rounding of the norm and of
# the product leaves it at most C.
_MARGIN = 2.0**-20


def per_example_norms(grads: PyTree[Array]) -> Float32[Array, "b"]:
    """The L2 norm of each example's gradient, over all leaves together."""
    leaves = [leaf.astype(jnp.float32) for leaf in jax.tree.leaves(grads)]
    squares = [jnp.sum(jnp.square(x), axis=tuple(range(1, x.ndim))) for x in leaves]
    return jnp.sqrt(sum(squares[1:], squares[0]))


def clip_and_sum(
    grads: PyTree[Array], l2_clip_norm: float, is_padding_example: Bool[Array, "b"] | None
) -> PyTree[Array]:
    """Σ_b min(1, C/‖g_b‖) g_b over the leading axis, in float32.

    Padding examples, and examples whose norm is not finite, contribute exactly zero.
    """
    norms = per_example_norms(grads)
    keep = jnp.isfinite(norms)
    if is_padding_example is not None:
        keep = keep & ~is_padding_example
    target = jnp.float32(l2_clip_norm * (1.0 - _MARGIN))
    factor = jnp.minimum(1.0, target / jnp.where(norms > 0.0, norms, 1.0))
    factor = jnp.where(keep, factor, 0.0)

    def reduce(leaf: jax.Array) -> jax.Array:
        # 0 · NaN is NaN: what is not kept must be replaced, not multiplied away.
        shape = (keep.size, *[1] * (leaf.ndim - 1))
        clean = jnp.where(keep.reshape(shape), leaf.astype(jnp.float32), 0.0)
        return jnp.einsum("b,b...->...", factor, clean, precision=jax.lax.Precision.HIGHEST)

    return jax.tree.map(reduce, grads)


def check_clip_norm(l2_clip_norm: Any) -> float:
    """The clip norm as a float, or ValueError unless it is from 1e-9 to 1e9."""
    is_number = isinstance(l2_clip_norm, numbers.Real) and not isinstance(l2_clip_norm, bool)
    # Within these, squares of a norm neither vanish nor overflow in float32.
    if not (is_number and 1e-9 <= l2_clip_norm <= 1e9):
        raise ValueError(f"l2_clip_norm={l2_clip_norm!r}: allowed is a number from 1e-9 to 1e9.")
    return float(l2_clip_norm)
