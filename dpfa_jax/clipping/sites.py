"""Norms and weighted sums of a leaf's per-example gradients, from what its sites read.

Every site's gradient is a sum of outer products over its rows (positions, steps), and so
is a sum over several sites with one layout:

    P = Σ_t l_t ⊗ r_t          l: [T, A],  r: [T, B],  P: [A, B]
    ‖P‖² = Σ_{t,t'} (l_t·l_t') (r_t·r_t')                  the Gram form
    Σ_n f_n P_n = Lᵀ (f R)     rows of all examples together

The Gram form needs no P in memory. With the rows of all sites of a leaf together in t, the
terms between different sites are in it like all others: a tied embedding is one gradient.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from dpfa_jax.clipping.recognise import Axes, Site
from dpfa_jax.clipping.trace import is_narrow
from dpfa_jax.clipping.tree import squared_norm
from dpfa_jax.clipping.views import to_leaf
from pallas_kernels.grad_norm import (
    Norms,
    grad_norm_with_rows,
    grad_norms_with_rows,
    norms_with_rows,
)

_HIGHEST = jax.lax.Precision.HIGHEST
# Gram matrices are rounded: relative to Σ_t |l_t||r_t|, which cancellation may leave far
# above ‖P‖, the square of the norm is off by about 2⁻²³. It is raised by this share of it,
# so that rounding clips more and never less.
_ROUNDING = 2.0**-20
_KERNEL_ROWS = 32
_KERNEL_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
# And by this for squares that vanish below float32's normal range.
_TINY = 2.0**-126


class Factor(NamedTuple):
    """One side of the outer products: rows, or the numbers of rows of an identity.

    Attributes:
        rows: floating [n, s, t, width]; or int32 [n, s, t], -1 for a row of zeros.
        width: its width.
    """

    rows: jax.Array
    width: int

    @property
    def is_index(self) -> bool:
        """Whether ``rows`` are numbers."""
        return self.rows.ndim == 3


Block = tuple[Factor, Factor]


def factors(site: Site, operand: jax.Array, cotangent: jax.Array) -> Block:
    """A site's left and right factor, from what was read there (leading axis: examples)."""
    given = _canonical(site, cotangent, site.cotangent_axes)
    if site.kind == "conv":
        operand = _patches(site, operand)
    rows = _canonical(site, operand, site.operand_axes)
    _, _, left, right = site.sizes
    widths = (left, right) if site.operand_is_left else (right, left)
    if site.kind in ("gather", "dynamic_slice"):
        rows = rows[..., 0]
        # A row that was not read from the table gave it no gradient.
        given = jnp.where((rows >= 0)[..., None], given, 0)
    pair = (Factor(rows, widths[0]), Factor(given, widths[1]))
    return pair if site.operand_is_left else pair[::-1]


def _canonical(site: Site, x: jax.Array, axes: Axes) -> jax.Array:
    """[examples, *scans, *rest] as [examples, stacked, summed, kept]."""
    depth = len(site.scans)
    groups: tuple[list[int], list[int], list[int]] = ([], [], [])
    for d in range(depth):
        groups[0 if d in site.view.stacked else 1].append(1 + d)
    for group, more in zip(groups, axes, strict=True):
        group.extend(1 + depth + i for i in more)
    x = jnp.transpose(x, (0, *groups[0], *groups[1], *groups[2]))
    sizes = iter(x.shape[1:])
    merged = [math.prod(next(sizes) for _ in group) for group in groups]
    return x.reshape(x.shape[0], *merged)


def _patches(site: Site, x: jax.Array) -> jax.Array:
    """[examples, *scans, batch, *output positions, input features, *window]."""
    p = site.params
    numbers = p["dimension_numbers"]
    lead = x.shape[: x.ndim - len(site.operand_shape)]
    x = jnp.transpose(x.reshape(-1, *site.operand_shape), (0, *(1 + i for i in numbers.lhs_spec)))
    merged = x.reshape(-1, *x.shape[2:])
    window = tuple(site.view.shape[i] for i in numbers.rhs_spec[2:])
    patches = jax.lax.conv_general_dilated_patches(
        merged,
        window,
        p["window_strides"],
        p["padding"],
        p["lhs_dilation"],
        p["rhs_dilation"],
        precision=_HIGHEST,
    )
    space = patches.shape[2:]
    patches = jnp.moveaxis(patches, 1, -1)
    return patches.reshape(*lead, x.shape[1], *space, x.shape[2], *window)


def merged(blocks: Sequence[Block]) -> list[Block]:
    """Blocks of one kind as one block with the rows of all."""
    kinds: dict[tuple[bool, bool, jnp.dtype, jnp.dtype], list[Block]] = {}
    for left, right in blocks:
        key = (left.is_index, right.is_index, left.rows.dtype, right.rows.dtype)
        kinds.setdefault(key, []).append((left, right))
    result = []
    for group in kinds.values():
        sides = zip(*group, strict=True)
        left, right = (
            Factor(jnp.concatenate([f.rows for f in side], axis=2), side[0].width)
            if len(side) > 1
            else side[0]
            for side in sides
        )
        result.append((left, right))
    return result


