"""What the Hopper kernels do with a tile in registers, in PTX where Pallas has no word for it.

``mosaic_gpu_registers.py`` says which thread holds what. Each function says what it costs.

Sums over a row are left spread over the four threads that hold the row until
:func:`row_sum` adds them: an array with the row layout then holds a different part in
each of the four, which no other operation may look at.
"""

# ``mlir`` and the fragmented arrays have no types worth stating.
# mypy: allow-untyped-defs, allow-untyped-calls
# mypy: disable-error-code="no-any-return,arg-type,call-arg,abstract"

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf, vector

from pallas_kernels.attention import mosaic_gpu_registers as regs
from pallas_kernels.attention.mosaic_gpu_registers import (
    PER_COLUMN,
    PER_ROW,
    SWIZZLED,
    THREADS,
    TILE,
)

_ONE = "0f3F800000"


def hide(
    logits: jax.Array,
    last: jax.Array,
    below: jax.Array | None = None,
    above: jax.Array | None = None,
) -> jax.Array:
    """−inf in the columns that row r does not see: it sees above + r <= c <= below + r.

    Columns are counted from the tile's first one. A comparison with a constant and a
    selection for an element: masks made of arrays of indices cost twice that, and their
    registers live on through the loops.

    Args:
        logits: float32 [64, n], ``TILE``.
        last: int32, the last column that any row sees.
        below: int32 or None for no such limit.
        above: int32 or None.
    """
    limits = [x for x in (last, below, above) if x is not None]

    @plgpu.inline_mgpu(
        arg_types=(TILE, *(plgpu.Layout.WG_SPLAT,) * len(limits)),
        return_type=plgpu.ShapeDtypeStruct(logits.shape, jnp.float32, TILE),
    )
    def run(_, x, *limits):
        f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)
        given = iter(limit.registers[()] for limit in limits)
        lane = arith.andi(regs.thread(), regs.constant(i32, 3))
        own = arith.muli(lane, regs.constant(i32, 2))
        row = regs.thread_row()
        rows = [row, arith.addi(row, regs.constant(i32, 8))]
        lasts, firsts = [next(given)] * 2, None
        if below is not None:
            limit = next(given)
            lasts = [arith.minsi(v, arith.addi(limit, r)) for v, r in zip(lasts, rows, strict=True)]
        if above is not None:
            limit = next(given)
            firsts = [arith.subi(arith.addi(limit, r), own) for r in rows]
        lasts = [arith.subi(v, own) for v in lasts]
        hidden = regs.constant(f32, -np.inf)
        held = np.empty(x.registers.shape, dtype=object)
        for index, half, group in regs.walk(x):
            values = []
            for e in range(2):
                value = vector.extract(x.registers[index], [], [e])
                column = regs.constant(i32, 8 * group + e)
                seen = arith.cmpi(arith.CmpIPredicate.sge, lasts[half], column)
                value = arith.select(seen, value, hidden)
                if firsts is not None:
                    seen = arith.cmpi(arith.CmpIPredicate.sle, firsts[half], column)
                    value = arith.select(seen, value, hidden)
                values.append(value)
            held[index] = vector.from_elements(ir.VectorType.get((2,), f32), values)
        return regs.like(x, held)

    return run(logits, *limits)


def exp2_and_sum(
    logits: jax.Array, offset: jax.Array, total: jax.Array, *, scale: float, clamp: bool
) -> tuple[jax.Array, jax.Array]:
    """Weights 2^(scale·x + offset) and the thread's part of their row sums.

    Clamped to [0, 1] by the saturating multiplication, which also turns NaN into 0.
    Per element: FMA, EX2, MUL if clamped, ADD.

    Args:
        logits: float32 [64, n], ``TILE``.
        offset: float32 [64], ``PER_ROW``.
        total: float32 [64], the parts so far.
        scale: factor on the logits.
        clamp: whether weights above 1 are cut.
    """
    exponential = f"ex2.approx.ftz.f32 x, x; mul.ftz.sat.f32 $0, x, {_ONE};"
    if not clamp:
        exponential = "ex2.approx.ftz.f32 $0, x;"
    asm = "{ .reg .f32 x; fma.rn.ftz.f32 x, $1, $2, $3; " + exponential + " }"

    @plgpu.inline_mgpu(
        arg_types=(TILE, PER_ROW, PER_ROW),
        return_type=(
            plgpu.ShapeDtypeStruct(logits.shape, jnp.float32, TILE),
            plgpu.ShapeDtypeStruct(total.shape, jnp.float32, PER_ROW),
        ),
    )
    def run(_, x, offset, total):
        f32 = ir.F32Type.get()
        factor = regs.constant(f32, scale)
        offsets, parts = regs.row_values(offset), regs.row_values(total)
        # Two sums a row: an addition waits for the one before it.
        sums = [[part, regs.constant(f32, 0.0)] for part in parts]
        weights = np.empty(x.registers.shape, dtype=object)
        for index, half, group in regs.walk(x):
            pair = x.registers[index]
            values = [
                llvm.inline_asm(
                    f32,
                    [vector.extract(pair, [], [e]), factor, offsets[half]],
                    asm,
                    "=f,f,f,f",
                    has_side_effects=False,
                )
                for e in range(2)
            ]
            sums[half][group % 2] = arith.addf(sums[half][group % 2], arith.addf(*values))
            weights[index] = vector.from_elements(ir.VectorType.get((2,), f32), values)
        return regs.like(x, weights), regs.with_row_values(total, [arith.addf(*s) for s in sums])

    return run(logits, offset, total)


