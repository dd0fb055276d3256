"""Register-level pieces of the Hopper kernels, in PTX where Pallas has no word for it.

A warpgroup (128 threads) holds a 64 × n float32 tile in the layout of its matrix
instruction: thread ``t`` has, for every group of eight columns, the columns
2 (t mod 4) and the next one of the rows 16 ⌊t/32⌋ + ⌊(t mod 32)/4⌋ and that plus 8. The
functions here walk over those registers; each one says what it costs.

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

TILE = plgpu.Layout.WGMMA
PER_ROW = plgpu.Layout.WGMMA.reduce(1)
PER_COLUMN = plgpu.Layout.WGMMA.reduce(0)
# One element a thread.
THREADS = plgpu.Layout.WG_STRIDED((128,), vec_size=1)

# How tiles of a short format lie in shared memory.
SWIZZLED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))

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
        lane = arith.andi(_thread(), _constant(i32, 3))
        own = arith.muli(lane, _constant(i32, 2))
        row = _thread_row()
        rows = [row, arith.addi(row, _constant(i32, 8))]
        lasts, firsts = [next(given)] * 2, None
        if below is not None:
            limit = next(given)
            lasts = [arith.minsi(v, arith.addi(limit, r)) for v, r in zip(lasts, rows, strict=True)]
        if above is not None:
            limit = next(given)
            firsts = [arith.subi(arith.addi(limit, r), own) for r in rows]
        lasts = [arith.subi(v, own) for v in lasts]
        hidden = _constant(f32, -np.inf)
        registers = np.empty(x.registers.shape, dtype=object)
        for index, half, group in _walk(x):
            values = []
            for e in range(2):
                value = vector.extract(x.registers[index], [], [e])
                column = _constant(i32, 8 * group + e)
                seen = arith.cmpi(arith.CmpIPredicate.sge, lasts[half], column)
                value = arith.select(seen, value, hidden)
                if firsts is not None:
                    seen = arith.cmpi(arith.CmpIPredicate.sle, firsts[half], column)
                    value = arith.select(seen, value, hidden)
                values.append(value)
            registers[index] = vector.from_elements(ir.VectorType.get((2,), f32), values)
        return _like(x, registers)

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
        factor = _constant(f32, scale)
        offsets, parts = _row_values(offset), _row_values(total)
        # Two sums a row: an addition waits for the one before it.
        sums = [[part, _constant(f32, 0.0)] for part in parts]
        weights = np.empty(x.registers.shape, dtype=object)
        for index, half, group in _walk(x):
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
        return _like(x, weights), _with_row_values(total, [arith.addf(*s) for s in sums])

    return run(logits, offset, total)


def pack(weights: jax.Array, factors: jax.Array | None, dtype: Any) -> jax.Array:
    """Weights in a short format, times a factor a column: a conversion and a MUL for two.

    The factors are at most 1 and the weights too, so no product is above its factor: the
    rounding is monotone and a factor is its own rounding.

    Args:
        weights: float32 [64, n], ``TILE``.
        factors: [n] in ``dtype``, ``PER_COLUMN``, or None.
        dtype: bfloat16 or float16.
    """
    name = "bf16" if dtype == jnp.bfloat16 else "f16"
    convert = f"cvt.rn.{name}x2.f32"
    asm = f"{convert} $0, $2, $1;"
    if factors is not None:
        asm = "{ .reg .b32 p; " + f"{convert} p, $2, $1; mul.rn.{name}x2 $0, p, $3; " + "}"

    def run(_, w, *factors):
        i32 = ir.IntegerType.get_signless(32)
        two = ir.VectorType.get((2,), mgpu.utils.dtype_to_ir_type(dtype))
        packed = np.empty(w.registers.shape, dtype=object)
        for index, _half, group in _walk(w):
            pair = w.registers[index]
            operands = [vector.extract(pair, [], [e]) for e in range(2)]
            operands += [mgpu.utils.bitcast(f.registers.flat[group], i32) for f in factors]
            constraints = "=r,f,f" + ",r" * len(factors)
            bits = llvm.inline_asm(i32, operands, asm, constraints, has_side_effects=False)
            packed[index] = mgpu.utils.bitcast(bits, two)
        return _like(w, packed)

    call = plgpu.inline_mgpu(
        arg_types=(TILE,) if factors is None else (TILE, PER_COLUMN),
        return_type=plgpu.ShapeDtypeStruct(weights.shape, dtype, TILE),
    )(run)
    return call(weights) if factors is None else call(weights, factors)


def row_sum(parts: jax.Array) -> jax.Array:
    """Adds the four threads' parts of each row: float32 [64], ``PER_ROW``."""

    @plgpu.inline_mgpu(
        arg_types=(PER_ROW,),
        return_type=plgpu.ShapeDtypeStruct(parts.shape, parts.dtype, PER_ROW),
    )
    def run(_, parts):
        return _with_row_values(parts, _over_quad(_row_values(parts), arith.addf))

    return run(parts)


