"""Attention kernels for TPU (Pallas Mosaic): the forward pass and its noise.

One grid step multiplies one block of query rows with one block of keys; the steps over
the keys of a block of rows come one after the other and add into scratch memory. Only
blocks that some row sees are visited: the number of steps follows from the causal mask
and the window, and ``lengths``, prefetched as scalars, ends them early. Tiles that every
row sees in full skip the comparisons with row and column numbers.

A TPU core works on arrays of 8 sublanes by 128 lanes, so the kernels want [B, N, T, H].
The transposition from and to [B, T, N, H] is XLA's, outside the kernels; in the same pass
it pads rows and keys to whole blocks and clips the values. The copies it makes are the
only memory beyond inputs, outputs and one statistic a row.

Noise: the sixteen ChaCha words of a counter array [8 column numbers, rows], stacked along
the sublanes, are a [128 columns, rows] tile in the order of
:func:`pallas_kernels.prng.normal_tile`; one transposition makes it rows by columns.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int32, UInt32

from pallas_kernels import prng
from pallas_kernels.attention import common, tile
from pallas_kernels.attention.fused import HEAD_DIMS, NOTHING_SEEN
from pallas_kernels.attention.mosaic_tpu_backward import backward
from pallas_kernels.attention.mosaic_tpu_tiling import (
    LANES,
    Blocks,
    Tiling,
    by_head,
    kv_head,
    pick,
    product,
    to_column,
    to_row,
)
from pallas_kernels.attention.spec import AttentionSpec

__all__ = ["Blocks", "backward", "forward", "row_dots", "sums", "unsupported", "value_scale"]

row_dots = common.row_dots
value_scale = common.value_scale


def unsupported(spec: AttentionSpec, query: Any, key: Any, *, has_mask: bool) -> str | None:
    """Why these kernels cannot do a call on any TPU; None if they can."""
    del spec, key  # every mode, window and number of heads or keys is fine
    if has_mask:
        return "a mask array is given; the kernels know causal, window and lengths only"
    if query.dtype not in (jnp.bfloat16, jnp.float32):
        return f"{query.dtype} has no product on TPU; bfloat16 and float32 have"
    if query.shape[3] > max(HEAD_DIMS):
        return f"head dimension {query.shape[3]} is above {max(HEAD_DIMS)}"
    return None


def forward(
    query: Float[Array, "b t n h"],
    key: Float[Array, "b s k h"],
    value: Float[Array, "b s k h"],
    value_scale: Float32[Array, "b k s"] | None,
    noise: UInt32[Array, "b 11"] | None,
    lengths: Int32[Array, "b"],
    spec: AttentionSpec,
    *,
    blocks: Blocks | None = None,
    interpret: bool = False,
    keep_clean: bool = True,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """See :class:`pallas_kernels.attention.fused.Backend`."""
    operands = (query, key, value, value_scale, noise, lengths)
    return _launch(operands, spec, None, blocks or Blocks(), interpret, keep_clean)


def sums(
    query: Float[Array, "b t n h"],
    key: Float[Array, "b s k h"],
    value: Float[Array, "b s k h"],
    value_scale: Float32[Array, "b k s"] | None,
    lengths: Int32[Array, "b"],
    spec: AttentionSpec,
    units: common.Units,
    *,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> tuple[Int32[Array, "b t n h"], Int32[Array, "b n t"]]:
    """See :class:`pallas_kernels.attention.fused.Backend`."""
    operands = (query, key, value, value_scale, None, lengths)
    return _launch(operands, spec, units, blocks or Blocks(), interpret, False)[:2]


def _launch(
    operands: tuple[Any, ...],
    spec: AttentionSpec,
    units: common.Units | None,
    blocks: Blocks,
    interpret: bool,
    keep_clean: bool,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Runs the kernel; with ``units`` for :func:`sums`."""
    query, key, value, value_scale, noise, lengths = operands
    batch, num_rows, heads, depth = query.shape
    num_keys, groups = key.shape[1], heads // key.shape[2]
    tiling = Tiling.make(spec, num_rows, num_keys, blocks)
    # Without noise, words that nobody reads.
    words = jnp.zeros((batch, 1), jnp.uint32) if noise is None else common.with_child_keys(noise)
    q = by_head(query, tiling.query)
    k = by_head(key, tiling.key)
    v = by_head(common.clipped(value, value_scale), tiling.key)

    def row_block(b: Any, h: Any, i: Any, step: Any, lengths: Any) -> Any:
        return b, h, i, 0

    def row_statistic(b: Any, h: Any, i: Any, step: Any, lengths: Any) -> Any:
        return b, h, 0, i

    def key_block(b: Any, h: Any, i: Any, step: Any, lengths: Any) -> Any:
        first, last = tiling.key_span(i, lengths[b])
        return b, kv_head(h, groups), pick(first, step, last), 0

    rows = pl.BlockSpec((1, 1, tiling.query, depth), row_block)
    keys = pl.BlockSpec((1, 1, tiling.key, depth), key_block)
    # One batch element's words at a time: scalar memory is small, and B need not be.
    word_spec = pl.BlockSpec(
        (1, 1, words.shape[1]), lambda b, *_: (b, 0, 0), memory_space=pltpu.SMEM
    )
    out_shape = [
        jax.ShapeDtypeStruct(q.shape, jnp.int32 if units else q.dtype),
        jax.ShapeDtypeStruct((batch, heads, 1, q.shape[2]), jnp.int32 if units else jnp.float32),
    ]
    out_specs = [rows, pl.BlockSpec((1, 1, 1, tiling.query), row_statistic)]
    if keep_clean and spec.mode == "sequence":
        out_shape.append(out_shape[0])
        out_specs.append(rows)
    sums = jnp.int32 if spec.mode == "record" else jnp.float32
    column = (tiling.query, 1)
    results = pl.pallas_call(
        functools.partial(
            _forward_kernel, tiling=tiling, num_keys=num_keys, units=units, unroll=not interpret
        ),
        out_shape=out_shape,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, heads, tiling.query_blocks, tiling.key_steps()),
            in_specs=[rows, keys, keys, word_spec],
            out_specs=out_specs,
            scratch_shapes=[
                pltpu.VMEM((tiling.query, depth), sums),
                pltpu.VMEM(column, sums),
                pltpu.VMEM(column, jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        cost_estimate=tiling.cost(
            q,
            products=2,
            once=(q, *out_shape),
            moving=tiling.key,
            normals=q.size if spec.is_noisy and not units else 0,
        ),
        interpret=interpret,
        name="attention_sums" if units else f"attention_{spec.mode}_forward",
    )(lengths, q, k, v, words[:, None])
    stat = results[1][:, :, 0, :num_rows]
    out, *clean = (jnp.swapaxes(x, 1, 2)[:, :num_rows] for x in (results[0], *results[2:]))
    return out, stat, clean[0] if clean else None


def _forward_kernel(
    lengths: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    noise_ref: Any,
    out_ref: Any,
    stat_ref: Any,
    *rest: Any,
    tiling: Tiling,
    num_keys: int,
    units: common.Units | None,
    unroll: bool,
) -> None:
    """One block of rows and one block of keys; the last step releases the rows.

    With ``units`` it writes their sums instead, in these units.

    The sums over the keys are in ``sums`` [query, H] and ``total`` [query, 1]: multiples
    of a unit in record mode, else relative to the running maximum ``top``.
    """
    *clean_ref, sums, total, top = rest
    spec = tiling.spec
    b, h, i, step = (pl.program_id(axis) for axis in range(4))
    first, last = tiling.key_span(i, lengths[b])
    if spec.mode == "record":
        sum_unit, weight_unit = units or (
            common.fixed_point_unit(spec.value_clip, num_keys),
            common.fixed_point_unit(1.0, num_keys),
        )

    @pl.when(step == 0)
    def _() -> None:
        sums[...] = jnp.zeros_like(sums)
        total[...] = jnp.zeros_like(total)
        top[...] = jnp.full_like(top, tile.LEAST)

    def add(seen: jax.Array | None) -> None:
        v = v_ref[0, 0]
        x = product(q_ref[0, 0], k_ref[0, 0], (1, 1)) * spec.scale
        if spec.mode == "record":
            w = common.bounded_weights(x, spec.logit_bound, seen)
            sums[...] += tile.fixed_point(product(w.astype(v.dtype), v, (1, 0)), sum_unit)
            total[...] += tile.fixed_point(jnp.sum(w, axis=1, keepdims=True), weight_unit)
            return
        if spec.mode == "sequence":
            x = tile.sequence_logits(x)
        x = tile.hide(x, seen, tile.HIDDEN)
        new_top = jnp.maximum(top[...], jnp.max(x, axis=1, keepdims=True))
        shrink = jnp.exp(top[...] - new_top)
        p = jnp.exp(x - new_top)
        sums[...] = sums[...] * shrink + product(p.astype(v.dtype), v, (1, 0))
        total[...] = total[...] * shrink + jnp.sum(p, axis=1, keepdims=True)
        top[...] = new_top

    tiling.visit(i, first + step, lengths[b], first + step <= last, 0, add)

    @pl.when(step == tiling.key_steps() - 1)
    def _() -> None:
        if units:
            out_ref[0, 0] = sums[...]
            stat_ref[0, 0] = to_row(total[...])
            return
        words = [noise_ref[0, 0, w] for w in range(noise_ref.shape[2])]
        place = Place(words, i * tiling.query, h, spec.rounds, unroll)
        if spec.mode == "record":
            weights = to_row(total[...].astype(jnp.float32) * weight_unit)
            noisy = weights + spec.denominator_std * place.row_normals(tiling.query)
            noisy = common.round_to_grid(noisy, spec.spacing(spec.denominator_std))
            denominator = jnp.where(noisy > spec.denominator_floor, noisy, spec.denominator_floor)
            stat_ref[0, 0] = denominator
            out = sums[...].astype(jnp.float32) * sum_unit
        else:
            weights = total[...]
            is_empty = weights == 0.0
            lse = jnp.where(is_empty, NOTHING_SEEN, top[...] + jnp.log(weights))
            stat_ref[0, 0] = to_row(lse)
            out = sums[...] / jnp.where(is_empty, 1.0, weights)
        if clean_ref:
            clean_ref[0][0, 0] = out.astype(out_ref.dtype)
        if spec.is_noisy:
            normals = place.normals(tiling.query, out.shape[1])
            out = out + spec.numerator_std * normals
            out = common.round_to_grid(out, spec.spacing(spec.numerator_std))
        if spec.mode == "record":
            out = out / to_column(denominator)
        out_ref[0, 0] = out.astype(out_ref.dtype)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the noise of a block of rows lies in the streams of its batch element.

    Attributes:
        words: those of :func:`common.with_child_keys`, uint32 scalars.
        row: number of the first row.
        head: number of the query head.
        rounds: of ChaCha.
        unroll: straight code for the rounds. The interpreter's compiler, XLA on a CPU,
            takes minutes over that.
    """

    words: list[jax.Array]
    row: jax.Array
    head: jax.Array
    rounds: prng.Rounds
    unroll: bool

    def _rows(self, rows: jax.Array) -> jax.Array:
        """The counters of rows that are numbered in the block."""
        return self.words[16] + self.row.astype(jnp.uint32) + rows

    def _block(
        self, key_words: list[jax.Array], first: jax.Array, second: jax.Array
    ) -> tuple[jax.Array, ...]:
        head, batch = self.words[17:]
        counters = (first, second, head + self.head.astype(jnp.uint32), batch)
        return prng.random_block(key_words, counters, rounds=self.rounds, unroll=self.unroll)

    def normals(self, rows: int, columns: int) -> Float32[Array, "r c"]:
        """Noise of the numerator or of output rows: [rows, columns]."""
        tiles, blocks = [], prng.blocks_of_tile(columns)
        for start in range(0, columns, LANES):
            first = _numbers((blocks, rows), 0) + jnp.uint32(start // LANES * blocks)
            block = self._block(self.words[:8], first, self._rows(_numbers((blocks, rows), 1)))
            parts: list[jax.Array] = []
            for p in range(0, 16, 2):
                parts.extend(prng.box_muller(block[p], block[p + 1]))
            tiles.append(jnp.concatenate(parts, axis=0).T)
        return jnp.concatenate(tiles, axis=1)

    def row_normals(self, rows: int) -> Float32[Array, "1 r"]:
        """Noise of the sums of weights: [1, rows]."""
        # 128 rows a sublane, so that a thousand rows cost one ChaCha block.
        shape = (rows // LANES, LANES)
        row = self._rows(_numbers(shape, 0) * jnp.uint32(LANES) + _numbers(shape, 1))
        block = self._block(self.words[8:16], jnp.zeros_like(row), row >> jnp.uint32(4))
        g = prng.normal_of_row(block, row)
        return jnp.concatenate([g[s : s + 1] for s in range(shape[0])], axis=1)


def _numbers(shape: tuple[int, int], axis: int) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis).astype(jnp.uint32)
