"""Attention for Hopper GPUs, forward, in Pallas Mosaic GPU.

One block of threads does 64 rows of one head for each of its compute warpgroups (two,
usually). Another warpgroup fetches tiles of keys and values into shared memory, and one
more makes the noise while the matrix units work. docs/kernels.md has the picture.

A compute warpgroup, for tile i: starts the products QK(i+1) and P(i)V(i) together, turns
the logits of tile i+1 into weights while P(i)V(i) still runs, waits for it, and packs
the weights. With a public logit bound (record mode) there is no row maximum and nothing
is rescaled; the other modes do the usual online softmax here.

The accumulators of the matrix units hold at most ``common.HOPPER_CHUNK`` keys (record mode). Then
the sums go, as multiples of a public unit, into an int32 bank in shared memory, where the
noise already is: integers add exactly in any order, which is what the sensitivity counts
on (docs/privacy.md, section 1, "Rounding").
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import prng
from pallas_kernels.attention import (
    common,
    fused,
    mosaic_gpu_backward,
    mosaic_gpu_backward_tiles,
    triton,
)
from pallas_kernels.attention import mosaic_gpu_ops as ops
from pallas_kernels.attention.spec import AttentionSpec

# For the tuning table, which looks where ``backward`` is.
BackwardBlocks = mosaic_gpu_backward.Blocks

__all__ = ["BackwardBlocks", "Blocks", "backward", "forward", "unsupported"]

_ROWS = 64  # rows of one warpgroup's matrix instruction
_LOG2E = math.log2(math.e)
# Registers a thread. A block starts with the same for all, 65536 for all its threads, and
# what some take others must have given back, or they wait for ever.
_COMPUTE_REGISTERS = {(1, False): 248, (2, False): 240, (1, True): 256, (2, True): 216}
_NOISE_REGISTERS = 56
_DTYPES = (jnp.bfloat16, jnp.float16)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Block sizes of the forward kernel; 0 means the default for the head dimension.

    Attributes:
        keys: keys of one tile, a multiple of 64 that divides ``common.HOPPER_CHUNK``.
        stages: tiles of keys and values in flight.
        warpgroups: compute warpgroups of a block, 1 or 2.
    """

    keys: int = 0
    stages: int = 2
    warpgroups: int = 0


def unsupported(spec: AttentionSpec, query: Any, key: Any, *, has_mask: bool) -> str | None:
    """See :class:`pallas_kernels.attention.fused.Backend`."""
    if query.dtype not in _DTYPES:
        return f"{query.dtype} operands; the matrix units take bfloat16 and float16"
    if spec.scale <= 0:
        return f"scale {spec.scale} is not positive"
    num_keys = key.shape[1]
    if spec.mode == "record" and numerator_unit(spec, num_keys) > _sum_unit(spec, num_keys):
        # The sensitivity counts on a unit that is small beside the clip.
        return f"numerator_std {spec.numerator_std} is too large for 32-bit sums"
    if max(query.shape[1], num_keys) > mosaic_gpu_backward_tiles.MOST:
        return f"more than {mosaic_gpu_backward_tiles.MOST} rows or keys"
    return None