def finite(logits: jax.Array) -> jax.Array:
    """``tile.sequence_logits`` of a tile (``TILE``) in two instructions an element."""
    asm = "{ .reg .f32 x; max.f32 x, $1, $2; min.f32 $0, x, $3; }"  # of NaN and y: y

    @plgpu.inline_mgpu(
        arg_types=(TILE,), return_type=plgpu.ShapeDtypeStruct(logits.shape, jnp.float32, TILE)
    )
    def run(_, x):
        f32 = ir.F32Type.get()
        limits = [regs.constant(f32, -1e30), regs.constant(f32, 1e30)]
        return _map(x, lambda value: llvm.inline_asm(f32, [value, *limits], asm, "=f,f,f,f"))

    return run(logits)


def fma(x: jax.Array, factor: jax.Array | float, addend: jax.Array) -> jax.Array:
    """``x·factor + addend`` of float32 tiles (``TILE``), one instruction an element.

    A multiplication and an addition that are written as such stay two.
    """
    arrays = [x, addend] + ([] if isinstance(factor, float) else [factor])

    @plgpu.inline_mgpu(
        arg_types=(TILE,) * len(arrays),
        return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.float32, TILE),
    )
    def run(_, x, addend, *factors):
        f32 = ir.F32Type.get()
        asm = "fma.rn.ftz.f32 $0, $1, $2, $3;"

        def one(value, added, by=None):
            by = regs.constant(f32, factor) if by is None else by
            return llvm.inline_asm(f32, [value, by, added], asm, "=f,f,f,f")

        return _map(x, one, addend, *factors)

    return run(*arrays)


def _map(x, function, *others):
    """``function`` of every element of tiles, as a tile."""
    held = np.empty(x.registers.shape, dtype=object)
    for index, _half, _group in regs.walk(x):
        values = [
            function(*(vector.extract(y.registers[index], [], [e]) for y in (x, *others)))
            for e in range(2)
        ]
        held[index] = vector.from_elements(ir.VectorType.get((2,), ir.F32Type.get()), values)
    return regs.like(x, held)


def any_other_than_one(row: jax.Array) -> jax.Array:
    """Whether one of the warp's rows has another value than 1. Warps may differ.

    Args:
        row: float32 [64], ``PER_ROW``.
    """

    @plgpu.inline_mgpu(
        arg_types=(PER_ROW,),
        return_type=plgpu.ShapeDtypeStruct((), jnp.int32, plgpu.Layout.WG_SPLAT),
    )
    def run(_, row):
        i32 = ir.IntegerType.get_signless(32)
        asm = (
            "{ .reg .pred p; setp.ne.f32 p, $1, 0f3F800000; setp.ne.or.f32 p, $2, 0f3F800000, p;"
            " vote.sync.any.pred p, p, 0xffffffff; selp.b32 $0, 1, 0, p; }"
        )
        found = llvm.inline_asm(i32, regs.row_values(row), asm, "=r,f,f", has_side_effects=True)
        return mgpu.FragmentedArray.splat(found, (), is_signed=True)

    return run(row) != 0


def zeros(count: int) -> tuple[jax.Array, ...]:
    """``count`` zeros a thread: int32 [128], ``THREADS``."""
    return (plgpu.layout_cast(jnp.zeros((128,), jnp.int32), THREADS),) * count


def shortened(weights: jax.Array, dtype: Any) -> jax.Array:
    """A float32 tile (``TILE``) in bfloat16 or float16: one conversion for two elements."""
    name = "bf16" if dtype == jnp.bfloat16 else "f16"

    @plgpu.inline_mgpu(
        arg_types=(TILE,), return_type=plgpu.ShapeDtypeStruct(weights.shape, dtype, TILE)
    )
    def run(_, w):
        i32 = ir.IntegerType.get_signless(32)
        two = ir.VectorType.get((2,), mgpu.utils.dtype_to_ir_type(dtype))
        asm = f"cvt.rn.{name}x2.f32 $0, $2, $1;"
        short = np.empty(w.registers.shape, dtype=object)
        for index, _half, _group in regs.walk(w):
            values = [vector.extract(w.registers[index], [], [e]) for e in range(2)]
            bits = llvm.inline_asm(i32, values, asm, "=r,f,f", has_side_effects=False)
            short[index] = mgpu.utils.bitcast(bits, two)
        return regs.like(w, short)

    return run(weights)


