"""Attention kernels for NVIDIA GPUs older than Hopper, written with Pallas Triton.

JAX has announced that the Pallas Triton back end will go; its successor does not compile
for these cards. Everything that uses it is in this file and ``triton_backward.py``, and
nothing imports from them but the table of implementations.

One program computes ``rows`` query rows of one head. It goes over the keys in blocks of
``keys`` columns, skips the blocks that none of its rows sees, makes the noise of its rows
in registers, and writes the release. Memory: inputs, outputs and one float32 a row.

Logits are kept in units of ln 2, because the hardware's exponential has base 2. The
``min`` of record mode is always applied, whatever ``bound_logits`` says: where the
caller's promise holds, it changes nothing.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Float32, Int32, UInt32

from pallas_kernels import prng
from pallas_kernels.attention import common, tile, triton_backward, triton_tile
from pallas_kernels.attention.fused import NOTHING_SEEN
from pallas_kernels.attention.spec import AttentionSpec

backward = triton_backward.backward
row_dots = common.row_dots
value_scale = common.value_scale

_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes of the forward kernel's blocks. The defaults fit every shape on every card.

    Attributes:
        rows: query rows of a program.
        keys: keys of one step of its loop; a chunk that record mode sums in floating
            point (``common.CHUNK``) is a multiple of it.
        warps: warps of a program.
        stages: key blocks that are on their way from memory at a time.

    Raises:
        ValueError: for a size that is not a power of two from 16 to 512, or a number of
            warps or stages that no card has.
    """

    rows: int = 32
    keys: int = 32
    warps: int = 8
    stages: int = 1

    def __post_init__(self) -> None:
        triton_tile.check_blocks(self)


def default_blocks(depth: int, dtype: Any) -> Blocks:
    """Block sizes for a head dimension and a dtype.

    They fit into the 99 KB of shared memory that the cards of capability 8.6 and 8.9 have.
    """
    if jnp.dtype(dtype) == jnp.float32:
        return Blocks()
    if depth == 256:
        return Blocks(rows=64, keys=32, warps=8, stages=2)
    return Blocks(rows=64, keys=64, warps=4, stages=2)


def unsupported(spec: AttentionSpec, query: Any, key: Any, *, has_mask: bool) -> str | None:
    """Why these kernels cannot do a call, on any device; None if they can."""
    if has_mask:
        return "it takes no mask array (causal, window and lengths are supported)"
    if query.dtype not in _DTYPES:
        return f"it takes float32, bfloat16 and float16, not {query.dtype}"
    if query.shape[-1] > 256:
        return f"its largest head dimension is 256, not {query.shape[-1]}"
    return None


def forward(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    value_scale: Float32[Array, "B K S"] | None,
    noise: UInt32[Array, "B 11"] | None,
    lengths: Int32[Array, "B"],
    spec: AttentionSpec,
    *,
    blocks: Blocks | None = None,
    interpret: bool = False,
    keep_clean: bool = True,
) -> tuple[jax.Array, Float32[Array, "B N T"], jax.Array | None]:
    """The release, one statistic a row, and in sequence mode the output before the noise.

    See :class:`pallas_kernels.attention.fused.Backend` for the arguments.
    """
    dtypes = query.dtype, jnp.float32, spec.mode == "sequence" and keep_clean
    operands = (query, key, value, value_scale, noise, lengths)
    return _launch(operands, spec, None, dtypes, blocks, interpret)