def backward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    value_scale: jax.Array | None,
    lengths: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    d_out: jax.Array,
    spec: AttentionSpec,
    *,
    blocks: mosaic_gpu_backward.Blocks | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See :class:`pallas_kernels.attention.fused.Backend`.

    For head dimensions above 128 the gradients are the Triton kernels'.
    """
    operands = (query, key, value, value_scale, lengths, lse, delta, d_out, spec)
    if query.shape[3] > 128:
        return triton.backward(*operands, interpret=interpret)
    return mosaic_gpu_backward.backward(*operands, blocks=blocks, interpret=interpret)


def forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    value_scale: jax.Array | None,
    noise: jax.Array | None,
    lengths: jax.Array,
    spec: AttentionSpec,
    *,
    blocks: Blocks | None = None,
    interpret: bool = False,
    keep_clean: bool = True,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """See :class:`pallas_kernels.attention.fused.Backend`."""
    if interpret:
        raise ValueError(
            "interpret=True: the Mosaic GPU interpreter knows no register operands of matrix "
            "products; run these kernels on a Hopper GPU."
        )
    plan = _plan(query, key, spec, blocks or Blocks())
    num_rows, num_keys = query.shape[1], key.shape[1]
    # Tiled copies need row counts that are multiples of 8.
    query, key, value = (_pad_axis(x, 1, 8) for x in (query, key, value))
    batch, _, heads, depth = query.shape
    dirty = factors = None
    if value_scale is not None:
        factors = _pad_axis(_rounded_down(value_scale, query.dtype), 2, plan.keys, 1.0)
        dirty = jnp.any(value_scale == 0.0, axis=2).astype(jnp.int32)

    w, tile_rows = plan.warpgroups, plan.warpgroups * _ROWS
    row_tiles = pl.cdiv(num_rows, tile_rows)
    like_query = jax.ShapeDtypeStruct(query.shape, query.dtype)
    out_type = [
        like_query,
        jax.ShapeDtypeStruct((batch, heads, row_tiles * tile_rows), jnp.int32),
        like_query if keep_clean and spec.mode == "sequence" else None,
    ]
    swizzled = functools.partial(plgpu.SMEM, dtype=query.dtype, transforms=ops.SWIZZLED)
    barrier = functools.partial(plgpu.Barrier, num_barriers=plan.stages)
    scratch: dict[str, Any] = {
        "q_smem": swizzled((w, _ROWS, depth)),
        "k_smem": swizzled((plan.stages, plan.keys, depth)),
        "v_smem": swizzled((plan.stages, plan.keys, depth)),
        # The rows' noisy sums of weights in fixed point; then the bits of the statistics.
        "row_bank": plgpu.SMEM((2 * _ROWS,), jnp.int32),
        "q_bar": plgpu.Barrier(num_barriers=w),
        "k_bar": barrier(),
        "v_bar": barrier(num_arrivals=1 if factors is None else 2),
        "k_free": barrier(num_arrivals=w),
        "v_free": barrier(num_arrivals=w),
        "factor_smem": None,
        "bank": None,
        "zero_bar": None,
        "noise_bar": None,
    }
    if spec.is_noisy:
        scratch |= {
            "factor_smem": plgpu.SMEM((plan.stages, plan.keys), query.dtype),
            "bank": plgpu.SMEM((w, depth // 8, 4, 128), jnp.int32),
            "zero_bar": plgpu.Barrier(num_arrivals=w),
            "noise_bar": plgpu.Barrier(),
        }
    out, stat, clean = plgpu.kernel(
        functools.partial(_kernel, spec, plan, row_tiles, heads // key.shape[2]),
        out_type=out_type,
        scratch_types=scratch,
        grid=(batch, heads, row_tiles),
        grid_names=("batch", "head", "row_tile"),
        num_threads=w + (2 if spec.is_noisy else 1),
        thread_name="warpgroup",
        kernel_name=f"attention_{spec.mode}",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=True,
            # Rows are reduced within a warp.
            reduction_scratch_bytes=0,
        ),
    )(query, key, value, factors, dirty, noise, jnp.minimum(lengths, num_keys))
    out = out[:, :num_rows]
    stat = lax.bitcast_convert_type(stat, jnp.float32)
    return out, stat[:, :, :num_rows], None if clean is None else clean[:, :num_rows]


@dataclasses.dataclass(frozen=True)
class _Plan:
    keys: int
    stages: int
    warpgroups: int
    tiles: int  # tiles of all keys
    unit: float  # of the fixed-point numerator
    row_unit: float  # of the fixed-point sum of weights


def _plan(query: jax.Array, key: jax.Array, spec: AttentionSpec, blocks: Blocks) -> _Plan:
    depth, num_keys = query.shape[3], key.shape[1]
    wide = depth > 128
    keys = blocks.keys or (64 if wide else 128)
    # The bank of a wide head leaves room for one warpgroup's rows.
    warpgroups = blocks.warpgroups or (1 if wide and spec.is_noisy else 2)
    unit = row_unit = 1.0
    if spec.is_noisy:
        unit = numerator_unit(spec, num_keys)
        row_unit = max(
            common.fixed_point_unit(1.0, max(num_keys, 2**10)),
            common.fixed_point_unit(max(8.0 * spec.denominator_std, 1e-30), 1),
        )
    return _Plan(keys, blocks.stages, warpgroups, pl.cdiv(num_keys, keys), unit, row_unit)


def numerator_unit(spec: AttentionSpec, num_keys: int) -> float:
    """The power of two whose multiples the bank counts.

    The whole sum and the noise (8 standard deviations) must fit 31 bits, and the sum of
    one chunk 22 bits and a sign.
    """
    noise = common.fixed_point_unit(max(8.0 * spec.numerator_std, 1e-30), 1)
    return max(noise, _sum_unit(spec, num_keys)) if spec.mode == "record" else noise


def _sum_unit(spec: AttentionSpec, num_keys: int) -> float:
    # 2 % above the clip: what rounding may add to a row.
    bound = 1.02 * spec.value_clip
    chunk = 2.0 ** (math.ceil(math.log2(bound * common.HOPPER_CHUNK)) - 22)
    return max(chunk, common.fixed_point_unit(spec.value_clip, num_keys))


def _kernel(
    spec: AttentionSpec, plan: _Plan, row_tiles: int, groups: int, *refs: Any, **scratch: Any
) -> None:
    q_ref, k_ref, v_ref, factor_ref, dirty_ref, noise_ref, lengths_ref, *outputs = refs
    noisy = spec.is_noisy
    warpgroup = lax.axis_index("warpgroup")
    batch, head = lax.axis_index("batch"), lax.axis_index("head")
    row_tile = lax.axis_index("row_tile")
    if spec.is_causal:
        # The longest rows first: short blocks then fill the gaps at the end.
        row_tile = row_tiles - 1 - row_tile
    kv_head = lax.div(head, jnp.int32(groups))
    length = lengths_ref[batch]
    first_row = row_tile * (plan.warpgroups * _ROWS)
    low, high = _tile_range(spec, plan, first_row, plan.warpgroups * _ROWS, length)

    @pl.when(warpgroup < plan.warpgroups)
    def _() -> None:
        plgpu.set_max_registers(_COMPUTE_REGISTERS[plan.warpgroups, noisy], action="increase")
        dirty = jnp.int32(0) if dirty_ref is None else dirty_ref[batch, kv_head]
        _compute(
            spec, plan, q_ref, outputs, scratch, warpgroup, (batch, head, first_row),
            length, low, high, dirty,
        )  # fmt: skip

    @pl.when(warpgroup == plan.warpgroups)
    def _() -> None:
        plgpu.set_max_registers(24, action="decrease")
        sources = (k_ref, v_ref, factor_ref)
        pl.loop(0, high - low)(
            functools.partial(_load_tile, plan, sources, scratch, (batch, kv_head), low)
        )

    if not noisy:
        return

    @pl.when(warpgroup == plan.warpgroups + 1)
    def _() -> None:
        plgpu.set_max_registers(_NOISE_REGISTERS, action="decrease")
        noise = [noise_ref[batch, i] for i in range(19)]
        plgpu.barrier_wait(scratch["zero_bar"])

        @pl.loop(0, plan.warpgroups * 4 * pl.cdiv(q_ref.shape[3], 128))
        def _(part: jax.Array) -> None:
            _noise_slice(spec, plan, noise, scratch["bank"], part, head, first_row)

        if spec.mode == "record":
            _row_noise(spec, plan, noise, scratch["row_bank"], head, first_row)
        plgpu.barrier_arrive(scratch["noise_bar"])


def _tile_range(
    spec: AttentionSpec, plan: _Plan, first_row: jax.Array, rows: int, length: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The tiles of keys that some of the rows may see; at least one."""
    start, stop = jnp.int32(0), length
    if spec.is_causal:
        stop = jnp.minimum(stop, first_row + rows)
    if spec.window is not None:
        left, right = spec.window
        start = jnp.maximum(start, first_row - left)
        stop = jnp.minimum(stop, first_row + rows + right)
    low = jnp.minimum(lax.div(start, jnp.int32(plan.keys)), plan.tiles - 1)
    high = lax.div(stop + (plan.keys - 1), jnp.int32(plan.keys))
    return low, jnp.maximum(high, low + 1)