def times(short: jax.Array, factors: jax.Array) -> jax.Array:
    """A tile times a factor a column: one multiplication for two elements.

    Record mode's weights are at most 1, so no product is above its factor: the rounding is
    monotone and a factor is its own rounding. Sequence mode's may be up to 2⁸; its bound
    counts on the relative error of the two roundings alone.

    Args:
        short: bfloat16 or float16 [64, n], ``TILE``.
        factors: [n] in the same dtype, ``PER_COLUMN``.
    """
    name = "bf16" if short.dtype == jnp.bfloat16 else "f16"

    @plgpu.inline_mgpu(
        arg_types=(TILE, PER_COLUMN),
        return_type=plgpu.ShapeDtypeStruct(short.shape, short.dtype, TILE),
    )
    def run(_, x, factors):
        i32 = ir.IntegerType.get_signless(32)
        two = ir.VectorType.get((2,), mgpu.utils.dtype_to_ir_type(short.dtype))
        asm = f"mul.rn.{name}x2 $0, $1, $2;"
        held = np.empty(x.registers.shape, dtype=object)
        for index, _half, group in regs.walk(x):
            pair = [x.registers[index], factors.registers.flat[group]]
            operands = [mgpu.utils.bitcast(y, i32) for y in pair]
            bits = llvm.inline_asm(i32, operands, asm, "=r,r,r", has_side_effects=False)
            held[index] = mgpu.utils.bitcast(bits, two)
        return regs.like(x, held)

    return run(short, factors)


def round_towards_zero(row: jax.Array, dtype: Any) -> jax.Array:
    """float32 [64], ``PER_ROW``, in a short format and never longer than it was."""
    name = "bf16" if dtype == jnp.bfloat16 else "f16"

    @plgpu.inline_mgpu(
        arg_types=(PER_ROW,), return_type=plgpu.ShapeDtypeStruct(row.shape, dtype, PER_ROW)
    )
    def run(_, row):
        i16 = ir.IntegerType.get_signless(16)
        element = mgpu.utils.dtype_to_ir_type(dtype)
        asm = f"cvt.rz.{name}.f32 $0, $1;"
        held = row.registers.copy()
        for i, value in enumerate(regs.row_values(row)):
            bits = llvm.inline_asm(i16, [value], asm, "=h,f", has_side_effects=False)
            held.flat[i] = regs.as_register(row, mgpu.utils.bitcast(bits, element), element)
        return mgpu.FragmentedArray(_registers=held, _layout=row.layout, _is_signed=None)

    return run(row)


def row_sum(parts: jax.Array) -> jax.Array:
    """Adds the four threads' parts of each row: float32 [64], ``PER_ROW``."""

    @plgpu.inline_mgpu(
        arg_types=(PER_ROW,),
        return_type=plgpu.ShapeDtypeStruct(parts.shape, parts.dtype, PER_ROW),
    )
    def run(_, parts):
        return regs.with_row_values(parts, regs.over_quad(regs.row_values(parts), arith.addf))

    return run(parts)


def zero_non_finite(tile: Any, slot: jax.Array, *, dtype: Any) -> None:
    """Sets NaN and infinities of ``tile[slot]`` in shared memory to zero.

    Every warpgroup that reads the tile calls this for itself; all write the same.
    """
    exponent = 0x7F80 if dtype == jnp.bfloat16 else 0x7C00

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(SWIZZLED), plgpu.Layout.WG_SPLAT))
    def run(_, tile, slot):
        i32 = ir.IntegerType.get_signless(32)
        shape = ir.MemRefType(tile.type).shape
        words = int(np.prod(shape[1:])) // 2
        base = mgpu.utils.memref_ptr(tile)
        start = arith.muli(slot.registers[()], regs.constant(i32, words))
        thread = regs.thread()

        loop = scf.ForOp(regs.constant(i32, 0), regs.constant(i32, words), regs.constant(i32, 128))
        with ir.InsertionPoint(loop.body):
            word = arith.addi(start, arith.addi(loop.induction_variable, thread))
            where = mgpu.utils.getelementptr(base, [word], i32)
            bits = llvm.load(i32, where)
            kept = bits
            for half in (exponent, exponent << 16):
                mask = regs.constant(i32, half)
                bad = arith.cmpi(arith.CmpIPredicate.eq, arith.andi(bits, mask), mask)
                rest = regs.constant(i32, 0xFFFF0000 if half == exponent else 0xFFFF)
                kept = arith.select(bad, arith.andi(kept, rest), kept)
            llvm.store(kept, where)
            scf.yield_([])

    run(tile, slot)
    plgpu.commit_smem()