def product_of(block: Block) -> Float[Array, "n s a b"]:
    """P of each example, of a dense block, in the dtype of its rows."""
    left, right = (x.rows for x in block)
    return jnp.einsum("nsta,nstb->nsab", left, right, preferred_element_type=left.dtype)


def squared_norms(
    blocks: Sequence[Block],
    own: Sequence[Norms] | None = None,
    product: Float[Array, "n s a b"] | None = None,
) -> Float32[Array, "n"]:
    """‖P_n‖² of each example, not below its true value by more than rounding's allowance.

    Args:
        blocks: those of all sites of one leaf, all of one layout.
        own: what :func:`own_terms` gives for them; None means that it is computed here.
        product: what is to be added to P; then every block has row numbers on one side, and
            with S what the blocks give, ‖P + S‖² = ‖P‖² + 2 Σ_t P[i_t]·r_t + ‖S‖².
    """
    parts = own_terms([blocks])[0] if own is None else own
    total = sum((p.squared for p in parts[1:]), parts[0].squared)
    for i, first in enumerate(blocks):
        for second in blocks[i + 1 :]:
            left, right = (_gram(x, y) for x, y in zip(first, second, strict=True))
            total = total + 2.0 * jnp.sum(left * right, axis=(1, 2, 3))
    outer = sum((p.spread for p in parts[1:]), parts[0].spread)
    if product is not None:
        alone = squared_norm(product)
        total = total + alone + 2.0 * sum(_looked_up(product, block) for block in blocks)
        outer = outer + jnp.sqrt(alone)
    tiny = jnp.float32(0.0)
    for (a, b), part in zip(blocks, parts, strict=True):
        tiny = tiny + a.rows.shape[2] * (b.width * part.x_squared + a.width * part.g_squared)
    total = jnp.maximum(total, 0.0) * jnp.float32(1.0 + _truncation(blocks))
    return total + _ROUNDING * outer * outer + _TINY * tiny


def own_terms(groups: Sequence[Sequence[Block]]) -> list[list[Norms]]:
    """The terms of each block with itself, each of [n], for several leaves.

    The Gram matrices of one site with itself, where both sides are dense, are those of
    :mod:`pallas_kernels.grad_norm`: on GPUs and TPUs a kernel that writes no matrix. Leaves
    share its launches.

    Args:
        groups: of each leaf, its blocks.
    """
    found: list[list[Norms | None]] = [[_small(*block) for block in blocks] for blocks in groups]
    places = [(i, j) for i, row in enumerate(found) for j, norms in enumerate(row) if norms is None]
    made: Any = grad_norms_with_rows([_folded(*groups[i][j]) for i, j in places])
    for (i, j), norms in zip(places, made, strict=True):
        found[i][j] = _unfolded(norms, groups[i][j][0])
    return cast(list[list[Norms]], found)


def _folded(left: Factor, right: Factor) -> tuple[jax.Array, jax.Array]:
    """[n · s, t, width] of both sides: stacked layers are examples of their own."""
    return tuple(x.rows.reshape(-1, *x.rows.shape[2:]) for x in (left, right))  # type: ignore[return-value]


def _unfolded(norms: Norms, factor: Factor) -> Norms:
    return Norms(*(jnp.sum(x.reshape(factor.rows.shape[0], -1), axis=1) for x in norms))


def _small(left: Factor, right: Factor) -> Norms | None:
    """A block's own terms where matrices are written; None where a kernel makes none."""
    dense = not (left.is_index or right.is_index)
    if dense and left.rows.dtype == right.rows.dtype and left.rows.dtype in _KERNEL_DTYPES:
        # Kernels make tiles of 128 rows: where there are few, XLA's small matrices are less work.
        if left.rows.shape[2] >= _KERNEL_ROWS:
            return None
        return _unfolded(grad_norm_with_rows(*_folded(left, right), implementation="xla"), left)
    grams = [_gram(x, x) for x in (left, right)]
    squared = jnp.sum(grams[0] * grams[1], axis=(1, 2, 3))
    on_left, on_right = (jnp.diagonal(g, axis1=2, axis2=3).reshape(squared.size, -1) for g in grams)
    return norms_with_rows(squared, on_left, on_right)


def _truncation(blocks: Sequence[Block]) -> float:
    """The share of a norm's square that matrix units may cut off.

    They multiply 16-bit floats exactly and add 16 products to a float32 sum at a time, cut
    and not rounded: each time up to 2⁻²³ of the sum is lost, always downwards.
    """
    if jax.default_backend() == "cpu":
        return 0.0
    short = [
        a.width + b.width
        for a, b in blocks
        if b.rows.dtype.itemsize < 4 or a.rows.dtype.itemsize < 4
    ]
    return max(short, default=0) / 16 * 2.0**-23