def row_bank_add(parts: jax.Array, bank: Any, warpgroup: jax.Array, *, unit: float) -> None:
    """Adds row sums to the int32 ``bank`` [128], as multiples of ``unit``, to nearest.

    Each thread's part is rounded by itself.
    """

    @plgpu.inline_mgpu(arg_types=(PER_ROW, plgpu.RefType(), plgpu.Layout.WG_SPLAT))
    def run(_, parts, bank, warpgroup):
        i32 = ir.IntegerType.get_signless(32)
        inverse = _constant(ir.F32Type.get(), 1.0 / unit)
        whole = [_whole(x, inverse) for x in _row_values(parts)]
        whole = _over_quad(whole, arith.addi)
        address = _row_address(bank, warpgroup.registers[()])
        lane = arith.andi(_thread(), _constant(i32, 31))
        # One thread of the four adds; the others may read after the warp has met.
        asm = (
            "{ .reg .pred p; .reg .b32 l; and.b32 l, $3, 3; setp.eq.b32 p, l, 0;"
            " @p red.shared.add.u32 [$0], $1; @p red.shared.add.u32 [$0 + 32], $2;"
            " bar.warp.sync 0xffffffff; }"
        )
        llvm.inline_asm(
            ir.Type.parse("!llvm.void"),
            [address, *whole, lane],
            asm,
            "r,r,r,r,~{memory}",
            has_side_effects=True,
        )

    run(parts, bank, warpgroup)


