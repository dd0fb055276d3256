"""Through XLA, a tile of every example at a time.

XLA writes what it multiplies to memory: here at most ``BOUND`` numbers for each of the
matrices of a step (B·128² if that is more), whatever T, P and Q.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.grad_norm import common

BOUND = 2**24
# Larger tiles would waste more of the Gram form's symmetry than they save in steps.
_GRAM_TILE = 256


def grad_norm_squared(x: jax.Array, g: jax.Array, form: common.Form) -> jax.Array:
    """See :func:`pallas_kernels.grad_norm.grad_norm_squared`, whose checks have passed."""
    tile = _tile(x.shape[0])
    return _gram(x, g, min(tile, _GRAM_TILE)).squared if form == "gram" else _direct(x, g, tile)


def gram_with_rows(x: jax.Array, g: jax.Array) -> common.Norms:
    """The Gram form, and what the matrices' diagonals tell of the rows."""
    return _gram(x, g, min(_tile(x.shape[0]), _GRAM_TILE))


def _tile(batch: int) -> int:
    """The largest power of two whose square, times the batch, stays within the bound."""
    return max(128, 2 ** ((BOUND // batch).bit_length() - 1 >> 1)) if batch <= BOUND else 128


def _even(size: int, most: int) -> int:
    """The size of equal parts of at most ``most``, with as little padding as can be."""
    return -(-size // -(-size // most))


def _product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    precision = common.precision(a.dtype)
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=jnp.float32)


def _gram(x: jax.Array, g: jax.Array, tile: int) -> common.Norms:
    tile = _even(x.shape[1], tile)
    x, g = (common.pad(y, 1, tile) for y in (x, g))
    rows, columns = np.tril_indices(x.shape[1] // tile)

    def part(i: jax.Array, j: jax.Array) -> common.Norms:
        def gram(y: jax.Array) -> jax.Array:
            first, second = (lax.dynamic_slice_in_dim(y, k * tile, tile, 1) for k in (i, j))
            return _product("btp,bsp->bts", first, second)

        grams = gram(x), gram(g)
        own = (jnp.diagonal(y, axis1=1, axis2=2) * jnp.where(i == j, 1.0, 0.0) for y in grams)
        squared = common.total(grams[0] * grams[1]) * jnp.where(i == j, 1.0, 2.0)
        return common.norms_with_rows(squared, *own)

    norms = common.Norms(*_add_up(part, rows, columns))
    return norms._replace(squared=jnp.maximum(norms.squared, 0.0))


def _direct(x: jax.Array, g: jax.Array, tile: int) -> jax.Array:
    tiles = [_even(y.shape[2], tile) for y in (x, g)]
    x, g = (common.pad(y, 2, n) for y, n in zip((x, g), tiles, strict=True))
    rows, columns = np.indices([y.shape[2] // n for y, n in zip((x, g), tiles, strict=True)])

    def part(i: jax.Array, j: jax.Array) -> tuple[jax.Array]:
        first = lax.dynamic_slice_in_dim(x, i * tiles[0], tiles[0], 2)
        second = lax.dynamic_slice_in_dim(g, j * tiles[1], tiles[1], 2)
        weight = _product("btp,btq->bpq", first, second)
        return (common.total(weight * weight),)

    return _add_up(part, rows.ravel(), columns.ravel())[0]


def _add_up(
    part: Callable[[jax.Array, jax.Array], tuple[jax.Array, ...]],
    rows: np.ndarray,
    columns: np.ndarray,
) -> tuple[jax.Array, ...]:
    """The sums of what ``part(i, j)`` gives, float32 [B] each, over all tiles in turn."""
    rows, columns = rows.astype(np.int32), columns.astype(np.int32)
    if len(rows) == 1:
        return part(jnp.int32(0), jnp.int32(0))
    parts = lax.map(lambda place: part(*place), (jnp.asarray(rows), jnp.asarray(columns)))
    return tuple(common.total(x.T) for x in parts)