def sums(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    value_scale: Float32[Array, "B K S"] | None,
    lengths: Int32[Array, "B"],
    spec: AttentionSpec,
    units: common.Units,
    *,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> tuple[Int32[Array, "B T N H"], Int32[Array, "B N T"]]:
    """See :class:`pallas_kernels.attention.fused.Backend`."""
    operands = (query, key, value, value_scale, None, lengths)
    return _launch(operands, spec, units, (jnp.int32, jnp.int32, False), blocks, interpret)[:2]


def _launch(
    operands: tuple[Any, ...],
    spec: AttentionSpec,
    units: common.Units | None,
    results: tuple[Any, Any, bool],
    blocks: Blocks | None,
    interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Runs the kernel; with ``units`` for :func:`sums`.

    ``results`` is the dtypes of rows and statistic, and whether there is a clean output.
    """
    query, key, _, value_scale, noise, _ = operands
    batch, num_rows, heads, depth = query.shape
    num_keys, kv_heads = key.shape[1:3]
    groups = heads // kv_heads
    blocks = blocks or default_blocks(depth, query.dtype)

    # The whole sequence of one head; the kernel moves its own window over it.
    query_spec = pl.BlockSpec((None, num_rows, None, depth), lambda i, n, b: (b, 0, n, 0))
    key_spec = pl.BlockSpec((None, num_keys, None, depth), lambda i, n, b: (b, 0, n // groups, 0))
    scale_spec = pl.BlockSpec((None, None, num_keys), lambda i, n, b: (b, n // groups, 0))
    noise_spec = pl.BlockSpec((None, 11), lambda i, n, b: (b, 0))
    stat_spec = pl.BlockSpec((None, None, num_rows), lambda i, n, b: (b, n, 0))
    out_dtype, stat_dtype, keep_clean = results
    out = jax.ShapeDtypeStruct(query.shape, out_dtype)
    stat = jax.ShapeDtypeStruct((batch, heads, num_rows), stat_dtype)
    result: tuple[jax.Array, jax.Array, jax.Array | None] = pl.pallas_call(
        functools.partial(
            _kernel, spec=spec, units=units, blocks=blocks, num_rows=num_rows, num_keys=num_keys
        ),
        out_shape=(out, stat, out if keep_clean else None),
        grid=(pl.cdiv(num_rows, blocks.rows), heads, batch),
        in_specs=[
            query_spec,
            key_spec,
            key_spec,
            None if value_scale is None else scale_spec,
            None if noise is None else noise_spec,
            pl.BlockSpec((batch,), lambda i, n, b: (0,)),
        ],
        out_specs=(query_spec, stat_spec, query_spec if keep_clean else None),
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
        name=f"attention_{'sums' if units else spec.mode}",
    )(*operands)
    return result


def _kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    scale_ref: Any,
    noise_ref: Any,
    lengths_ref: Any,
    out_ref: Any,
    stat_ref: Any,
    clean_ref: Any,
    *,
    spec: AttentionSpec,
    units: common.Units | None,
    blocks: Blocks,
    num_rows: int,
    num_keys: int,
) -> None:
    """One block of query rows of one head; with ``units``, its sums and no release."""
    # With a causal mask the last rows see most: they start first.
    first_row = (pl.num_programs(0) - 1 - pl.program_id(0)) * blocks.rows
    length = lengths_ref[pl.program_id(2)]
    rows = first_row + jnp.arange(blocks.rows, dtype=jnp.int32)
    row_slice = pl.ds(first_row, blocks.rows)
    in_bounds = rows < num_rows
    q = triton_tile.load(q_ref.at[row_slice, :], in_bounds[:, None])
    low, high = triton_tile.visible_columns(spec, rows, length)
    first = triton_tile.visible_columns(spec, first_row, length)[0]
    last = triton_tile.visible_columns(spec, first_row + (blocks.rows - 1), length)[1]

    def logits(start: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Logits in units of ln 2, and which of them are seen."""
        columns = start + jnp.arange(blocks.keys, dtype=jnp.int32)
        k = triton_tile.load(k_ref.at[pl.ds(start, blocks.keys), :], (columns < length)[:, None])
        x = triton_tile.dot(q, k, transpose_b=True) * jnp.float32(spec.scale * triton_tile.LOG2_E)
        return x, triton_tile.is_seen(spec, columns[None, :], low[:, None], high[:, None])

    def weighted_values(weights: jax.Array, start: jax.Array) -> jax.Array:
        columns = start + jnp.arange(blocks.keys, dtype=jnp.int32)
        values = v_ref.at[pl.ds(start, blocks.keys), :]
        exists = columns < length
        if scale_ref is None:
            return triton_tile.dot(
                weights.astype(q.dtype), triton_tile.load(values, exists[:, None])
            )
        scale = triton_tile.load(scale_ref.at[pl.ds(start, blocks.keys)], exists)
        # A row with the factor 0 is not loaded at all: it may hold NaN.
        v = triton_tile.load(values, (scale > 0.0)[:, None])
        return triton_tile.dot((weights * scale[None, :]).astype(q.dtype), v)

    steps = (blocks, q.shape, first, last, logits, weighted_values)
    if spec.mode != "record":
        total, stat = _softmax(spec, *steps)
    else:
        own = common.Units(
            common.fixed_point_unit(spec.value_clip, num_keys),
            common.fixed_point_unit(1.0, num_keys),
        )
        total, stat = _bounded_sums(spec, units or own, *steps)
        if units:
            plgpu.store(out_ref.at[row_slice, :], total, mask=in_bounds[:, None])
            plgpu.store(stat_ref.at[row_slice], stat, mask=in_bounds)
            return
        total = total.astype(jnp.float32) * jnp.float32(own.numerator)
        stat = stat.astype(jnp.float32) * jnp.float32(own.denominator)

    if clean_ref is not None:
        plgpu.store(clean_ref.at[row_slice, :], total.astype(q.dtype), mask=in_bounds[:, None])
    if spec.is_noisy:
        words = [noise_ref[i] for i in range(11)]
        row_counters = words[8] + rows.astype(jnp.uint32)
        head_counter = words[9] + pl.program_id(1).astype(jnp.uint32)
        child = _child_key(words[:8], common.NUMERATOR)
        g = _normal_tile(child, row_counters, head_counter, words[10], q.shape[1], spec.rounds)
        total = total + jnp.float32(spec.numerator_std) * g
        total = triton_tile.round_to_grid(total, spec.spacing(spec.numerator_std))
    if spec.mode == "record":
        child = _child_key(words[:8], common.DENOMINATOR)
        g = _normal_column(child, row_counters, head_counter, words[10], spec.rounds)
        stat = stat + jnp.float32(spec.denominator_std) * g
        stat = triton_tile.round_to_grid(stat, spec.spacing(spec.denominator_std))
        floor = jnp.float32(spec.denominator_floor)
        stat = jnp.where(stat > floor, stat, floor)
        total = total / stat[:, None]
    plgpu.store(out_ref.at[row_slice, :], total.astype(q.dtype), mask=in_bounds[:, None])
    plgpu.store(stat_ref.at[row_slice], stat, mask=in_bounds)


def _bounded_sums(
    spec: AttentionSpec,
    units: common.Units,
    blocks: Blocks,
    shape: tuple[int, ...],
    first: jax.Array,
    last: jax.Array,
    logits: Any,
    weighted_values: Any,
) -> tuple[jax.Array, jax.Array]:
    """N and L of record mode, in ``units``.

    At most ``common.CHUNK`` keys are summed in floating point; such sums are rounded to a
    public grid and added as integers (docs/privacy.md, section 1, "Rounding").
    """
    bound = jnp.float32(spec.logit_bound * triton_tile.LOG2_E)

    def block(j: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        start = j * blocks.keys
        x, seen = logits(start)
        weights = triton_tile.bounded_weights(x, bound, seen)
        return sums[0] + weighted_values(weights, start), sums[1] + jnp.sum(weights, axis=1)

    def chunk(c: jax.Array, totals: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        begin = jnp.maximum(first, c * common.CHUNK) // blocks.keys
        end = pl.cdiv(jnp.minimum(last, (c + 1) * common.CHUNK), blocks.keys)
        zeros = jnp.zeros(shape, jnp.float32), jnp.zeros(shape[:1], jnp.float32)
        numerator, denominator = jax.lax.fori_loop(begin, end, block, zeros)
        return (
            totals[0] + triton_tile.to_fixed_point(numerator, units.numerator),
            totals[1] + triton_tile.to_fixed_point(denominator, units.denominator),
        )

    zeros = jnp.zeros(shape, jnp.int32), jnp.zeros(shape[:1], jnp.int32)
    chunks = first // common.CHUNK, pl.cdiv(last, common.CHUNK)
    totals: tuple[jax.Array, jax.Array] = jax.lax.fori_loop(*chunks, chunk, zeros)
    return totals


def _softmax(
    spec: AttentionSpec,
    blocks: Blocks,
    shape: tuple[int, ...],
    first: jax.Array,
    last: jax.Array,
    logits: Any,
    weighted_values: Any,
) -> tuple[jax.Array, jax.Array]:
    """The softmax average of the values, and the log-sum-exp of the logits."""

    def block(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        total, weight_sum, top = carry
        start = j * blocks.keys
        x, seen = logits(start)
        if spec.mode == "sequence":
            x = tile.sequence_logits(x)
        x = jnp.where(seen, x, -jnp.inf)
        new_top = jnp.maximum(top, jnp.max(x, axis=1))
        # Nothing seen yet: any finite number will do, and −∞ would give NaN.
        shift = jnp.where(new_top == -jnp.inf, 0.0, new_top)
        weights = jnp.exp2(x - shift[:, None])
        shrink = jnp.exp2(top - shift)
        total = total * shrink[:, None] + weighted_values(weights, start)
        return total, weight_sum * shrink + jnp.sum(weights, axis=1), new_top

    top = jnp.full(shape[:1], -jnp.inf, jnp.float32)
    carry = jnp.zeros(shape, jnp.float32), jnp.zeros(shape[:1], jnp.float32), top
    begin, end = first // blocks.keys, pl.cdiv(last, blocks.keys)
    total, weight_sum, top = jax.lax.fori_loop(begin, end, block, carry)
    empty = weight_sum == 0.0
    lse = (top + jnp.log2(jnp.where(empty, 1.0, weight_sum))) * jnp.float32(math.log(2.0))
    average = total / jnp.where(empty, 1.0, weight_sum)[:, None]
    return average, jnp.where(empty, NOTHING_SEEN, lse)


def _child_key(parent: list[jax.Array], purpose: int) -> list[jax.Array]:
    """:func:`pallas_kernels.prng.derive_key` of scalars, its rounds in a loop."""
    zero = jnp.uint32(0)
    counters = (zero, zero, zero, jnp.uint32(purpose))
    return list(prng.random_block(parent, counters, unroll=False)[:8])


def _normal_tile(
    key_words: list[jax.Array],
    rows: UInt32[Array, "t"],
    head: jax.Array,
    batch: jax.Array,
    depth: int,
    rounds: prng.Rounds,
) -> Float32[Array, "t h"]:
    """The normals of :func:`pallas_kernels.prng.normal_tile` for some rows of one head."""
    tiles, blocks = pl.cdiv(depth, 128), prng.blocks_of_tile(depth)
    block = jax.lax.broadcasted_iota(jnp.uint32, (1, blocks * tiles), 1)
    words = prng.random_block(
        key_words, (block, rows[:, None], head, batch), rounds=rounds, unroll=False
    )
    gaussians: list[jax.Array] = []
    for p in range(0, 16, 2):
        gaussians.extend(prng.box_muller(words[p], words[p + 1]))
    # Triton cannot write to a part of an array, but it can interleave two arrays. Putting
    # the halves of the list together again and again appends the word's number, bit by
    # bit: [t, tiles·blocks] → [t, tiles·blocks, 2, 2, ...].
    while len(gaussians) > 1:
        half = len(gaussians) // 2
        pairs = zip(gaussians[:half], gaussians[half:], strict=True)
        gaussians = [jnp.stack(pair, axis=-1) for pair in pairs]
    # Column 128·tile + blocks·word + block.
    words_last = gaussians[0].reshape(rows.shape[0], tiles, blocks, 16)
    return words_last.transpose(0, 1, 3, 2).reshape(rows.shape[0], depth)


def _normal_column(
    key_words: list[jax.Array],
    rows: UInt32[Array, "t"],
    head: jax.Array,
    batch: jax.Array,
    rounds: prng.Rounds,
) -> Float32[Array, "t"]:
    """The normals of the sums of weights."""
    counters = (jnp.uint32(0), rows >> jnp.uint32(4), head, batch)
    words = prng.random_block(key_words, counters, rounds=rounds, unroll=False)
    return prng.normal_of_row(words, rows)
