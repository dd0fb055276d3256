"""What all implementations share: the choice of the form, products, sums, the rounding bound."""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

Form = Literal["gram", "direct"]

FORMS: tuple[Form, ...] = ("gram", "direct")
TILE = 128  # rows of the tiles that the count of the Gram form's work assumes
_RUN = 512  # terms that are added one after the other


def multiply_adds(length: int, rows: int, columns: int, form: Form) -> int:
    """Multiply-adds that a form needs for one example.

    Direct: XᵀG, T·P·Q. Gram: XXᵀ and GGᵀ on and below the diagonal, in tiles of t =
    min(T, 128) rows: T(T + t)/2 · (P + Q), because tiles on the diagonal are made whole.

    Args:
        length: T.
        rows: P, the width of x.
        columns: Q, the width of g.
        form: ``'gram'`` or ``'direct'``.

    Example:
        >>> multiply_adds(256, 768, 3072, "gram") / multiply_adds(256, 768, 3072, "direct")
        0.3125
    """
    if form == "direct":
        return length * rows * columns
    return length * (length + min(length, TILE)) * (rows + columns) // 2


def best_form(length: int, rows: int, columns: int) -> Form:
    """The form with fewer multiply-adds; the direct one if equal, which rounds less.

    Example:
        >>> best_form(256, 768, 3072), best_form(1024, 768, 16)
        ('gram', 'direct')
    """
    gram, direct = (multiply_adds(length, rows, columns, form) for form in FORMS)
    return "gram" if gram < direct else "direct"