def _load_tile(
    plan: _Plan, sources: Any, scratch: Any, where: Any, low: jax.Array, i: jax.Array
) -> None:
    """Fetches the i-th tile of this block into its slot, when the slot is free."""
    k_ref, v_ref, factor_ref = sources
    batch, kv_head = where
    slot = lax.rem(i, jnp.int32(plan.stages))
    keys = pl.ds((low + i) * plan.keys, plan.keys)

    def wait(barrier: Any) -> None:
        pl.when(i >= plan.stages)(lambda: plgpu.barrier_wait(barrier.at[slot]))

    wait(scratch["k_free"])
    k_bar, v_bar = scratch["k_bar"].at[slot], scratch["v_bar"].at[slot]
    plgpu.copy_gmem_to_smem(k_ref.at[batch, keys, kv_head], scratch["k_smem"].at[slot], k_bar)
    wait(scratch["v_free"])
    plgpu.copy_gmem_to_smem(v_ref.at[batch, keys, kv_head], scratch["v_smem"].at[slot], v_bar)
    if factor_ref is not None:
        source = factor_ref.at[batch, kv_head, keys]
        plgpu.copy_gmem_to_smem(source, scratch["factor_smem"].at[slot], v_bar)


def _noise_slice(
    spec: AttentionSpec, plan: _Plan, noise: Any, bank: Any, part: jax.Array,
    head: jax.Array, first_row: jax.Array,
) -> None:  # fmt: skip
    """One ChaCha block a thread: noise for one register of every column group of a tile.

    Thread t makes the values that thread t of a compute warpgroup will add.
    """
    thread = plgpu.broadcasted_iota(jnp.int32, (128,), 0, layout=ops.THREADS)
    wide, rest = (
        lax.div(part, jnp.int32(4 * plan.warpgroups)),
        lax.rem(part, jnp.int32(4 * plan.warpgroups)),
    )
    own, register = lax.div(rest, jnp.int32(4)), lax.rem(rest, jnp.int32(4))
    lane = lax.rem(thread, jnp.int32(32))
    row = lax.div(thread, jnp.int32(32)) * 16 + lax.div(lane, jnp.int32(4))
    row = row + 8 * lax.div(register, jnp.int32(2)) + own * _ROWS + first_row
    column = lax.rem(lane, jnp.int32(4)) * 2 + lax.rem(register, jnp.int32(2)) + 8 * wide
    counters = (
        column.astype(jnp.uint32),
        row.astype(jnp.uint32) + noise[16],
        head.astype(jnp.uint32) + noise[17],
        noise[18],
    )
    words = prng.random_block(noise[:8], counters, rounds=spec.rounds, unroll=False)
    factor = spec.numerator_std / plan.unit
    used = words[: min(16, bank.shape[1])]
    ops.add_normals(used, bank, own, 16 * wide, register, factor=factor)


