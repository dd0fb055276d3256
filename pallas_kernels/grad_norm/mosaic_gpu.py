"""The norms on Hopper GPUs (Pallas Mosaic GPU): one kernel a form, TMA and WGMMA.

One block of threads for each multiprocessor does one job after the other; a job is one
tile of one example. Two compute warpgroups have half of the tile's rows each; a third one
fetches through a ring of slots, and is in the next job while this one's sums are taken.

A tile of XᵀG is 128 × 256 numbers, in registers. Of the Gram matrices it is 128 × 128 of
XXᵀ and then of GGᵀ, both in registers until they are multiplied. A tile on the diagonal
needs its rows once: the fetching warpgroup brings them in two halves instead of both sides.
What lies beyond an array comes as zeros, whose products are zero.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32

from pallas_kernels import devices
from pallas_kernels.grad_norm import common
from pallas_kernels.manual import result

_HALF = 64  # rows of a warpgroup: the M of one WGMMA instruction
_ROWS = 2 * _HALF  # of a tile
_STEP = 64  # of the summed axis: 128 bytes, the widest swizzle
_LAYOUT: Any = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # type: ignore[abstract]
# Registers of a thread: 2 · 240 + 24 = 504, three times the 168 that it starts with.
REGISTERS = (240, 24)


# Of a launch: the kernel names each one's arrays.
MOST_LEAVES = 8


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How many slots and blocks of threads; the defaults fill an H100's shared memory.

    Attributes:
        gram_stages: slots of 32 KB, at least 2.
        direct_stages: slots of 48 KB, at least 2.
        thread_blocks: how many; None is one for each multiprocessor.
    """

    gram_stages: int = 6
    direct_stages: int = 4
    thread_blocks: int | None = None


def unsupported(x: Any, g: Any, form: common.Form) -> str | None:
    """Why these kernels cannot take a call, whatever the device; None if they can."""
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"{x.dtype} operands; the matrix units take bfloat16 and float16"
    jobs = x.shape[0] * _tiles(x, g, form)
    if MOST_LEAVES * jobs * max(x.shape[1], x.shape[2] + g.shape[2]) >= 2**31:
        return f"{jobs} tiles; their steps are counted in 31 bits"
    return None


def _tiles(x: Any, g: Any, form: common.Form) -> int:
    """Tiles of an example."""
    if form == "gram":
        across: int = pl.cdiv(x.shape[1], _ROWS)
        return across * (across + 1) // 2
    return pl.cdiv(x.shape[2], _ROWS) * pl.cdiv(g.shape[2], 2 * _ROWS)


