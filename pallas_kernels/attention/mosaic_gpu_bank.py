"""The bank of the Hopper kernels: sums and noise in fixed point, int32, in shared memory.

A thread's words of the bank are for the elements of a tile that it holds in registers
(``mosaic_gpu_registers.py``). The warpgroups that compute and the one that makes the noise
add to the same words at the same time.
"""

# ``mlir`` and the fragmented arrays have no types worth stating.
# mypy: allow-untyped-defs, allow-untyped-calls
# mypy: disable-error-code="no-any-return,arg-type,call-arg,abstract"

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels.attention import mosaic_gpu_registers as regs
from pallas_kernels.attention.mosaic_gpu_registers import (
    PER_ROW,
    THREADS,
    TILE,
)

# √(−2 ln 2⁻⁴¹), the largest Gaussian of ``prng.box_muller``, and a little.
_LARGEST_NORMAL = 7.6


def is_small(factor: float) -> bool:
    """Whether :func:`normals` of this factor are below 2²², as ``magic`` needs."""
    return factor * _LARGEST_NORMAL < 2.0**22


def bank_zero(bank: Any, row_bank: Any, warpgroup: jax.Array, *, magic: bool) -> None:
    """Zeroes the words of ``bank`` that this thread will read, and its row of ``row_bank``.

    ``magic``: the words begin at what takes the constant off that the noise will bring.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), plgpu.Layout.WG_SPLAT))
    def run(_, bank, row_bank, warpgroup):
        i32 = ir.IntegerType.get_signless(32)
        own, zero = warpgroup.registers[()], regs.constant(i32, 0)
        address, words = _bank_words(bank, own)
        start = regs.constant(i32, -_magic(1.0)[1]) if magic else zero
        for word in range(words):
            _shared(f"st.shared.u32 [$0 + {512 * word}], $1;", address, start)
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
        magic = regs.constant(ir.F32Type.get(), _magic(unit)[0])
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
    as_integers: bool = False,
) -> jax.Array:
    """The bank plus a last tile, in float32, rounded to the public grid.

    ``as_integers`` gives int32 instead, in units.

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
        added = arith.addi(chunks.registers[()], regs.constant(i32, 1))
        excess = arith.muli(added, regs.constant(i32, _magic(unit)[1]))
        operands = [
            address,
            arith.subi(regs.constant(i32, half), excess),
            regs.constant(f32, _magic(unit)[0]),
            regs.constant(f32, unit),
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
                lines.append(f"and.b32 n{i}, n{i}, {mask};")
                if as_integers:
                    lines.append(f"mov.b32 ${i}, n{i};")
                    continue
                lines.append(f"cvt.rn.f32.s32 x{i}, n{i}; mul.rn.f32 ${i}, x{i}, {scale};")
            results += _outputs(lines, [*operands, *elements], "r,r,f,f" + ",f" * n, n)
        return regs.like(sums, _pairs(sums, results))

    total = run(sums, bank, warpgroup, chunks)
    return jax.lax.bitcast_convert_type(total, jnp.int32) if as_integers else total


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
        operands = [address, *(regs.constant(f32, x) for x in (unit, 1.0 / grid, grid))]
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
        return regs.like(tile, _pairs(tile, results))

    return run(tile, bank, warpgroup)


def row_bank_add(parts: jax.Array, bank: Any, warpgroup: jax.Array, *, unit: float) -> None:
    """Adds row sums to the int32 ``bank`` [128], as multiples of ``unit``, to nearest.

    Each thread's part is rounded by itself.
    """

    @plgpu.inline_mgpu(arg_types=(PER_ROW, plgpu.RefType(), plgpu.Layout.WG_SPLAT))
    def run(_, parts, bank, warpgroup):
        i32 = ir.IntegerType.get_signless(32)
        inverse = regs.constant(ir.F32Type.get(), 1.0 / unit)
        whole = [_whole(x, inverse) for x in regs.row_values(parts)]
        whole = regs.over_quad(whole, arith.addi)
        address = _row_address(bank, warpgroup.registers[()])
        lane = arith.andi(regs.thread(), regs.constant(i32, 31))
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


def store_keys(words: tuple[jax.Array, ...], keys: Any) -> None:
    """Stores eight words of threads 0 and 1 in ``keys`` [16]; other threads' are dropped."""

    @plgpu.inline_mgpu(arg_types=((THREADS,) * 8, plgpu.RefType()))
    def run(_, words, keys):
        i32 = ir.IntegerType.get_signless(32)
        base = llvm.ptrtoint(i32, mgpu.utils.memref_ptr(keys))
        thread = regs.thread()
        address = arith.addi(base, arith.muli(thread, regs.constant(i32, 32)))
        values = [regs.scalar(w.registers.flat[0]) for w in words]
        stores = " ".join(f"@p st.shared.u32 [$0 + {4 * i}], ${i + 2};" for i in range(8))
        llvm.inline_asm(
            ir.Type.parse("!llvm.void"),
            [address, thread, *values],
            "{ .reg .pred p; setp.lt.u32 p, $1, 2; " + stores + " }",
            "r,r" + ",r" * 8 + ",~{memory}",
            has_side_effects=True,
        )

    run(words, keys)


def normals(
    words: tuple[jax.Array, ...], *, factor: float, magic: bool = False
) -> tuple[jax.Array, ...]:
    """``factor`` times a Gaussian for each word, to the nearest int32.

    With ``magic``, which needs :func:`is_small`, the bits of 1.5·2²³ more: an addition of floats
    leaves the integer in the low bits, where a conversion takes a multiplication and a unit
    that exponentials wait for.

    The Gaussians are those of ``prng.box_muller`` on word pairs, with the hardware's
    approximations (absolute error of sine, cosine and logarithm about 2⁻²⁰).
    """
    kind = plgpu.ShapeDtypeStruct((128,), jnp.int32, THREADS)

    @plgpu.inline_mgpu(arg_types=((THREADS,) * len(words),), return_type=(kind,) * len(words))
    def run(_, words):
        bits = [w.registers.flat[0] for w in words]
        pairs = [bits[p : p + 2] for p in range(0, len(bits), 2)]
        values = [x for pair in pairs for x in _box_muller(*pair, factor, magic)]
        return tuple(
            regs.with_register(word, value) for word, value in zip(words, values, strict=True)
        )

    return run(words)


def add_noise(
    values: tuple[jax.Array, ...], word: jax.Array, offsets: tuple[int, ...], bank: Any
) -> None:
    """Adds a thread's values to the words ``word`` + ``offsets`` of ``bank``."""

    @plgpu.inline_mgpu(arg_types=((THREADS,) * len(values), THREADS, plgpu.RefType()))
    def run(_, values, word, bank):
        i32 = ir.IntegerType.get_signless(32)
        base = llvm.ptrtoint(i32, mgpu.utils.memref_ptr(bank))
        word = regs.scalar(word.registers.flat[0])
        address = arith.addi(base, arith.muli(word, regs.constant(i32, 4)))
        for value, offset in zip(values, offsets, strict=True):
            add = f"red.shared.add.u32 [$0 + {4 * offset}], $1;"
            _shared(add, address, regs.scalar(value.registers.flat[0]))

    run(values, word, bank)


def add_row_noise(
    values: tuple[jax.Array, ...], first: jax.Array, bank: Any, *, rows: int, spare: int
) -> None:
    """Adds a lane's sixteen values to the words ``first`` + 16·lane, ... of ``bank``. For one warp.

    Those that are below 0 or not below ``rows`` go to the word ``spare``, which nobody reads.
    """

    @plgpu.inline_mgpu(arg_types=((THREADS,) * len(values), plgpu.Layout.WG_SPLAT, plgpu.RefType()))
    def run(_, values, first, bank):
        i32 = ir.IntegerType.get_signless(32)
        base = llvm.ptrtoint(i32, mgpu.utils.memref_ptr(bank))
        lane = arith.andi(regs.thread(), regs.constant(i32, 31))
        first = arith.addi(first.registers[()], arith.muli(lane, regs.constant(i32, 16)))
        for i, value in enumerate(values):
            word = arith.addi(first, regs.constant(i32, i))
            is_row = arith.cmpi(arith.CmpIPredicate.ult, word, regs.constant(i32, rows))
            word = arith.select(is_row, word, regs.constant(i32, spare))
            address = arith.addi(base, arith.muli(word, regs.constant(i32, 4)))
            add = "red.shared.add.u32 [$0], $1;"
            _shared(add, address, regs.scalar(value.registers.flat[0]))

    run(values, first, bank)


def warp() -> jax.Array:
    """The number of the thread's warp in its warpgroup: a scalar that warps differ in.

    What depends on it must not make all threads of the warpgroup meet.
    """

    @plgpu.inline_mgpu(return_type=plgpu.ShapeDtypeStruct((), jnp.int32, plgpu.Layout.WG_SPLAT))
    def run(_):
        i32 = ir.IntegerType.get_signless(32)
        # Read each time: kept from the beginning, it would take a register from all warps.
        asm = "{ .reg .b32 t; mov.u32 t, %tid.x; bfe.u32 $0, t, 5, 2; }"
        number = llvm.inline_asm(i32, [], asm, "=r", has_side_effects=True)
        return mgpu.FragmentedArray.splat(number, (), is_signed=True)

    return run()


def _bank_order(sums):
    """The elements of a tile with the number of their word among a thread's words.

    A thread's words lie 128 words apart, so that 32 threads never meet in a memory bank.
    """
    for register, half, group in regs.walk(sums):
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
    held = np.empty(tile.registers.shape, dtype=object)
    order = [index for index, _word in _bank_order(tile)][::2]
    for i, index in enumerate(order):
        two = ir.VectorType.get((2,), ir.F32Type.get())
        held[index] = vector.from_elements(two, values[2 * i : 2 * i + 2])
    return held


def _bank_words(bank, warpgroup):
    """The address of the thread's first word of the bank, and how many it has."""
    i32 = ir.IntegerType.get_signless(32)
    _warpgroups, groups, registers, _threads = ir.MemRefType(bank.type).shape
    base = llvm.ptrtoint(i32, mgpu.utils.memref_ptr(bank))
    own = arith.muli(warpgroup, regs.constant(i32, groups * registers * 512))
    thread = arith.muli(regs.thread(), regs.constant(i32, 4))
    return arith.addi(base, arith.addi(own, thread)), groups * registers


def _row_address(bank, warpgroup):
    """The address of the word of ``bank`` [128] that belongs to the thread's first row."""
    i32 = ir.IntegerType.get_signless(32)
    base = llvm.ptrtoint(i32, mgpu.utils.memref_ptr(bank))
    row = arith.addi(regs.thread_row(), arith.muli(warpgroup, regs.constant(i32, 64)))
    return arith.addi(base, arith.muli(row, regs.constant(i32, 4)))


def _shared(asm, address, value):
    llvm.inline_asm(
        ir.Type.parse("!llvm.void"), [address, value], asm, "r,r,~{memory}", has_side_effects=True
    )


def _whole(value, factor):
    """``value·factor``, to the nearest int32."""
    asm = "{ .reg .f32 x; mul.rn.f32 x, $1, $2; cvt.rni.s32.f32 $0, x; }"
    i32 = ir.IntegerType.get_signless(32)
    return llvm.inline_asm(i32, [value, factor], asm, "=r,f,f", has_side_effects=False)


def _magic(unit):
    """1.5·2²³ units, and its bits."""
    value = np.float32(1.5 * 2.0**23 * unit)
    return float(value), int(value.view(np.int32))


def _box_muller(radius_word, angle_word, factor, magic):
    """``factor`` times two Gaussians, to the nearest int32; ``magic`` as in :func:`normals`."""
    i32 = ir.IntegerType.get_signless(32)
    f32 = ir.F32Type.get()
    # ln u = ln 2 · lg2 u; the factor goes under the root.
    operands = [
        regs.scalar(radius_word),
        regs.scalar(angle_word),
        regs.constant(f32, -2.0 * math.log(2.0) * factor**2),
        regs.constant(f32, _magic(1.0)[0]),
    ]
    to_integer = "mul.ftz.f32 x, x, u; cvt.rni.s32.f32 {out}, x;"
    if magic:
        to_integer = "fma.rn.ftz.f32 x, x, u, $5; mov.b32 {out}, x;"
    values = llvm.inline_asm(
        llvm.StructType.get_literal((i32, i32)),
        operands,
        "{ .reg .f32 u, x, a; .reg .b32 w;"
        # (low + 1/2) 2^-40, low the last 8 bits: put into the mantissa of 2^-17, and that less
        # 2^-41 subtracted.
        " and.b32 w, $3, 255; or.b32 w, w, 0x37000000; mov.b32 u, w;"
        " sub.rn.ftz.f32 u, u, 0f36FFFFFF;"
        " cvt.rn.f32.u32 x, $2; fma.rn.ftz.f32 u, x, 0f2F800000, u;"  # 2^-32
        " lg2.approx.ftz.f32 u, u; mul.ftz.f32 u, u, $4; sqrt.approx.ftz.f32 u, u;"
        " shr.u32 w, $3, 8; cvt.rn.f32.u32 a, w; mul.ftz.f32 a, a, 0f34C90FDB;"  # 2 pi / 2^24
        f" cos.approx.ftz.f32 x, a; {to_integer.format(out='$0')}"
        f" sin.approx.ftz.f32 x, a; {to_integer.format(out='$1')} " + "}",
        "=&r,=&r,r,r,f,f",
        has_side_effects=False,
    )
    return [llvm.extractvalue(i32, values, (i,)) for i in range(2)]