def bank_zero(bank: Any, row_bank: Any, warpgroup: jax.Array) -> None:
    """Zeroes the words of ``bank`` that this thread will read, and its row of ``row_bank``."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), plgpu.Layout.WG_SPLAT))
    def run(_, bank, row_bank, warpgroup):
        i32 = ir.IntegerType.get_signless(32)
        own, zero = warpgroup.registers[()], _constant(i32, 0)
        address, words = _bank_words(bank, own)
        for word in range(words):
            _shared(f"st.shared.u32 [$0 + {512 * word}], $1;", address, zero)
        # The threads that hold a row, one of which adds to it later.
        address = _row_address(row_bank, own)
        _shared("st.shared.u32 [$0], $1;", address, zero)
        _shared("st.shared.u32 [$0 + 32], $1;", address, zero)

    run(bank, row_bank, warpgroup)


def bank_add(sums: jax.Array, bank: Any, warpgroup: jax.Array, *, unit: float) -> None:
    """Adds a tile to the warpgroup's int32 bank, as multiples of ``unit``, to nearest.

    |sums| must be below 2²² units. Adding 1.5·2²³ units leaves the multiple in the low bits
    of the float, and the same constant above; :func:`bank_total` takes the constants
    off. An ADD and an atomic addition in shared memory for an element: the warpgroup that
    makes the noise may be adding at the same time, and nothing waits for the result.
    """

    @plgpu.inline_mgpu(arg_types=(TILE, plgpu.RefType(), plgpu.Layout.WG_SPLAT))
    def run(_, sums, bank, warpgroup):
        address, _words = _bank_words(bank, warpgroup.registers[()])
        magic = _constant(ir.F32Type.get(), _magic(unit)[0])
        for words, elements in _batches(sums):
            n = len(words)
            # One block of assembly: apart, all additions would come first and need registers.
            lines = [f".reg .f32 x<{n}>; .reg .b32 n<{n}>;"]
            lines += [f"add.rn.f32 x{i}, ${i + 2}, $1; mov.b32 n{i}, x{i};" for i in range(n)]
            lines += [f"red.shared.add.u32 [$0 + {512 * w}], n{i};" for i, w in enumerate(words)]
            llvm.inline_asm(
                ir.Type.parse("!llvm.void"),
                [address, magic, *elements],
                "{ " + " ".join(lines) + " }",
                "r,f" + ",f" * n + ",~{memory}",
                has_side_effects=True,
            )

    run(sums, bank, warpgroup)


def bank_total(
    sums: jax.Array,
    bank: Any,
    warpgroup: jax.Array,
    chunks: jax.Array,
    *,
    unit: float,
    spacing: float,
) -> jax.Array:
    """The bank plus a last tile, in float32, rounded to the public grid.

    ``chunks`` is how many tiles were added before; ``spacing`` is the grid's, a power of
    two, or 0.0 for none. The grid is reached in integers (a rounding of floats runs at an
    eighth of the speed); ties go up.
    """
    step = max(round(spacing / unit), 1)
    half, mask = step // 2, -step

    @plgpu.inline_mgpu(
        arg_types=(TILE, plgpu.RefType(), plgpu.Layout.WG_SPLAT, plgpu.Layout.WG_SPLAT),
        return_type=plgpu.ShapeDtypeStruct(sums.shape, jnp.float32, TILE),
    )
    def run(_, sums, bank, warpgroup, chunks):
        f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)
        address, _words = _bank_words(bank, warpgroup.registers[()])
        added = arith.addi(chunks.registers[()], _constant(i32, 1))
        excess = arith.muli(added, _constant(i32, _magic(unit)[1]))
        operands = [
            address,
            arith.subi(_constant(i32, half), excess),
            _constant(f32, _magic(unit)[0]),
            _constant(f32, unit),
        ]
        results = []
        for words, elements in _batches(sums):
            n = len(words)
            address, shift, magic, scale = (f"${n + i}" for i in range(4))
            lines = [f".reg .f32 x<{n}>; .reg .b32 n<{n}>, m<{n}>;"]
            lines += [f"ld.shared.u32 m{i}, [{address} + {512 * w}];" for i, w in enumerate(words)]
            for i in range(n):
                lines.append(f"add.rn.f32 x{i}, ${n + 4 + i}, {magic}; mov.b32 n{i}, x{i};")
                lines.append(f"add.s32 n{i}, n{i}, m{i}; add.s32 n{i}, n{i}, {shift};")
                lines.append(f"and.b32 n{i}, n{i}, {mask}; cvt.rn.f32.s32 x{i}, n{i};")
                lines.append(f"mul.rn.f32 ${i}, x{i}, {scale};")
            results += _outputs(lines, [*operands, *elements], "r,r,f,f" + ",f" * n, n)
        return _like(sums, _pairs(sums, results))

    return run(sums, bank, warpgroup, chunks)


def bank_noise(
    tile: jax.Array, bank: Any, warpgroup: jax.Array, *, unit: float, spacing: float
) -> jax.Array:
    """A tile plus the bank, in float32, rounded to the public grid; no chunks in the bank.

    For tiles that are not sums of multiples of ``unit``: the rounding is one of floats.
    """
    to_grid = "mul.rn.f32 x{i}, x{i}, {inverse}; cvt.rni.f32.f32 x{i}, x{i};"

    @plgpu.inline_mgpu(
        arg_types=(TILE, plgpu.RefType(), plgpu.Layout.WG_SPLAT),
        return_type=plgpu.ShapeDtypeStruct(tile.shape, jnp.float32, TILE),
    )
    def run(_, tile, bank, warpgroup):
        f32 = ir.F32Type.get()
        address, _words = _bank_words(bank, warpgroup.registers[()])
        grid = spacing or 1.0
        operands = [address, *(_constant(f32, x) for x in (unit, 1.0 / grid, grid))]
        results = []
        for words, elements in _batches(tile):
            n = len(words)
            address, scale, inverse, back = (f"${n + i}" for i in range(4))
            lines = [f".reg .f32 x<{n}>; .reg .b32 m<{n}>;"]
            lines += [f"ld.shared.u32 m{i}, [{address} + {512 * w}];" for i, w in enumerate(words)]
            for i in range(n):
                lines.append(f"cvt.rn.f32.s32 x{i}, m{i};")
                lines.append(f"fma.rn.f32 x{i}, x{i}, {scale}, ${n + 4 + i};")
                if spacing:
                    lines.append(to_grid.format(i=i, inverse=inverse))
                lines.append(f"mul.rn.f32 ${i}, x{i}, {back};")
            results += _outputs(lines, [*operands, *elements], "r,f,f,f" + ",f" * n, n)
        return _like(tile, _pairs(tile, results))

    return run(tile, bank, warpgroup)


def add_normals(
    words: tuple[jax.Array, ...],
    bank: Any,
    warpgroup: jax.Array,
    first_group: jax.Array,
    register: jax.Array,
    *,
    factor: float,
) -> None:
    """Adds ``factor`` times a Gaussian, to nearest, to a register of each column group.

    The Gaussians are those of ``prng.box_muller`` on word pairs, with the hardware's
    approximations (absolute error of sine, cosine and logarithm about 2⁻²⁰).
    """

    @plgpu.inline_mgpu(
        arg_types=((THREADS,) * len(words), plgpu.RefType(), *(plgpu.Layout.WG_SPLAT,) * 3)
    )
    def run(_, words, bank, warpgroup, first_group, register):
        i32 = ir.IntegerType.get_signless(32)
        address, _words = _bank_words(bank, warpgroup.registers[()])
        where = arith.addi(
            arith.muli(first_group.registers[()], _constant(i32, 4)), register.registers[()]
        )
        address = arith.addi(address, arith.muli(where, _constant(i32, 512)))
        bits = [w.registers.flat[0] for w in words]
        values = [x for p in range(0, len(bits), 2) for x in _box_muller(*bits[p : p + 2])]
        scale = _constant(ir.F32Type.get(), factor)
        for group, value in enumerate(values):
            add = f"red.shared.add.u32 [$0 + {2048 * group}], $1;"
            _shared(add, address, _whole(value, scale))

    run(words, bank, warpgroup, first_group, register)


def add_row_normals(
    radius_word: jax.Array, angle_word: jax.Array, bank: Any, *, factor: float
) -> None:
    """Adds ``factor`` times a Gaussian (the cosine one), to nearest, to ``bank`` [128]."""

    @plgpu.inline_mgpu(arg_types=(THREADS, THREADS, plgpu.RefType()))
    def run(_, radius_word, angle_word, bank):
        i32 = ir.IntegerType.get_signless(32)
        value, _sine = _box_muller(radius_word.registers.flat[0], angle_word.registers.flat[0])
        base = llvm.ptrtoint(i32, mgpu.utils.memref_ptr(bank))
        address = arith.addi(base, arith.muli(_thread(), _constant(i32, 4)))
        whole = _whole(value, _constant(ir.F32Type.get(), factor))
        _shared("red.shared.add.u32 [$0], $1;", address, whole)

    run(radius_word, angle_word, bank)


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
        start = arith.muli(slot.registers[()], _constant(i32, words))
        thread = _thread()

        loop = scf.ForOp(_constant(i32, 0), _constant(i32, words), _constant(i32, 128))
        with ir.InsertionPoint(loop.body):
            word = arith.addi(start, arith.addi(loop.induction_variable, thread))
            where = mgpu.utils.getelementptr(base, [word], i32)
            bits = llvm.load(i32, where)
            kept = bits
            for half in (exponent, exponent << 16):
                mask = _constant(i32, half)
                bad = arith.cmpi(arith.CmpIPredicate.eq, arith.andi(bits, mask), mask)
                rest = _constant(i32, 0xFFFF0000 if half == exponent else 0xFFFF)
                kept = arith.select(bad, arith.andi(kept, rest), kept)
            llvm.store(kept, where)
            scf.yield_([])

    run(tile, slot)
    plgpu.commit_smem()


def _walk(x):
    """Indices of a tile's registers with the row half (0, 1) and the column group."""
    shape = x.registers.shape
    groups = x.shape[1] // 8
    (half_axis,) = [i for i, n in enumerate(shape) if n == 2 and i != 1]
    assert shape[1] == groups, (shape, x.shape)
    for index in np.ndindex(shape):
        yield index, index[half_axis], index[1]


