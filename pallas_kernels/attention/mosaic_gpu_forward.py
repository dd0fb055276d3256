"""Attention for Hopper GPUs, forward: one kernel, docs/kernels.md has the picture.

There is one block of threads for each multiprocessor, and it does one job after the
other; a job is 64 rows of one head for each of the block's compute warpgroups (two,
usually). Another warpgroup fetches queries, keys and values into shared memory, for the
next job too, and one more makes the noise while the matrix units work.

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
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import devices, prng
from pallas_kernels.attention import common, fused
from pallas_kernels.attention import mosaic_gpu_bank as banks
from pallas_kernels.attention import mosaic_gpu_ops as ops
from pallas_kernels.attention import mosaic_gpu_registers as regs
from pallas_kernels.attention.mosaic_gpu_factors import Factors
from pallas_kernels.attention.spec import AttentionSpec

ROWS = 64  # of one warpgroup's matrix instruction
_LOG2E = math.log2(math.e)
# Registers a thread, of the compute warpgroups. A block starts with the same for all, 65536
# for all its threads, and what some take others must have given back, or they wait for ever.
COMPUTE_REGISTERS = {
    (1, False): 248, (2, False): 240, (3, False): 160,
    (1, True): 256, (2, True): 216, (3, True): 128,
}  # fmt: skip
# By how many bits a row's offset may stay behind its maximum: float16 holds weights up to 2¹⁵.
_BEHIND = 8.0
NOISE_REGISTERS = {1: 160, 2: 56, 3: 56}


@dataclasses.dataclass(frozen=True)
class Plan:
    """The sizes of a call."""

    keys: int  # of a tile
    stages: int  # tiles of keys and values in shared memory
    warpgroups: int  # that compute
    tiles: int  # of all keys
    row_tiles: int  # of all rows
    unit: float  # of the fixed-point numerator
    row_unit: float  # of the fixed-point sum of weights
    sums_only: bool = False  # record mode's sums, as integers and without noise

    @property
    def rows(self) -> int:
        """Rows of a job."""
        return self.warpgroups * ROWS

    @property
    def key_words(self) -> int:
        """Where the child keys begin in the bank of the rows."""
        return -(-self.rows // 128) * 128


@dataclasses.dataclass(frozen=True)
class _Job:
    """Which rows a block does, and the tiles of keys that some of them may see."""

    batch: jax.Array
    head: jax.Array
    kv_head: jax.Array
    first_row: jax.Array
    length: jax.Array
    low: jax.Array
    high: jax.Array


@dataclasses.dataclass(frozen=True)
class Jobs:
    """Which jobs a block does, one head's after another's: their keys stay in the L2 cache.

    The rows of a causal head see ever more keys. There, a block does jobs in pairs, the
    i-th longest of a head and the i-th shortest of the next head, so that all pairs are
    as long. The head that is missing where their number is odd is the last one again: its
    jobs write the same values twice.
    """

    spec: AttentionSpec
    plan: Plan
    batch: int
    heads: int
    groups: int
    most_blocks: int

    @property
    def _units(self) -> int:
        """What is dealt out to the blocks: jobs, or pairs of jobs."""
        heads = self.batch * self.heads
        return self.plan.row_tiles * (pl.cdiv(heads, 2) if self.spec.is_causal else heads)

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return min(self._units, self.most_blocks)

    def turns(self, block: jax.Array) -> jax.Array:
        """How many jobs a block has."""
        whole, rest = divmod(self._units, self.blocks)
        units = whole + (block < rest).astype(jnp.int32)
        return 2 * units if self.spec.is_causal else units

    def job(self, turn: jax.Array, block: jax.Array, words_ref: Any) -> _Job:
        """A block's job of one turn. A batch element's last word is its number of keys."""
        spec, plan = self.spec, self.plan
        tiles, heads = jnp.int32(plan.row_tiles), jnp.int32(self.heads)
        if spec.is_causal:
            unit = (turn >> 1) * self.blocks + block
            second = (turn & 1) == 1
            row_tile = lax.rem(unit, tiles)
            row_tile = jnp.where(second, row_tile, tiles - 1 - row_tile)
            head = 2 * lax.div(unit, tiles) + second.astype(jnp.int32)
            head = jnp.minimum(head, self.batch * self.heads - 1)
        else:
            unit = turn * self.blocks + block
            row_tile, head = lax.rem(unit, tiles), lax.div(unit, tiles)
        batch, head = lax.div(head, heads), lax.rem(head, heads)
        first_row = row_tile * plan.rows
        length = words_ref[batch, words_ref.shape[1] - 1].astype(jnp.int32)
        start, stop = jnp.int32(0), length
        if spec.is_causal:
            stop = jnp.minimum(stop, first_row + plan.rows)
        if spec.window is not None:
            left, right = spec.window
            start = jnp.maximum(start, first_row - left)
            stop = jnp.minimum(stop, first_row + plan.rows + right)
        low = jnp.minimum(lax.div(start, jnp.int32(plan.keys)), plan.tiles - 1)
        high = jnp.maximum(lax.div(stop + (plan.keys - 1), jnp.int32(plan.keys)), low + 1)
        kv_head = lax.div(head, jnp.int32(self.groups))
        return _Job(batch, head, kv_head, first_row, length, low, high)


def launch(
    spec: AttentionSpec,
    plan: Plan,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    factors: Factors | None,
    noise: jax.Array | None,
    lengths: jax.Array,
    *,
    keep_clean: bool,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Runs the kernel: output, statistic (bits as int32, padded rows) and clean output.

    With ``plan.sums_only``, the sums over the keys in the first two.
    """
    batch, _, heads, depth = query.shape
    w, dtype = plan.warpgroups, query.dtype
    # One array, so that XLA launches one small kernel before this one and not two.
    words = lengths.astype(jnp.uint32)[:, None]
    if noise is not None:
        words = jnp.concatenate([noise, words], axis=1)
    jobs = Jobs(spec, plan, batch, heads, heads // key.shape[2], devices.multiprocessors())
    like_query = jax.ShapeDtypeStruct(query.shape, jnp.int32 if plan.sums_only else dtype)
    out_type = [
        like_query,
        jax.ShapeDtypeStruct((batch, heads, plan.row_tiles * plan.rows), jnp.int32),
        like_query if keep_clean else None,
    ]
    swizzled = functools.partial(plgpu.SMEM, dtype=dtype, transforms=regs.SWIZZLED)
    barrier = functools.partial(plgpu.Barrier, num_barriers=plan.stages)
    scratch: dict[str, Any] = {
        "q_smem": swizzled((w, ROWS, depth)),
        "k_smem": swizzled((plan.stages, plan.keys, depth)),
        "v_smem": swizzled((plan.stages, plan.keys, depth)),
        # The rows' noisy sums of weights in fixed point; then the bits of the statistics. And
        # the child keys, which have no room of their own: each array starts at a multiple
        # of 1 KB, and there is 1 KB left. And a word for the noise of rows of other jobs.
        "row_bank": plgpu.SMEM((plan.key_words + 17,), jnp.int32),
        "q_bar": plgpu.Barrier(num_barriers=w),
        "q_free": plgpu.Barrier(num_arrivals=w),
        "k_bar": barrier(),
        "v_bar": barrier(num_arrivals=1 if factors is None else 2),
        "k_free": barrier(num_arrivals=w),
        "v_free": barrier(num_arrivals=w),
    }
    if spec.is_noisy:
        # Where the bank was, the output waits to be written.
        waiting = swizzled((w, 2, ROWS, depth))
        if plan.sums_only:
            waiting = plgpu.SMEM((w, 1, ROWS, depth), jnp.int32, transforms=regs.SWIZZLED_32)
        scratch |= {
            "factor_smem": plgpu.SMEM((plan.stages, plan.keys), dtype),
            "bank_and_out": plgpu.RefUnion(plgpu.SMEM((w, depth // 8, 4, 128), jnp.int32), waiting),
            "zero_bar": plgpu.Barrier(num_arrivals=w),
            "noise_bar": plgpu.Barrier(),
        }
    elif depth <= 128:
        scratch["out_smem"] = swizzled((w, 1, ROWS, depth))
    return plgpu.kernel(  # type: ignore[no-any-return]
        functools.partial(_kernel, jobs),
        out_type=out_type,
        scratch_types=scratch,
        grid=(jobs.blocks,),
        grid_names=("block",),
        num_threads=w + (2 if spec.is_noisy else 1),
        thread_name="warpgroup",
        kernel_name=f"attention_{spec.mode}",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=True,
            # Rows are reduced within a warp.
            reduction_scratch_bytes=0,
        ),
    )(query, key, value, factors, words)


def _kernel(jobs: Jobs, *refs: Any, **scratch: Any) -> None:
    q_ref, k_ref, v_ref, factors, words_ref, *outputs = refs
    factor_ref, dirty_ref = (None, None) if factors is None else factors
    spec, plan = jobs.spec, jobs.plan
    noisy = spec.is_noisy
    if noisy:
        scratch["bank"], scratch["out_smem"] = scratch.pop("bank_and_out")
    warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("block")
    turns = jobs.turns(block)

    def every_job(do: Callable[[jax.Array, _Job, Any], Any], state: Any) -> None:
        lax.fori_loop(
            0, turns, lambda turn, x: do(turn, jobs.job(turn, block, words_ref), x), state
        )

    @pl.when(warpgroup < plan.warpgroups)
    def _() -> None:
        plgpu.set_max_registers(COMPUTE_REGISTERS[plan.warpgroups, noisy], action="increase")
        every_job(
            functools.partial(_compute, spec, plan, outputs, scratch, warpgroup, dirty_ref),
            jnp.int32(0),
        )
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == plan.warpgroups)
    def _() -> None:
        plgpu.set_max_registers(24, action="decrease")
        sources = (q_ref, k_ref, v_ref, factor_ref)
        every_job(functools.partial(_load, plan, sources, scratch), jnp.int32(0))

    if not noisy:
        return

    @pl.when(warpgroup == plan.warpgroups + 1)
    def _() -> None:
        plgpu.set_max_registers(NOISE_REGISTERS[plan.warpgroups], action="decrease")
        every_job(
            functools.partial(_make_noise, spec, plan, words_ref, scratch),
            (jnp.int32(-1), jnp.int32(0)),
        )


def _load(
    plan: Plan, sources: Any, scratch: Any, turn: jax.Array, job: _Job, done: jax.Array
) -> jax.Array:
    """Fetches what a job needs, each tile into its slot when that is free.

    ``done`` tiles came before.
    """
    q_ref, k_ref, v_ref, factor_ref = sources
    pl.when(turn > 0)(lambda: plgpu.barrier_wait(scratch["q_free"]))
    for w in range(plan.warpgroups):
        rows = pl.ds(job.first_row + w * ROWS, ROWS)
        q_smem, q_bar = scratch["q_smem"].at[w], scratch["q_bar"].at[w]
        plgpu.copy_gmem_to_smem(q_ref.at[job.batch, rows, job.head], q_smem, q_bar)

    def tile(i: jax.Array, done: jax.Array) -> jax.Array:
        slot = _slot(plan, done)
        keys = pl.ds(i * plan.keys, plan.keys)

        def wait(barrier: Any) -> None:
            pl.when(done >= plan.stages)(lambda: plgpu.barrier_wait(barrier.at[slot]))

        wait(scratch["k_free"])
        k_bar, v_bar = scratch["k_bar"].at[slot], scratch["v_bar"].at[slot]
        source = k_ref.at[job.batch, keys, job.kv_head]
        plgpu.copy_gmem_to_smem(source, scratch["k_smem"].at[slot], k_bar)
        wait(scratch["v_free"])
        source = v_ref.at[job.batch, keys, job.kv_head]
        plgpu.copy_gmem_to_smem(source, scratch["v_smem"].at[slot], v_bar)
        if factor_ref is not None:
            source = factor_ref.at[job.batch, job.kv_head, keys]
            plgpu.copy_gmem_to_smem(source, scratch["factor_smem"].at[slot], v_bar)
        return done + 1

    return lax.fori_loop(job.low, job.high, tile, done)


def _slot(plan: Plan, tile: jax.Array) -> jax.Array:
    n = plan.stages
    return lax.rem(tile, jnp.int32(n)) if n & (n - 1) else tile & (n - 1)


def _make_noise(
    spec: AttentionSpec, plan: Plan, noise_ref: Any, scratch: Any, turn: jax.Array, job: _Job,
    state: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """The noise of one job.

    ``state``: the batch element whose keys are at hand, and the warp that makes the noise of the
    rows' sums of weights: another one in each job.
    """
    del turn
    last, warp = state
    if plan.sums_only:
        plgpu.barrier_wait(scratch["zero_bar"])
        plgpu.barrier_arrive(scratch["noise_bar"])
        return state
    keys = scratch["row_bank"].at[pl.ds(plan.key_words, 16)]
    pl.when(job.batch != last)(lambda: _derive_keys(noise_ref, job.batch, keys))
    noise = [keys[i].astype(jnp.uint32) for i in range(16)] + [
        noise_ref[job.batch, i] for i in range(8, 11)
    ]
    bank, row_bank = scratch["bank"], scratch["row_bank"]
    if spec.mode == "record":
        is_own = banks.warp() == warp
        # Made while the bank is not free yet.
        row_noise = functools.partial(_row_noise, spec, plan, noise, job)
        values = lax.cond(is_own, row_noise, lambda: ops.zeros(16))
    plgpu.barrier_wait(scratch["zero_bar"])
    if spec.mode == "record":
        first = _first_of_group(noise, job)
        places = {"rows": plan.rows, "spare": plan.key_words + 16}
        pl.when(is_own)(lambda: banks.add_row_noise(values, first, row_bank, **places))

    @pl.loop(0, plan.warpgroups * bank.shape[1] // 4)
    def _(part: jax.Array) -> None:
        banks.add_noise(*_tile_noise(spec, plan, noise, bank, part, job), bank)

    plgpu.barrier_arrive(scratch["noise_bar"])
    return job.batch, (warp + 1) & 3


def _derive_keys(noise_ref: Any, batch: jax.Array, keys: Any) -> None:
    """The children of a batch element's key; thread 0 derives the first, thread 1 the second."""
    assert common.DENOMINATOR == common.NUMERATOR + 1
    plgpu.commit_smem()  # all threads are done with the last keys

    @pl.when(banks.warp() == 0)
    def _() -> None:
        thread = plgpu.broadcasted_iota(jnp.int32, (128,), 0, layout=regs.THREADS)
        zero = jnp.uint32(0)
        counters = (zero, zero, zero, thread.astype(jnp.uint32) + jnp.uint32(common.NUMERATOR))
        parent = [noise_ref[batch, i] for i in range(8)]
        words = prng.random_block(parent, counters, unroll=False)
        banks.store_keys(words[:8], keys)

    plgpu.commit_smem()


def _tile_noise(
    spec: AttentionSpec, plan: Plan, noise: Any, bank: Any, part: jax.Array, job: _Job
) -> tuple[tuple[jax.Array, ...], jax.Array, tuple[int, ...]]:
    """The noise from one block of words a thread, as multiples of the plan's unit.

    A block is for one row and every eighth column of 128 (every fourth of 64). A warp has
    blocks for 8 rows; where there are eight of a row, it has those whose values one register
    of each of its threads' column groups will get: 32 banks of memory at a time.

    Returns:
        The values, the word of ``bank`` that the first is for, and how far from it the others'
        are (``mosaic_gpu_bank.py`` has the order of the words).
    """
    groups = bank.shape[1]
    thread = plgpu.broadcasted_iota(jnp.int32, (128,), 0, layout=regs.THREADS)
    lane = thread & 31
    of_warpgroup = min(groups // 4, 4)  # parts
    rest = lax.rem(part, jnp.int32(of_warpgroup * plan.warpgroups))
    own, rest = lax.div(rest, jnp.int32(of_warpgroup)), lax.rem(rest, jnp.int32(of_warpgroup))
    if groups == 8:
        wide = jnp.int32(0)
        block = lane & 3
        row = 32 * rest + 8 * (thread >> 5) + (lane >> 2)
        offsets = tuple(512 * (p // 2) + 2 * (p % 2) for p in range(16))
    else:
        wide = lax.div(part, jnp.int32(4 * plan.warpgroups))
        block = 2 * (lane & 3) + (rest & 1)
        row = 16 * (thread >> 5) + 8 * (rest >> 1) + (lane >> 2)
        offsets = tuple(512 * p for p in range(16))
    counter = (row + (own * ROWS + job.first_row)).astype(jnp.uint32) + noise[16]
    words = _noise_words(spec, noise[:8], noise, block + 8 * wide, counter, job, peel=groups <= 16)
    # Thread 32·(row / 16) + 4·(row mod 8) + (column mod 8) / 2 holds an element, in register
    # 2·(row / 8 mod 2) + column mod 2 of its column group.
    register = 2 * ((row >> 3) & 1) + (block & 1)
    word = 128 * register + 32 * (row >> 4) + 4 * (row & 7) + (block >> 1)
    word = word + 512 * (groups * own + 16 * wide)
    factor = spec.numerator_std / plan.unit
    return banks.normals(words, factor=factor, magic=_is_magic(spec, plan)), word, offsets


def _is_magic(spec: AttentionSpec, plan: Plan) -> bool:
    """Whether the noise brings a constant, which the bank then begins below zero by."""
    return not plan.sums_only and banks.is_small(spec.numerator_std / plan.unit)


def _row_noise(spec: AttentionSpec, plan: Plan, noise: Any, job: _Job) -> tuple[jax.Array, ...]:
    """The noise of sixteen rows' sums of weights, of the thread's group of rows.

    A lane has one group, lane 0 the one in which the job's first row is.
    """
    lane = plgpu.broadcasted_iota(jnp.int32, (128,), 0, layout=regs.THREADS) & 31
    first = (job.first_row.astype(jnp.uint32) + noise[16]) >> jnp.uint32(4)
    counter = lane.astype(jnp.uint32) + first
    words = _noise_words(spec, noise[8:16], noise, jnp.int32(0), counter, job)
    return banks.normals(words, factor=spec.denominator_std / plan.row_unit)


def _first_of_group(noise: Any, job: _Job) -> jax.Array:
    """The row of the job, 0 to -15, that is the first one of lane 0's group of sixteen."""
    first = job.first_row.astype(jnp.uint32) + noise[16]
    return -(first & jnp.uint32(15)).astype(jnp.int32)


def _noise_words(
    spec: AttentionSpec, key: Any, noise: Any, block: jax.Array, row: jax.Array, job: _Job,
    *, peel: bool = False,
) -> tuple[jax.Array, ...]:  # fmt: skip
    """A block of words of the job's head; ``peel`` where many are made, and registers are left."""
    counters = (
        block.astype(jnp.uint32),
        row,
        job.head.astype(jnp.uint32) + noise[17],
        noise[18],
    )
    return prng.random_block(key, counters, rounds=spec.rounds, unroll=False, peel=peel)


def _compute(
    spec: AttentionSpec, plan: Plan, outputs: Any, scratch: Any, warpgroup: jax.Array,
    dirty_ref: Any, turn: jax.Array, job: _Job, done: jax.Array,
) -> jax.Array:  # fmt: skip
    """One job of a compute warpgroup; ``done`` tiles came before."""
    length, low, high = job.length, job.low, job.high
    first_row = job.first_row + warpgroup * ROWS
    dirty = jnp.int32(0) if dirty_ref is None else dirty_ref[job.batch, job.kv_head]
    q_smem = scratch["q_smem"].at[warpgroup]
    k_smem, v_smem = scratch["k_smem"], scratch["v_smem"]
    k_bar, v_bar = scratch["k_bar"], scratch["v_bar"]
    depth, dtype = q_smem.shape[1], q_smem.dtype
    is_record = spec.mode == "record"

    def slot_of(tile: jax.Array) -> jax.Array:
        return _slot(plan, done + tile - low)

    weigh = functools.partial(_weigh, spec, plan, first_row, length)

    def await_values(tile: jax.Array) -> None:
        plgpu.barrier_wait(v_bar.at[slot_of(tile)])

    def packed(weights: jax.Array, tile: jax.Array, careful: bool) -> jax.Array:
        """Short weights, times the factors of the tile's values, which are there."""
        short = weights if weights.dtype == dtype else ops.shortened(weights, dtype)
        if not spec.is_noisy:
            return short
        slot = slot_of(tile)
        if careful:
            pl.when(dirty > 0)(lambda: ops.zero_non_finite(v_smem, slot, dtype=dtype))
        factors = plgpu.load(scratch["factor_smem"].at[slot], layout=regs.PER_COLUMN)
        return ops.times(short, factors)

    # Waiting for the next values ends a basic block. In record mode it comes before the wait for
    # this product, and what is before it stays there: ptxas would put most exponentials behind
    # the product, when the matrix units have nothing to do. (With a row maximum that is no gain;
    # wide heads lack the registers.)
    values_first = is_record and plan.stages > 1 and depth <= 128

    def step(tile: jax.Array, carry: Any, acc: Any, careful: bool) -> Any:
        operand, rows = carry
        slot, next_slot = slot_of(tile), slot_of(tile + 1)
        plgpu.barrier_wait(k_bar.at[next_slot])

        def products(logits_acc: Any) -> Any:
            plgpu.wgmma(logits_acc, q_smem, k_smem.at[next_slot].T)
            plgpu.wgmma(acc, operand, v_smem.at[slot])
            logits = plgpu.wgmma_accumulator_load(logits_acc, wait_n=1)
            plgpu.barrier_arrive(scratch["k_free"].at[next_slot])
            weights, new_rows, shrink = weigh(logits, tile + 1, rows, careful)
            if values_first:
                weights = ops.shortened(weights, dtype)
                await_values(tile + 1)
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(scratch["v_free"].at[slot])
            if shrink is not None:
                # Reading and writing the accumulator wait for all warps, which may differ here.
                acc[...] = lax.cond(
                    ops.any_other_than_one(shrink),
                    lambda sums: sums * lax.broadcast_in_dim(shrink, (ROWS, depth), [0]),
                    lambda sums: sums,
                    acc[...],
                )
            if not values_first:
                await_values(tile + 1)
            # Not earlier: the product still reads the registers of the last weights.
            return packed(weights, tile + 1, careful), new_rows

        return pl.run_scoped(products, plgpu.WGMMAAccumulatorRef((ROWS, plan.keys), jnp.float32))

    def row(value: float) -> jax.Array:
        return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), regs.PER_ROW)

    # The sum of weights; and the maximum of the logits, where there is one.
    rows = (row(0.0),) if is_record else (row(0.0), row(-jnp.inf))

    # What the last job left to be written lies where this one's sums and statistics will.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    frees_queries = _frees_queries(outputs, scratch)
    if not frees_queries:
        pl.when(turn > 0)(lambda: plgpu.barrier_arrive(scratch["q_free"]))
    if spec.is_noisy:
        magic = _is_magic(spec, plan)
        banks.bank_zero(scratch["bank"], scratch["row_bank"], warpgroup, magic=magic)
        plgpu.barrier_arrive(scratch["zero_bar"])
    plgpu.barrier_wait(scratch["q_bar"].at[warpgroup])
    first_slot = slot_of(low)
    plgpu.barrier_wait(k_bar.at[first_slot])

    def first_product(logits_acc: Any) -> jax.Array:
        plgpu.wgmma(logits_acc, q_smem, k_smem.at[first_slot].T)
        return logits_acc[...]

    logits = pl.run_scoped(first_product, plgpu.WGMMAAccumulatorRef((ROWS, plan.keys), jnp.float32))
    plgpu.barrier_arrive(scratch["k_free"].at[first_slot])
    weights, rows, _ = weigh(logits, low, rows, True)
    await_values(low)
    carry = (packed(weights, low, True), rows)

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

    accumulator = plgpu.WGMMAAccumulatorRef((ROWS, depth), jnp.float32)
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
            banks.bank_add(sums, scratch["bank"], warpgroup, unit=plan.unit)
            banks.row_bank_add(total, scratch["row_bank"], warpgroup, unit=plan.row_unit)
            return packed, (row(0.0),)

        carry = lax.fori_loop(first, first + chunks, one_chunk, carry)

    def last_product(acc: Any) -> Any:
        # With chunks, the last tile is one by itself.
        packed, rows = carry if plan.tiles > per_chunk else steps(low, high - 1, carry, acc)
        if frees_queries:
            plgpu.barrier_arrive(scratch["q_free"])
        plgpu.wgmma(acc, packed, v_smem.at[slot_of(high - 1)])
        return acc[...], rows

    sums, rows = pl.run_scoped(last_product, accumulator)
    plgpu.barrier_arrive(scratch["v_free"].at[slot_of(high - 1)])
    if spec.is_noisy:
        plgpu.barrier_wait(scratch["noise_bar"])
    _release(spec, plan, outputs, scratch, warpgroup, job, sums, rows, chunks)
    return done + high - low


def _frees_queries(outputs: Any, scratch: Any) -> bool:
    """Whether the next queries may come before the outputs have left: these lie elsewhere."""
    return "out_smem" in scratch and outputs[2] is None


def _release(
    spec: AttentionSpec, plan: Plan, outputs: Any, scratch: Any, warpgroup: jax.Array, job: _Job,
    sums: jax.Array, rows: Any, chunks: jax.Array,
) -> None:  # fmt: skip
    """Noise, grid, division; starts the copies to device memory, and does not wait for them."""
    out_ref, stat_ref, clean_ref = outputs
    (_, depth), dtype = sums.shape, out_ref.dtype
    first_row = job.first_row + warpgroup * ROWS
    row_bank = scratch["row_bank"].at[pl.ds(warpgroup * ROWS, ROWS)]

    def per_row(x: jax.Array) -> jax.Array:
        return lax.broadcast_in_dim(x, (ROWS, depth), [0])

    bank: dict[str, Any] = {
        "bank": scratch.get("bank"),
        "warpgroup": warpgroup,
        "unit": plan.unit,
        "spacing": spec.spacing(spec.numerator_std),
    }
    q_smem = scratch["q_smem"].at[warpgroup]
    staged: list[tuple[Any, Any]] = []
    if spec.mode == "record":
        banks.row_bank_add(rows[0], scratch["row_bank"], warpgroup, unit=plan.row_unit)
        if plan.sums_only:
            # The rows' sums lie in their bank.
            out = banks.bank_total(sums, chunks=chunks, as_integers=True, **bank)
        else:
            noisy = plgpu.load(row_bank, layout=regs.PER_ROW)
            stat = _denominator(spec, noisy.astype(jnp.float32) * plan.row_unit)
            out = banks.bank_total(sums, chunks=chunks, **bank) * per_row(1.0 / stat)
    else:
        total, top = ops.row_sum(rows[0]), rows[1]
        seen = total > 0.0
        stat = jnp.where(seen, top * (1.0 / _LOG2E) + jnp.log(total), fused.NOTHING_SEEN)
        out = sums * per_row(jnp.where(seen, 1.0 / total, 0.0))
        if clean_ref is not None:
            # At once: two tiles do not fit into the registers of a wide head.
            q_smem[...] = out.astype(dtype)
            staged.append((q_smem, clean_ref))
        if spec.is_noisy:
            out = banks.bank_noise(out, **bank)
    if not plan.sums_only:
        row_bank[...] = lax.bitcast_convert_type(stat, jnp.int32)
    # The output goes where the bank was: all threads must have read their part of it.
    plgpu.commit_smem()
    smem = scratch["out_smem"].at[warpgroup, 0] if "out_smem" in scratch else q_smem
    smem[...] = out.astype(dtype)
    staged.append((smem, out_ref))
    plgpu.commit_smem()
    for smem, ref in staged:
        plgpu.copy_smem_to_gmem(smem, ref.at[job.batch, pl.ds(first_row, ROWS), job.head])
    plgpu.copy_smem_to_gmem(row_bank, stat_ref.at[job.batch, job.head, pl.ds(first_row, ROWS)])


def _weigh(
    spec: AttentionSpec, plan: Plan, first_row: jax.Array, length: jax.Array,
    logits: jax.Array, tile: jax.Array, rows: Any, careful: bool,
) -> tuple[jax.Array, Any, jax.Array | None]:  # fmt: skip
    """Weights of a tile, the rows' state after it, and what to multiply the sums with."""
    first_column = tile * plan.keys
    if spec.mode == "sequence":
        logits = ops.finite(logits)
    if careful:
        logits = _hide(spec, logits, first_row, first_column, length)
    scale = spec.scale * _LOG2E
    total = rows[0]
    if spec.mode == "record":
        bound = plgpu.layout_cast(
            jnp.full((ROWS,), -spec.logit_bound * _LOG2E, jnp.float32), regs.PER_ROW
        )
        weights, total = ops.exp2_and_sum(
            logits, bound, total, scale=scale, clamp=spec.bound_logits
        )
        return weights, (total,), None
    state = rows[1]
    seen = jnp.max(logits, axis=1) * scale
    # What was the maximum stays the offset until a row is 2⁸ above it: sums are seldom rescaled.
    top = jnp.where(seen > state + _BEHIND, seen, state)
    # A row that has seen nothing yet keeps −inf as its maximum and zero as its sums.
    offset = jnp.where(top == -jnp.inf, 0.0, -top)
    shrink = jnp.exp2(state + offset)
    weights, total = ops.exp2_and_sum(logits, offset, total * shrink, scale=scale, clamp=False)
    return weights, (total, top), shrink


def _first_partial(
    spec: AttentionSpec, plan: Plan, first_row: jax.Array, length: jax.Array, low: jax.Array
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