def _looked_up(product: jax.Array, block: Block) -> Float32[Array, "n"]:
    """Σ_t P[i_t]·r_t, i the numbers on one side and r the rows on the other."""
    index, rows = block if block[0].is_index else block[::-1]
    table = product if block[0].is_index else jnp.swapaxes(product, 2, 3)
    # Rows with the number -1 hold zeros.
    found = jnp.take_along_axis(table, jnp.maximum(index.rows, 0)[..., None], axis=2)
    return jnp.sum(found.astype(jnp.float32) * rows.rows.astype(jnp.float32), axis=(1, 2, 3))


def _gram(a: Factor, b: Factor) -> Float32[Array, "n s t u"]:
    """Products of all rows of ``a`` with all rows of ``b``, float32."""
    if a.is_index and b.is_index:
        same = a.rows[..., :, None] == b.rows[..., None, :]
        return (same & (a.rows >= 0)[..., :, None]).astype(jnp.float32)
    if a.is_index:
        return jnp.swapaxes(_gram(b, a), 2, 3)
    if b.is_index:
        ids = jnp.broadcast_to(
            jnp.maximum(b.rows, 0)[:, :, None, :], (*a.rows.shape[:3], b.rows.shape[2])
        )
        picked = jnp.take_along_axis(a.rows, ids, axis=3).astype(jnp.float32)
        return jnp.where((b.rows >= 0)[:, :, None, :], picked, 0.0)
    return jnp.einsum(
        "nstk,nsuk->nstu",
        *_alike(a.rows, b.rows),
        precision=_HIGHEST,
        preferred_element_type=jnp.float32,
    )


def _alike(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both in float32, unless they have one dtype."""
    if a.dtype == b.dtype:
        return a, b
    return a.astype(jnp.float32), b.astype(jnp.float32)


def weighted_products(
    site: Site,
    blocks: Sequence[Block],
    factor: Float32[Array, "n"] | None,
    product: Float32[Array, "s a b"] | None = None,
) -> Float32[Array, "..."]:
    """Σ_n f_n P_n with the shape of the leaf.

    Args:
        site: any of the sites, for the layout.
        blocks: of all of them.
        factor: f; None means ones.
        product: the weighted sum of what is in no block.
    """
    stack, _, left, right = site.sizes
    total = jnp.zeros((stack, left, right), jnp.float32) if product is None else product
    for a, b in blocks:
        if factor is not None:
            # The narrower side is scaled: less to write.
            index_first = a.is_index or (not b.is_index and a.width > b.width)
            a, b = (a, _scaled(b, factor, a)) if index_first else (_scaled(a, factor, b), b)
        if a.is_index or b.is_index:
            total = total + _scatter(a, b, stack)
        else:
            total = total + jnp.einsum(
                "nsta,nstb->sab",
                *_alike(a.rows, b.rows),
                precision=_HIGHEST,
                preferred_element_type=jnp.float32,
            )
    base = site.view.base_shape
    lead = [n for d, n in enumerate(site.scans) if d in site.view.stacked]
    dims = (*site.stack_dims, *site.left_dims, *site.right_dims)
    total = total.reshape(*lead, *(base[i] for i in dims))
    order = sorted(range(len(dims)), key=dims.__getitem__)
    total = jnp.transpose(total, (*range(len(lead)), *(len(lead) + i for i in order)))
    return to_leaf(total, site.view.steps, len(lead))


def _scaled(x: Factor, factor: jax.Array, other: Factor) -> Factor:
    """The rows times their factors; in their own dtype where matrix units then take both sides.

    Not in float16: there a small number's rounding is no share of it, and no margin covers it.
    """
    rows = x.rows.astype(jnp.float32) * factor[:, None, None, None]
    short = x.rows.dtype == other.rows.dtype and not is_narrow(x.rows.dtype)
    return Factor(rows.astype(x.rows.dtype) if short else rows, x.width)


def _scatter(a: Factor, b: Factor, stack: int) -> Float32[Array, "s a b"]:
    """Σ of the rows of one side, each at the place that the other side's number names."""
    index, rows = (a, b) if a.is_index else (b, a)
    # Rows with the number -1 hold zeros.
    place = jnp.maximum(index.rows, 0)
    zeros = jnp.zeros((stack, index.width, rows.width), jnp.float32)
    where = jnp.broadcast_to(jnp.arange(stack)[None, :, None], place.shape)
    summed = zeros.at[where, place].add(rows.rows.astype(jnp.float32))
    return summed if a.is_index else jnp.swapaxes(summed, 1, 2)