def _bank_order(sums):
    """The elements of a tile with the number of their word among a thread's words.

    A thread's words lie 128 words apart, so that 32 threads never meet in a memory bank.
    """
    for register, half, group in _walk(sums):
        for e in range(2):
            yield register, 4 * group + 2 * half + e


def _batches(sums):
    """The tile's elements and their words, 16 at a time.

    Of a batch all loads come first: one after the other, each would wait for the last.
    """
    order = list(_bank_order(sums))
    for start in range(0, len(order), 16):
        batch = order[start : start + 16]
        words = [word for _index, word in batch]
        yield words, [vector.extract(sums.registers[i], [], [w % 2]) for i, w in batch]


def _outputs(lines, operands, constraints, count):
    """``count`` floats of a block of assembly that must stay behind the wait for the noise."""
    f32 = ir.F32Type.get()
    values = llvm.inline_asm(
        llvm.StructType.get_literal((f32,) * count),
        operands,
        "{ " + " ".join(lines) + " }",
        "=&f," * count + constraints,
        has_side_effects=True,
    )
    return [llvm.extractvalue(f32, values, (i,)) for i in range(count)]


def _pairs(tile, values):
    """Values in the order of :func:`_bank_order` as the tile's registers."""
    registers = np.empty(tile.registers.shape, dtype=object)
    order = [index for index, _word in _bank_order(tile)][::2]
    for i, index in enumerate(order):
        two = ir.VectorType.get((2,), ir.F32Type.get())
        registers[index] = vector.from_elements(two, values[2 * i : 2 * i + 2])
    return registers