def precision(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """Float32 is multiplied as it is, never shortened; products of 16-bit floats are exact."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def product(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    """Float32 product of two matrices over axis ``axis`` of both."""
    return jax.lax.dot_general(
        a,
        b,
        (((axis,), (axis,)), ((), ())),
        precision=precision(a.dtype),
        preferred_element_type=jnp.float32,
    )


def total(x: Float32[Array, "b *n"]) -> Float32[Array, "b"]:
    """The sum over all axes but the first, in runs of 512: no term meets many roundings.

    One long sum in float32 would lose a thousandth at a million terms.
    """
    x = x.reshape(x.shape[0], -1)
    while x.shape[1] > 1:
        run = min(_RUN, x.shape[1])
        # Neighbours go to different sums, which a CPU then makes side by side.
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % run))).reshape(x.shape[0], run, -1)
        # Without the barrier XLA makes one sum of two.
        x = jax.lax.optimization_barrier(jnp.sum(x, axis=1))
    return x[:, 0]


def pad(x: jax.Array, axis: int, multiple: int) -> jax.Array:
    """``x`` with zeros up to a multiple along an axis; as it is where nothing is missing."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths) if widths[axis][1] else x


def pair(index: jax.Array, tiles: int) -> tuple[jax.Array, jax.Array]:
    """Row and column (at most the row) of a lower triangle's tile.

    A row of r + 1 tiles and its counterpart of ``tiles`` − r from the other end make one of
    ``tiles`` + 1, so a division finds the place; ``index`` < tiles (tiles + 1) / 2.
    """
    width = jnp.int32(tiles + 1)
    row, column = jax.lax.div(index, width), jax.lax.rem(index, width)
    inside = column <= row
    return (
        jnp.where(inside, row, tiles - 1 - row),
        jnp.where(inside, column, column - row - 1),
    )


class Norms(NamedTuple):
    """Of each example, float32 [B], all at least 0.

    Attributes:
        squared: ‖xᵀg‖².
        spread: Σ_t ‖x_t‖‖g_t‖, the norm if nothing cancelled.
        x_squared: Σ_t ‖x_t‖².
        g_squared: Σ_t ‖g_t‖².
    """

    squared: Float32[Array, "B"]
    spread: Float32[Array, "B"]
    x_squared: Float32[Array, "B"]
    g_squared: Float32[Array, "B"]


def norms_with_rows(
    squared: Float32[Array, "B"], x_rows: Float32[Array, "B T"], g_rows: Float32[Array, "B T"]
) -> Norms:
    """:class:`Norms` from the squared norms of the rows."""
    x_rows, g_rows = (jnp.maximum(y, 0.0) for y in (x_rows, g_rows))
    spread = total(jnp.sqrt(x_rows) * jnp.sqrt(g_rows))
    return Norms(squared, spread, total(x_rows), total(g_rows))


def row_squares(x: Float[Array, "B T P"]) -> Float32[Array, "B T"]:
    """The squared norms of the rows."""
    return jnp.sum(jnp.square(x.astype(jnp.float32)), axis=2)


# Roundings, see upper_bound. The unit of a matrix product is four times float32's unit
# roundoff: matrix units cut the summands that they align, and the sum.
_PRODUCT_UNIT = 2.0**-22
_SUM_UNIT = 2.0**-24
_SUM_DEPTH = 2048
# What underflows, or is flushed to zero, is below 2⁻¹²⁶; the rest is room.
_TINY = 2.0**-100


def upper_bound(
    squared: Float32[Array, "B"],
    x: Float[Array, "B T P"],
    g: Float[Array, "B T Q"],
    form: Form,
) -> Float32[Array, "B"]:
    """A number that ‖x_bᵀ g_b‖² in real arithmetic does not exceed.

    With γ(n, u) = nu/(1 − nu), u = 2⁻²² for matrix products, v = 2⁻²⁴ for other sums, no term
    of which meets more than d = 2048 roundings (:func:`total` and the sum within a tile, for
    matrices of at most 2³² numbers), and
    S = Σ_t ‖x_t‖‖g_t‖, the norm if nothing cancelled (N. J. Higham, *Accuracy and Stability of
    Numerical Algorithms*, 2002, sections 3.1 and 3.5):

    * direct: the computed W̃ = xᵀg is within γ(T+1, u)·S of W in norm, because |x|ᵀ|g| has at most
      the norm S; its square sum is above (1 − γ(d, v))‖W̃‖². So
      ‖W‖ ≤ √(squared / (1 − γ(d, v))) + γ(T+1, u)·S.
    * gram: an entry a = x_t·x_t' errs by at most γ(P+1, u)‖x_t‖‖x_t'‖, likewise g_t·g_t'; the sum
      of the products |ab| is at most S². So ‖W‖² ≤ squared + e·S² with
      e = (1 + γ(P+1, u))(1 + γ(Q+1, u))(1 + γ(d, v)) − 1.

    Where rows of an example cancel, S is far above ‖W‖, and the Gram form is the looser of
    the two: its *squared* norm errs by a part of S². This is worst-case; sums of random signs
    err by about the root of it.

    Args:
        squared: [B], what :func:`~pallas_kernels.grad_norm.grad_norm_squared` returned.
        x: [B, T, P], its operand.
        g: [B, T, Q], its operand.
        form: the form that it took.

    Returns:
        float32 [B]; not finite where an operand is not or where a number is too large.

    Example:
        >>> x, g = jnp.ones((1, 4, 3)), jnp.ones((1, 4, 5))
        >>> bool(240.0 < upper_bound(jnp.asarray([240.0]), x, g, "direct")[0] < 240.1)
        True
    """
    (_, length, rows), columns = x.shape, g.shape[2]
    x_norms, g_norms = _row_norms(x), _row_norms(g)
    most = total(x_norms * g_norms)
    x_sum, g_sum = total(x_norms), total(g_norms)
    root_p, root_q = math.sqrt(rows), math.sqrt(columns)
    spread = _gamma(_SUM_DEPTH, _SUM_UNIT)
    if form == "direct":
        lost = _TINY * (length * root_p * root_q + root_p * g_sum + root_q * x_sum)
        norm = jnp.sqrt((squared + _TINY * rows * columns) / (1 - spread))
        norm = norm + _gamma(length + 1, _PRODUCT_UNIT) * most + lost
        return norm * norm * (1 + 2.0**-20)
    first, second = (_gamma(n + 1, _PRODUCT_UNIT) for n in (rows, columns))
    error = (1 + first) * (1 + second) * (1 + spread) - 1
    lost = rows * g_sum * g_sum + columns * x_sum * x_sum + length * length
    lost = 2 * _TINY * (lost + 2 * most * (root_p * g_sum + root_q * x_sum))
    return (squared + error * most * most + lost) * (1 + 2.0**-20)


def _gamma(count: int, unit: float) -> float:
    return count * unit / (1 - count * unit) if count * unit < 0.5 else math.inf


def _row_norms(x: jax.Array) -> jax.Array:
    """Norms of the rows, float32 [B, T], at most a thousandth too long and never too short."""
    x = x.astype(jnp.float32)
    top = jnp.max(jnp.abs(x), axis=2, keepdims=True)
    top = jnp.where(top == 0.0, 1.0, top)
    scaled = x / top  # a square does not underflow that matters, nor overflow
    squares = total((scaled * scaled).reshape(-1, x.shape[2])).reshape(x.shape[:2])
    return top[..., 0] * jnp.sqrt(squares) * (1 + 2.0**-10)