def _row_noise(
    spec: AttentionSpec, plan: _Plan, noise: Any, bank: Any, head: jax.Array, first_row: jax.Array
) -> None:
    """The noise of the rows' sums of weights: thread t makes that of row t."""
    row = plgpu.broadcasted_iota(jnp.int32, (128,), 0, layout=ops.THREADS) + first_row
    counters = (
        jnp.uint32(0),
        row.astype(jnp.uint32) + noise[16],
        head.astype(jnp.uint32) + noise[17],
        noise[18],
    )
    words = prng.random_block(noise[8:16], counters, rounds=spec.rounds, unroll=False)
    factor = spec.denominator_std / plan.row_unit
    ops.add_row_normals(words[0], words[1], bank, factor=factor)


def _compute(
    spec: AttentionSpec, plan: _Plan, q_ref: Any, outputs: Any, scratch: Any,
    warpgroup: jax.Array, where: Any, length: jax.Array, low: jax.Array, high: jax.Array,
    dirty: jax.Array,
) -> None:  # fmt: skip
    """The main loop of a compute warpgroup."""
    batch, head, first_row = where
    first_row = first_row + warpgroup * _ROWS
    q_smem = scratch["q_smem"].at[warpgroup]
    k_smem, v_smem = scratch["k_smem"], scratch["v_smem"]
    k_bar, v_bar = scratch["k_bar"], scratch["v_bar"]
    q_bar = scratch["q_bar"].at[warpgroup]
    depth, dtype = q_ref.shape[3], q_ref.dtype
    stages = jnp.int32(plan.stages)
    is_record = spec.mode == "record"

    plgpu.copy_gmem_to_smem(q_ref.at[batch, pl.ds(first_row, _ROWS), head], q_smem, q_bar)

    def slot_of(tile: jax.Array) -> jax.Array:
        return lax.rem(tile - low, stages)

    weigh = functools.partial(_weigh, spec, plan, first_row, length)

    def pack(weights: jax.Array, tile: jax.Array, careful: bool) -> jax.Array:
        """Waits for the tile's values and packs the weights for the product with them."""
        slot = slot_of(tile)
        plgpu.barrier_wait(v_bar.at[slot])
        if not spec.is_noisy:
            return ops.pack(weights, None, dtype)
        if careful:
            pl.when(dirty > 0)(lambda: ops.zero_non_finite(v_smem, slot, dtype=dtype))
        factors = plgpu.load(scratch["factor_smem"].at[slot], layout=ops.PER_COLUMN)
        return ops.pack(weights, factors, dtype)

    def step(tile: jax.Array, carry: Any, acc: Any, careful: bool) -> Any:
        packed, rows = carry
        slot, next_slot = slot_of(tile), slot_of(tile + 1)
        plgpu.barrier_wait(k_bar.at[next_slot])

        def products(logits_acc: Any) -> Any:
            plgpu.wgmma(logits_acc, q_smem, k_smem.at[next_slot].T)
            plgpu.wgmma(acc, packed, v_smem.at[slot])
            logits = plgpu.wgmma_accumulator_load(logits_acc, wait_n=1)
            plgpu.barrier_arrive(scratch["k_free"].at[next_slot])
            weights, new_rows, shrink = weigh(logits, tile + 1, rows, careful)
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(scratch["v_free"].at[slot])
            if shrink is not None:
                acc[...] = acc[...] * lax.broadcast_in_dim(shrink, (_ROWS, depth), [0])
            # Not earlier: the product still reads the registers of the last weights.
            return pack(weights, tile + 1, careful), new_rows

        return pl.run_scoped(products, plgpu.WGMMAAccumulatorRef((_ROWS, plan.keys), jnp.float32))

    def row(value: float) -> jax.Array:
        return plgpu.layout_cast(jnp.full((_ROWS,), value, jnp.float32), ops.PER_ROW)

    # The sum of weights; and the maximum of the logits, where there is one.
    rows = (row(0.0),) if is_record else (row(0.0), row(-jnp.inf))

    if spec.is_noisy:
        ops.bank_zero(scratch["bank"], scratch["row_bank"], warpgroup)
        plgpu.barrier_arrive(scratch["zero_bar"])
    plgpu.barrier_wait(q_bar)
    plgpu.barrier_wait(k_bar.at[0])

    def first_product(logits_acc: Any) -> jax.Array:
        plgpu.wgmma(logits_acc, q_smem, k_smem.at[0].T)
        return logits_acc[...]

    logits = pl.run_scoped(
        first_product, plgpu.WGMMAAccumulatorRef((_ROWS, plan.keys), jnp.float32)
    )
    plgpu.barrier_arrive(scratch["k_free"].at[0])
    weights, rows, _ = weigh(logits, low, rows, True)
    carry = (pack(weights, low, True), rows)

    # Tiles before this one need no mask and hold no NaN: their steps are a loop of their
    # own, of half the instructions.
    careful_from = _first_partial(spec, plan, first_row, length, low)
    careful_from = jnp.where(dirty > 0, low, careful_from)

    def steps(start: jax.Array, stop: jax.Array, carry: Any, acc: Any) -> Any:
        middle = jnp.clip(careful_from - 1, start, jnp.maximum(start, stop))
        plain, careful = (
            lambda tile, carry, careful=careful: step(tile, carry, acc, careful)
            for careful in (False, True)
        )
        carry = lax.fori_loop(start, middle, plain, carry)
        return lax.fori_loop(middle, stop, careful, carry)

    accumulator = plgpu.WGMMAAccumulatorRef((_ROWS, depth), jnp.float32)
    # Record mode sums a chunk of the keys at a time; the other modes all of them.
    per_chunk = common.HOPPER_CHUNK // plan.keys if is_record else plan.tiles
    chunks = jnp.int32(0)
    if plan.tiles > per_chunk:
        first = lax.div(low, jnp.int32(per_chunk))
        chunks = lax.div(high - 2, jnp.int32(per_chunk)) + 1 - first
        chunks = jnp.where(high - 1 > low, chunks, 0)

        def one_chunk(chunk: jax.Array, carry: Any) -> Any:
            start = jnp.maximum(low, chunk * per_chunk)
            stop = jnp.minimum((chunk + 1) * per_chunk, high - 1)
            (packed, (total,)), sums = pl.run_scoped(
                lambda acc: (steps(start, stop, carry, acc), acc[...]), accumulator
            )
            ops.bank_add(sums, scratch["bank"], warpgroup, unit=plan.unit)
            ops.row_bank_add(total, scratch["row_bank"], warpgroup, unit=plan.row_unit)
            return packed, (row(0.0),)

        carry = lax.fori_loop(first, first + chunks, one_chunk, carry)

    def last_product(acc: Any) -> Any:
        # With chunks, the last tile is one by itself.
        packed, rows = carry if plan.tiles > per_chunk else steps(low, high - 1, carry, acc)
        plgpu.wgmma(acc, packed, v_smem.at[slot_of(high - 1)])
        return acc[...], rows

    sums, rows = pl.run_scoped(last_product, accumulator)
    if spec.is_noisy:
        plgpu.barrier_wait(scratch["noise_bar"])

    def store(tile: jax.Array, ref: Any) -> None:
        q_smem[...] = tile.astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_smem, ref.at[batch, pl.ds(first_row, _ROWS), head])

    out_ref, stat_ref, clean_ref = outputs
    own_rows = pl.ds(warpgroup * _ROWS, _ROWS)
    row_bank = scratch["row_bank"].at[own_rows]

    def per_row(x: jax.Array) -> jax.Array:
        return lax.broadcast_in_dim(x, (_ROWS, depth), [0])

    bank = {
        "bank": scratch["bank"],
        "warpgroup": warpgroup,
        "unit": plan.unit,
        "spacing": spec.spacing(spec.numerator_std),
    }
    if is_record:
        ops.row_bank_add(rows[0], scratch["row_bank"], warpgroup, unit=plan.row_unit)
        noisy = plgpu.load(row_bank, layout=ops.PER_ROW)
        stat = _denominator(spec, noisy.astype(jnp.float32) * plan.row_unit)
        row_bank[...] = lax.bitcast_convert_type(stat, jnp.int32)
        out = ops.bank_total(sums, chunks=chunks, **bank) * per_row(1.0 / stat)
    else:
        total, top = ops.row_sum(rows[0]), rows[1]
        seen = total > 0.0
        stat = jnp.where(seen, top * (1.0 / _LOG2E) + jnp.log(total), fused.NOTHING_SEEN)
        row_bank[...] = lax.bitcast_convert_type(stat, jnp.int32)
        out = sums * per_row(jnp.where(seen, 1.0 / total, 0.0))
        if clean_ref is not None:
            store(out, clean_ref)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        if spec.is_noisy:
            out = ops.bank_noise(out, **bank)
    store(out, out_ref)
    plgpu.copy_smem_to_gmem(row_bank, stat_ref.at[batch, head, pl.ds(first_row, _ROWS)])
    plgpu.wait_smem_to_gmem(0)


