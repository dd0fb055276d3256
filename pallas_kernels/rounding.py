"""Rounding to a public grid, in operations that every kernel has."""

import jax
import jax.numpy as jnp


def round_half_even(x: jax.Array) -> jax.Array:
    """``jnp.round``, which Triton lacks.

    Example:
        >>> [float(y) for y in round_half_even(jnp.array([0.5, 1.5, -2.3]))]
        [0.0, 2.0, -2.0]
    """
    # Not (x + 2²³) − 2²³: some versions of XLA, which interprets the kernels in tests,
    # simplify that to x.
    below = jnp.floor(x)
    rest = x - below
    is_odd = below - 2.0 * jnp.floor(below * 0.5) == 1.0
    up = (rest > 0.5) | ((rest == 0.5) & is_odd)
    return below + jnp.where(up, 1.0, 0.0)
