"""The definition, in float32: whole matrices for each example, nothing saved."""

import jax
import jax.numpy as jnp

from pallas_kernels.grad_norm import common


def grad_norm_squared(x: jax.Array, g: jax.Array, form: common.Form) -> jax.Array:
    """See :func:`pallas_kernels.grad_norm.grad_norm_squared`, whose checks have passed."""
    x, g = x.astype(jnp.float32), g.astype(jnp.float32)
    highest = jax.lax.Precision.HIGHEST
    if form == "direct":
        weight = jnp.einsum("btp,btq->bpq", x, g, precision=highest)
        return common.total(weight * weight)
    first, second = (jnp.einsum("btp,bsp->bts", y, y, precision=highest) for y in (x, g))
    return jnp.maximum(common.total(first * second), 0.0)