def _weigh(
    spec: AttentionSpec, plan: _Plan, first_row: jax.Array, length: jax.Array,
    logits: jax.Array, tile: jax.Array, rows: Any, careful: bool,
) -> tuple[jax.Array, Any, jax.Array | None]:  # fmt: skip
    """Weights of a tile, the rows' state after it, and what to multiply the sums with."""
    first_column = tile * plan.keys
    if spec.mode == "sequence":
        logits = jnp.where(logits == logits, logits, -1e30)
        logits = jnp.minimum(jnp.maximum(logits, -1e30), 1e30)
    if careful:
        logits = _hide(spec, logits, first_row, first_column, length)
    scale = spec.scale * _LOG2E
    total = rows[0]
    if spec.mode == "record":
        bound = plgpu.layout_cast(
            jnp.full((_ROWS,), -spec.logit_bound * _LOG2E, jnp.float32), ops.PER_ROW
        )
        weights, total = ops.exp2_and_sum(
            logits, bound, total, scale=scale, clamp=spec.bound_logits
        )
        return weights, (total,), None
    state = rows[1]
    top = jnp.maximum(state, jnp.max(logits, axis=1) * scale)
    # A row that has seen nothing yet keeps −inf as its maximum and zero as its sums.
    offset = jnp.where(top == -jnp.inf, 0.0, -top)
    shrink = jnp.exp2(state + offset)
    weights, total = ops.exp2_and_sum(logits, offset, total * shrink, scale=scale, clamp=False)
    return weights, (total, top), shrink