def _bank_words(bank, warpgroup):
    """The address of the thread's first word of the bank, and how many it has."""
    i32 = ir.IntegerType.get_signless(32)
    _warpgroups, groups, registers, _threads = ir.MemRefType(bank.type).shape
    base = llvm.ptrtoint(i32, mgpu.utils.memref_ptr(bank))
    own = arith.muli(warpgroup, _constant(i32, groups * registers * 512))
    thread = arith.muli(_thread(), _constant(i32, 4))
    return arith.addi(base, arith.addi(own, thread)), groups * registers


def _whole(value, factor):
    """``value·factor``, to the nearest int32."""
    asm = "{ .reg .f32 x; mul.rn.f32 x, $1, $2; cvt.rni.s32.f32 $0, x; }"
    i32 = ir.IntegerType.get_signless(32)
    return llvm.inline_asm(i32, [value, factor], asm, "=r,f,f", has_side_effects=False)


def _over_quad(values, add):
    for distance in (1, 2):
        values = [add(x, mgpu.utils.shfl_bfly(x, distance)) for x in values]
    return values


def _thread_row():
    """The first of the two rows that the thread holds; the other is 8 further on."""
    i32 = ir.IntegerType.get_signless(32)
    warp = arith.shrui(_thread(), _constant(i32, 5))
    lane = arith.andi(_thread(), _constant(i32, 31))
    own = arith.shrui(lane, _constant(i32, 2))
    return arith.addi(arith.muli(warp, _constant(i32, 16)), own)