def grad_norm_squared(
    x: Float[Array, "B T P"],
    g: Float[Array, "B T Q"],
    form: common.Form,
    *,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> Float32[Array, "B"]:
    """See :func:`pallas_kernels.grad_norm.grad_norm_squared`, whose checks have passed."""
    return _run((x, g), form, False, blocks, interpret)[0].squared


def gram_with_rows(
    *operands: Float[Array, "B T _"], blocks: Blocks | None = None, interpret: bool = False
) -> tuple[common.Norms, ...]:
    """The Gram form, and what the matrices' diagonals tell of the rows, in one pass.

    Several leaves can share a launch: small ones would leave most multiprocessors idle while
    the last tiles are made.

    Args:
        operands: x and g of one leaf, then of the next: one B, T and dtype for all.
        blocks: sizes.
        interpret: as for :func:`pallas_kernels.grad_norm.grad_norm_squared`.

    Returns:
        What belongs to each leaf.
    """
    return tuple(_run(operands, "gram", True, blocks, interpret))


def _run(
    operands: Sequence[jax.Array],
    form: common.Form,
    rows: bool,
    blocks: Blocks | None,
    interpret: bool,
) -> list[common.Norms]:
    """The squared norms; those of the operands' rows where ``rows`` says so, else zeros.

    Where T is no multiple of 8, or a width none of 64, the sizes of the pieces in which the copy
    engine lays a tile out, a padded copy is made.
    """
    blocks = blocks or Blocks()
    padded = [common.pad(common.pad(y, 1, 8), 2, 64) for y in operands]
    # Leaves with the longest jobs first: what is left at the end is then short.
    pairs = list(zip(padded[::2], padded[1::2], strict=True))
    order = sorted(range(len(pairs)), key=lambda n: -sum(y.shape[2] for y in pairs[n]))
    pairs = [pairs[n] for n in order]
    (x, g), *_ = pairs
    tiles, outputs = _tiles(x, g, form), 3 if rows else 1
    jobs = len(pairs) * x.shape[0] * tiles
    if form == "gram":
        body: Any = functools.partial(_gram_kernel, rows, x.shape[0])
        stages, across = blocks.gram_stages, pl.cdiv(x.shape[1], _ROWS)
        slots: Any = plgpu.SMEM((stages, 2, _ROWS, _STEP), x.dtype, transforms=_LAYOUT)
    else:
        body, stages, across = _direct_kernel, blocks.direct_stages, pl.cdiv(g.shape[2], 2 * _ROWS)
        slots = [
            plgpu.SMEM((stages, _STEP, n), x.dtype, transforms=_LAYOUT) for n in (_ROWS, 2 * _ROWS)
        ]
    grid = min(jobs, blocks.thread_blocks or devices.multiprocessors())
    parts = plgpu.kernel(
        functools.partial(body, _Jobs(jobs, grid, tiles, across, stages)),
        out_type=result((outputs, jobs, _ROWS), jnp.float32),
        scratch_types={
            "slots": slots,
            "line": plgpu.SMEM((outputs, 2, _HALF), jnp.float32),
            "full": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            "free": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        },
        grid=(grid,),
        grid_names=("block",),
        num_threads=3,
        thread_name="wg",
        kernel_name=f"grad_norm_{form}",
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )(*(y for pair in pairs for y in pair))
    parts = parts.reshape(outputs, len(pairs) * x.shape[0], -1)
    squared = common.total(parts[0])
    squared = jnp.maximum(squared, 0.0) if form == "gram" else squared
    if rows:
        norms = common.norms_with_rows(squared, *parts[1:])
    else:
        norms = common.Norms(squared, *[jnp.zeros_like(squared)] * 3)
    apart = zip(*(y.reshape(len(pairs), -1) for y in norms), strict=True)
    back = dict(zip(order, apart, strict=True))
    return [common.Norms(*back[n]) for n in range(len(pairs))]


@dataclasses.dataclass(frozen=True)
class _Jobs:
    """How the jobs are dealt out, and how the ring runs through them.

    Attributes:
        count: jobs of all blocks; job n belongs to block n mod ``blocks``.
        blocks: how many there are.
        tiles: jobs of an example.
        across: tiles of a row of the matrix.
        stages: slots of the ring.
    """

    count: int
    blocks: int
    tiles: int
    across: int
    stages: int

    def walk(self, do: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]) -> None:
        """``do(job, example, tile, step)`` for each job of this block.

        Examples are counted through all leaves.
        ``step`` counts the block's steps before the job; ``do`` returns the count after it.
        """
        block = lax.axis_index("block")
        mine = lax.div(self.count - 1 - block, jnp.int32(self.blocks)) + 1

        def one(n: jax.Array, step: jax.Array) -> jax.Array:
            job = block + n * self.blocks
            tiles = jnp.int32(self.tiles)
            return do(job, lax.div(job, tiles), lax.rem(job, tiles), step)

        lax.fori_loop(0, mine, one, jnp.int32(0))

    def slot(self, step: jax.Array) -> jax.Array:
        return lax.rem(step, jnp.int32(self.stages))

    def fetch(self, free: Any, steps: int, first: jax.Array, load: Any) -> jax.Array:
        """``load(i, slot)`` for ``steps`` steps, as slots get free."""

        def one(i: jax.Array, _: None) -> None:
            slot = self.slot(first + i)

            # A slot is handed back one step late, so that products still run on it meanwhile;
            # the very first step hands back the last slot, which was never filled.
            @pl.when(first + i >= self.stages - 1)
            def wait() -> None:
                plgpu.barrier_wait(free.at[slot])

            load(i, slot)

        lax.fori_loop(0, steps, one, None)
        return first + steps

    def products(
        self, full: Any, free: Any, steps: int, first: jax.Array, multiply: Any
    ) -> jax.Array:
        """``multiply(slot)``, which starts a matrix product, for ``steps`` steps."""

        def one(i: jax.Array, _: None) -> None:
            slot = self.slot(first + i)
            plgpu.barrier_wait(full.at[slot])
            multiply(slot)
            plgpu.wgmma_wait(1)  # the product before this one
            plgpu.barrier_arrive(free.at[self.slot(first + i + (self.stages - 1))])

        lax.fori_loop(0, steps, one, None)
        return first + steps