def _first_partial(
    spec: AttentionSpec, plan: _Plan, first_row: jax.Array, length: jax.Array, low: jax.Array
) -> jax.Array:
    """The first tile some of whose columns some of the rows do not see."""
    if spec.window is not None:
        return low
    if spec.is_causal:
        length = jnp.minimum(length, first_row + 1)
    return jnp.maximum(low, lax.div(length, jnp.int32(plan.keys)))


def _hide(
    spec: AttentionSpec, logits: jax.Array, first_row: jax.Array, first_column: jax.Array,
    length: jax.Array,
) -> jax.Array:  # fmt: skip
    """−inf where a row does not see a column."""
    ahead = first_row - first_column
    below = above = None
    if spec.is_causal:
        below = ahead
    if spec.window is not None:
        left, right = spec.window
        below = ahead + (min(right, 0) if spec.is_causal else right)
        above = ahead - left
    return ops.hide(logits, length - 1 - first_column, below, above)


def _denominator(spec: AttentionSpec, noisy: jax.Array) -> jax.Array:
    """max(L̃, floor), L̃ on the public grid."""
    spacing = spec.spacing(spec.denominator_std)
    if spacing:
        noisy = jnp.round(noisy * (1.0 / spacing)) * spacing
    return jnp.maximum(noisy, jnp.float32(spec.denominator_floor))


def _rounded_down(x: jax.Array, dtype: Any) -> jax.Array:
    """Factors in [0, 1] in a short format, never above what they were."""
    short = x.astype(dtype)
    bits = lax.bitcast_convert_type(short, jnp.uint16)
    below = lax.bitcast_convert_type(bits - (bits > 0).astype(jnp.uint16), dtype)
    return jnp.where(short.astype(jnp.float32) > x, below, short)


def _pad_axis(x: jax.Array, axis: int, multiple: int, value: float = 0.0) -> jax.Array:
    missing = -x.shape[axis] % multiple
    if not missing:
        return x
    pad = [(0, missing if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, pad, constant_values=value)
