"""What the TPU kernels of both passes share: blocks, who visits which tile, layout, cost."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels.attention import common, tile
from pallas_kernels.attention.spec import AttentionSpec

LANES = 128


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Block sizes of one pass.

    Attributes:
        query: query rows of a block, a multiple of 128.
        key: keys of a block: 128, 256 or 512, so that a block is (part of) one chunk
            that record mode may sum in floating point.
    """

    query: int = 512
    key: int = 512

    def __post_init__(self) -> None:
        if self.query <= 0 or self.query % LANES:
            raise ValueError(f"query={self.query}: a positive multiple of {LANES} is needed.")
        if self.key not in (128, 256, common.CHUNK):
            raise ValueError(f"key={self.key}: allowed are 128, 256 and {common.CHUNK}.")


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How [T, S] is cut into tiles, and which of them hold a column that a row sees."""

    spec: AttentionSpec
    query: int
    key: int
    query_blocks: int
    key_blocks: int

    @classmethod
    def make(cls, spec: AttentionSpec, num_rows: int, num_keys: int, blocks: Blocks) -> "Tiling":
        """Blocks no longer than the axes, which are padded to whole blocks."""
        query = min(blocks.query, pl.cdiv(num_rows, LANES) * LANES)
        key = min(blocks.key, pl.cdiv(num_keys, LANES) * LANES)
        return cls(spec, query, key, pl.cdiv(num_rows, query), pl.cdiv(num_keys, key))

    def key_span(self, i: Any, length: Any) -> tuple[Any, Any]:
        """The first and last key block that block ``i`` of rows sees; none if last < first."""
        before, after = tile.reach(self.spec)
        first, last = _span(i, self.query, (before, after), self.key, self.key_blocks)
        return first, jnp.minimum(last, _block_at(length - 1, self.key))

    def query_span(self, j: Any, length: Any) -> tuple[Any, Any]:
        """The first and last block of rows that sees key block ``j``; none if last < first."""
        before, after = tile.reach(self.spec)
        first, last = _span(j, self.key, (after, before), self.query, self.query_blocks)
        return first, jnp.where(j * self.key < length, last, -1)

    def key_steps(self) -> int:
        """The most key blocks that one block of rows sees."""
        return max(1, int(self._keys_seen().max()))

    def query_steps(self) -> int:
        """The most blocks of rows that see one block of keys."""
        before, after = tile.reach(self.spec)
        j = np.arange(self.key_blocks)
        first, last = _span(j, self.key, (after, before), self.query, self.query_blocks)
        return max(1, int((last - first + 1).max()))

    def _keys_seen(self) -> np.ndarray:
        i = np.arange(self.query_blocks)
        first, last = _span(i, self.query, tile.reach(self.spec), self.key, self.key_blocks)
        return np.maximum(last - first + 1, 0)

    def visit(
        self,
        i: jax.Array,
        j: jax.Array,
        length: jax.Array,
        is_active: jax.Array,
        rows_axis: int,
        body: Callable[[jax.Array | None], None],
    ) -> None:
        """Runs ``body(seen)`` on tile (i, j); None where every row sees every column."""
        before, after = tile.reach(self.spec)
        row, column = i * self.query, j * self.key
        is_whole = column + self.key <= length
        if before is not None:
            is_whole &= column >= row + (self.query - 1 - before)
        if after is not None:
            is_whole &= column + (self.key - 1 - after) <= row

        @pl.when(is_active & is_whole)
        def _() -> None:
            body(None)

        @pl.when(is_active & ~is_whole)
        def _() -> None:
            shape = (self.query, self.key) if rows_axis == 0 else (self.key, self.query)
            rows = row + jax.lax.broadcasted_iota(jnp.int32, shape, rows_axis)
            columns = column + jax.lax.broadcasted_iota(jnp.int32, shape, 1 - rows_axis)
            body(tile.visible(self.spec, rows, columns, length))

    def cost(
        self, query: Any, *, products: int, once: Sequence[Any], moving: int, normals: int = 0
    ) -> pl.CostEstimate:
        """Operations and bytes of one kernel, as if all ``lengths`` were S.

        Args:
            query: [B, N, T, H], padded.
            products: matrix products of a tile.
            once: arrays that are read or written once.
            moving: rows of each of the two blocks that are read at every tile.
            normals: Gaussians that are made.
        """
        batch, heads, _, depth = query.shape
        tiles = batch * heads * int(self._keys_seen().sum())
        area = tiles * self.query * self.key
        bytes_once = sum(x.size * x.dtype.itemsize for x in once)
        return pl.CostEstimate(
            flops=2 * products * area * depth,
            # The weights; half a logarithm, root, sine and cosine for each Gaussian.
            transcendentals=area + 2 * normals,
            bytes_accessed=bytes_once + 2 * tiles * moving * depth * query.dtype.itemsize,
        )


def _span(
    index: Any, block: int, reach: tuple[int | None, int | None], other: int, count: int
) -> tuple[Any, Any]:
    """First and last block of the other axis that block ``index`` reaches.

    ``index`` is a scalar in a kernel, or a NumPy array.
    """
    before, after = reach
    xp = np if isinstance(index, np.ndarray) else jnp
    first = xp.zeros_like(index)
    last = first + (count - 1)
    if before is not None:
        first = _block_at(xp.maximum(index * block - before, 0), other)
    if after is not None:
        last = xp.minimum(_block_at(index * block + (block - 1 + after), other), last)
    return first, last


def _block_at(position: Any, size: int) -> Any:
    """The block that a position lies in; −1 for those before the first one."""
    if isinstance(position, np.ndarray):
        return np.maximum(position // size, -1)
    # Not `//`, which asks for the signs: kernels then compile for a known chip only.
    return jax.lax.div(jnp.maximum(position + size, 0), size) - 1


def kv_head(head: jax.Array, groups: int) -> jax.Array:
    """The key/value head of a query head."""
    return jax.lax.div(head, groups)


def pick(first: jax.Array, step: jax.Array, last: jax.Array) -> jax.Array:
    """The block to have in memory at a step: steps past the last one fetch nothing new."""
    return jnp.maximum(jnp.minimum(first + step, last), 0)


def by_head(x: Float[Array, "b t n h"], block: int) -> Float[Array, "b n p h"]:
    """[B, T, N, H] → [B, N, T, H] with zero rows up to a multiple of ``block``."""
    x = jnp.swapaxes(x, 1, 2)
    return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % block), (0, 0)))


def product(a: jax.Array, b: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """Matrix product over axis ``axes[0]`` of ``a`` and ``axes[1]`` of ``b``, in float32."""
    return jax.lax.dot_general(
        a,
        b,
        (((axes[0],), (axes[1],)), ((), ())),
        # Bfloat16 products are exact anyway; float32 must not be shortened.
        precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def to_row(column: jax.Array) -> jax.Array:
    """[r, 1] → [1, r]."""
    return jnp.broadcast_to(column, (column.shape[0], LANES)).T[:1]


def to_column(row: jax.Array) -> jax.Array:
    """[1, r] → [r, 1]."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T[:, :1]