def _write(
    parts: Sequence[jax.Array], line: Any, out_ref: Any, job: jax.Array, wg: jax.Array
) -> None:
    """The sums of each half tile's rows go to the job's places."""
    sums = [jnp.sum(part, axis=1) for part in parts]
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the job before this one
    for n, x in enumerate(sums):
        line[n, wg] = x
    plgpu.commit_smem()
    for n in range(len(sums)):
        to = out_ref.at[n, job, pl.ds(wg * _HALF, _HALF)]
        plgpu.copy_smem_to_gmem(line.at[n, wg], to)


def _direct_kernel(
    jobs: _Jobs,
    x_ref: Any,
    g_ref: Any,
    out_ref: Any,
    *,
    slots: Any,
    line: Any,
    full: Any,
    free: Any,
) -> None:
    x_smem, g_smem = slots
    steps = pl.cdiv(x_ref.shape[1], _STEP)
    wg = lax.axis_index("wg")

    @pl.when(wg < 2)
    def _compute() -> None:
        plgpu.set_max_registers(REGISTERS[0], action="increase")

        def do(job: jax.Array, example: Any, tile: Any, first: jax.Array) -> jax.Array:
            def accumulate(weight: Any) -> jax.Array:
                def multiply(slot: jax.Array) -> None:
                    x = x_smem.at[slot, :, pl.ds(wg * _HALF, _HALF)]
                    plgpu.wgmma(weight, x.transpose((1, 0)), g_smem.at[slot])

                jobs.products(full, free, steps, first, multiply)
                return weight[...]

            shape = (_HALF, 2 * _ROWS)
            weight = pl.run_scoped(accumulate, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))
            _write([weight * weight], line, out_ref, job, wg)
            return first + steps

        jobs.walk(do)
        plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == 2)
    def _fetch() -> None:
        plgpu.set_max_registers(REGISTERS[1], action="decrease")

        def do(job: Any, example: jax.Array, tile: jax.Array, first: jax.Array) -> jax.Array:
            row = lax.div(tile, jnp.int32(jobs.across)) * _ROWS
            column = lax.rem(tile, jnp.int32(jobs.across)) * (2 * _ROWS)

            def load(i: jax.Array, slot: jax.Array) -> None:
                t = pl.ds(i * _STEP, _STEP)
                x = x_ref.at[example, t, pl.ds(row, _ROWS)]
                g = g_ref.at[example, t, pl.ds(column, 2 * _ROWS)]
                plgpu.copy_gmem_to_smem(x, x_smem.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(g, g_smem.at[slot], full.at[slot])

            return jobs.fetch(free, steps, first, load)

        jobs.walk(do)


def _gram_kernel(
    rows: bool, batch: int, jobs: _Jobs, *refs: Any, slots: Any, line: Any, full: Any, free: Any
) -> None:
    """``refs`` are x and g of each leaf, then the output; leaf n has examples n·batch and on."""
    *operands, out_ref = refs
    leaves = list(zip(operands[::2], operands[1::2], strict=True))
    wg = lax.axis_index("wg")

    def steps_of(example: jax.Array) -> tuple[Any, Any]:
        """How many steps its leaf takes for each of its two matrices."""
        counts = [[pl.cdiv(ref.shape[2], _STEP) for ref in leaf] for leaf in leaves]
        first, *others = counts
        found: Any = tuple(first)
        for n, more in enumerate(others, 1):
            found = tuple(
                jnp.where(example >= n * batch, jnp.int32(b), a)
                for a, b in zip(found, more, strict=True)
            )
        return found

    @pl.when(wg < 2)
    def _compute() -> None:
        plgpu.set_max_registers(REGISTERS[0], action="increase")

        def do(job: jax.Array, example: Any, tile: jax.Array, first: jax.Array) -> jax.Array:
            i, j = common.pair(tile, jobs.across)
            side = jnp.where(i == j, 0, 1)
            steps = steps_of(example)

            def multiply(gram: Any, slot: jax.Array) -> None:
                mine = slots.at[slot, 0, pl.ds(wg * _HALF, _HALF)]
                plgpu.wgmma(gram, mine, slots.at[slot, side].transpose((1, 0)))

            def accumulate(x_gram: Any, g_gram: Any) -> tuple[jax.Array, jax.Array]:
                middle = jobs.products(
                    full, free, steps[0], first, functools.partial(multiply, x_gram)
                )
                jobs.products(full, free, steps[1], middle, functools.partial(multiply, g_gram))
                return x_gram[...], g_gram[...]

            gram = plgpu.WGMMAAccumulatorRef((_HALF, _ROWS), jnp.float32)
            grams = pl.run_scoped(accumulate, gram, gram)
            parts = [grams[0] * grams[1] * jnp.where(i == j, 1.0, 2.0)]
            if rows:
                row, column = (
                    plgpu.broadcasted_iota(jnp.int32, (_HALF, _ROWS), n, layout=plgpu.Layout.WGMMA)
                    for n in (0, 1)
                )
                # On a diagonal tile; elsewhere no column has this number.
                own = row + jnp.where(i == j, wg * _HALF, _ROWS) == column
                parts += [jnp.where(own, x, 0.0) for x in grams]
            _write(parts, line, out_ref, job, wg)
            return first + sum(steps)

        jobs.walk(do)
        plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == 2)
    def _fetch() -> None:
        plgpu.set_max_registers(REGISTERS[1], action="decrease")

        def do(job: Any, example: jax.Array, tile: jax.Array, first: jax.Array) -> jax.Array:
            i, j = common.pair(tile, jobs.across)

            def load(ref: Any, example: jax.Array, k: jax.Array, slot: jax.Array) -> None:
                step, bar = pl.ds(k * _STEP, _STEP), full.at[slot]

                @pl.when(i == j)
                def _() -> None:
                    for half in (0, 1):
                        rows = pl.ds(i * _ROWS + half * _HALF, _HALF)
                        to = slots.at[slot, 0, pl.ds(half * _HALF, _HALF)]
                        plgpu.copy_gmem_to_smem(ref.at[example, rows, step], to, bar)

                @pl.when(i != j)
                def _() -> None:
                    for side, n in enumerate((i, j)):
                        rows = pl.ds(n * _ROWS, _ROWS)
                        to = slots.at[slot, side]
                        plgpu.copy_gmem_to_smem(ref.at[example, rows, step], to, bar)

            steps = steps_of(example)
            for n, leaf in enumerate(leaves):

                @pl.when((example >= n * batch) & (example < (n + 1) * batch))
                def _(n: int = n, leaf: Any = leaf) -> None:
                    at = first
                    for ref in leaf:
                        count = pl.cdiv(ref.shape[2], _STEP)
                        fetch_one = functools.partial(load, ref, example - n * batch)
                        at = jobs.fetch(free, count, at, fetch_one)

            return first + sum(steps)

        jobs.walk(do)