def _row_address(bank, warpgroup):
    """The address of the word of ``bank`` [128] that belongs to the thread's first row."""
    i32 = ir.IntegerType.get_signless(32)
    base = llvm.ptrtoint(i32, mgpu.utils.memref_ptr(bank))
    row = arith.addi(_thread_row(), arith.muli(warpgroup, _constant(i32, 64)))
    return arith.addi(base, arith.muli(row, _constant(i32, 4)))


def _shared(asm, address, value):
    llvm.inline_asm(
        ir.Type.parse("!llvm.void"), [address, value], asm, "r,r,~{memory}", has_side_effects=True
    )


def _magic(unit):
    """1.5·2²³ units, and its bits."""
    value = np.float32(1.5 * 2.0**23 * unit)
    return float(value), int(value.view(np.int32))


def _box_muller(radius_word, angle_word):
    f32 = ir.F32Type.get()
    values = llvm.inline_asm(
        llvm.StructType.get_literal((f32, f32)),
        [_scalar(radius_word), _scalar(angle_word)],
        "{ .reg .f32 u, x, a; .reg .b32 w;"
        " and.b32 w, $3, 255; cvt.rn.f32.u32 u, w; fma.rn.ftz.f32 u, u, 0f3B800000, 0f3B000000;"
        " cvt.rn.f32.u32 x, $2; add.ftz.f32 u, u, x; mul.ftz.f32 u, u, 0f2F800000;"  # 2^-32
        " lg2.approx.ftz.f32 u, u; mul.ftz.f32 u, u, 0fBFB17218;"  # -2 ln 2
        " sqrt.approx.ftz.f32 u, u;"
        " shr.u32 w, $3, 8; cvt.rn.f32.u32 a, w; mul.ftz.f32 a, a, 0f34C90FDB;"  # 2 pi / 2^24
        " cos.approx.ftz.f32 x, a; mul.ftz.f32 $0, x, u;"
        " sin.approx.ftz.f32 x, a; mul.ftz.f32 $1, x, u; }",
        "=f,=f,r,r",
        has_side_effects=False,
    )
    return [llvm.extractvalue(f32, values, (i,)) for i in range(2)]


def _scalar(x):
    return vector.extract(x, [], [0]) if isinstance(x.type, ir.VectorType) else x


def _thread():
    """The thread's number within its warpgroup."""
    i32 = ir.IntegerType.get_signless(32)
    return arith.andi(mgpu.utils.thread_idx(), _constant(i32, 127))


def _constant(type_, value):
    if isinstance(type_, ir.IntegerType):
        value = int(np.uint32(value & 0xFFFFFFFF).astype(np.int32))
        return arith.constant(type_, ir.IntegerAttr.get(type_, value))
    return arith.constant(type_, ir.FloatAttr.get(type_, value))


def _like(x, registers):
    return mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=None)


def _row_values(x):
    values = list(x.registers.flat)
    assert len(values) == 2, x.registers.shape
    return [_scalar(v) for v in values]


def _as_register(like, value, element):
    if isinstance(like.registers.flat[0].type, ir.VectorType):
        return vector.broadcast(ir.VectorType.get((1,), element), value)
    return value


def _with_row_values(x, values):
    registers = x.registers.copy()
    registers.flat[:] = [_as_register(x, v, v.type) for v in values]
    return mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=x.is_signed)