Chip = Literal["v4", "v5e", "v5p", "v6e", "v7"]

# Bfloat16 operations and bytes a second, from the vendor's public description of each chip.
PEAKS: dict[Chip, tuple[float, float]] = {
    "v4": (275e12, 1.228e12),
    "v5e": (197e12, 0.819e12),
    "v5p": (459e12, 2.765e12),
    "v6e": (918e12, 1.640e12),
    "v7": (2307e12, 7.370e12),
}


def predicted_seconds(costs: Sequence[pl.CostEstimate], chip: Chip, dtype: Any) -> float:
    """A lower bound on the time of kernels: their products or their traffic, at the peak.

    A prediction, not a measurement. What it leaves out: the vector unit's share (exp, the
    bound, noise), the transpositions outside the kernels, and what a grid step costs.

    Args:
        costs: one for each kernel, which run one after the other.
        chip: generation of the TPU.
        dtype: of the operands; a float32 product takes six of bfloat16.

    Example:
        >>> cost = pl.CostEstimate(flops=197 * 10**12, transcendentals=0, bytes_accessed=0)
        >>> predicted_seconds([cost], "v5e", jnp.bfloat16)
        1.0
    """
    flops, bandwidth = PEAKS[chip]
    passes = 6 if jnp.dtype(dtype) == jnp.float32 else 1
    return sum(max(passes * c.flops / flops, c.bytes_accessed / bandwidth) for c in costs)
