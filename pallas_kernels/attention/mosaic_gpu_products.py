"""Matrix products of the Hopper backward kernels that write their accumulators, and do not add.

Pallas begins a product with an accumulator of zeros. In the forward kernel ptxas sees that and
lets the first instruction write; in the backward kernels it moves the zeros into registers,
in the middle of a step, when the matrix units wait for it.
"""

# ``mlir`` and the fragmented arrays have no types worth stating.
# mypy: allow-untyped-defs, allow-untyped-calls
# mypy: disable-error-code="no-any-return,arg-type,call-arg,abstract"

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import mma_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels.attention import mosaic_gpu_registers as regs
from pallas_kernels.attention.mosaic_gpu_registers import SWIZZLED, TILE

_GROUP = 8 * 128  # bytes: eight rows of 64 columns, which lie together


def start(first: jax.Array | tuple[Any, jax.Array], second: Any, j: jax.Array) -> jax.Array:
    """Starts first · second[j]ᵀ and returns where it will be, to be given to :func:`wait`.

    A group of its own, as ``plgpu.wgmma`` makes one.

    Args:
        first: bfloat16 or float16 [64, H], ``TILE``, which must not change before the product
            has ended; or such tiles in shared memory, ``SWIZZLED`` [..., 64, H], and which
            of them.
        second: likewise in shared memory, [..., n, H].
        j: which of them.

    Returns:
        float32 [64, n], ``TILE``.
    """
    columns, depth = second.shape[-2:]
    name = "bf16" if second.dtype == jnp.bfloat16 else "f16"
    steps, count = depth // 16, columns // 2
    in_memory = isinstance(first, tuple)
    one_tile = (plgpu.RefType(SWIZZLED), plgpu.Layout.WG_SPLAT)

    @plgpu.inline_mgpu(
        arg_types=(*(one_tile if in_memory else (TILE,)), *one_tile),
        return_type=plgpu.ShapeDtypeStruct((64, columns), jnp.float32, TILE),
    )
    def run(_, *operands):
        *first, second, j = operands
        f32 = ir.F32Type.get()
        # What one instruction reads of the first operand: four registers, or a descriptor.
        if in_memory:
            left, kind, each, more = _descriptors(*first, depth), "l", 1, ", 0"
        else:
            left, kind, each, more = _words(*first), "r", 4, ""
        right = _descriptors(second, j, depth)
        sums = _names(0, count)
        lines = [".reg .pred p; wgmma.fence.sync.aligned;"]
        for step in range(steps):
            own = _names(count + each * step, each)
            lines.append(
                f"setp.ne.b32 p, {step}, 0;"
                f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{name}.{name} {{{sums}}}, "
                + (own if in_memory else f"{{{own}}}")
                + f", ${count + len(left) + step}, p, 1, 1, 0{more};"
            )
        lines.append("wgmma.commit_group.sync.aligned;")
        result = llvm.inline_asm(
            llvm.StructType.get_literal([f32] * count),
            [*left, *right],
            "{ " + " ".join(lines) + " }",
            ",".join(["=&f"] * count + [kind] * len(left) + ["l"] * steps),
            has_side_effects=True,
        )
        empty = mgpu.FragmentedArray.splat(
            regs.constant(f32, 0.0), (64, columns), mgpu.WGMMA_LAYOUT
        )
        return _from_sums(empty, [llvm.extractvalue(f32, result, [x]) for x in range(count)])

    return run(*(first if in_memory else (first,)), second, j)


def wait(tile: jax.Array, groups: int) -> jax.Array:
    """What :func:`start` returned, once all but the last ``groups`` groups have ended."""

    @plgpu.inline_mgpu(
        arg_types=(TILE,), return_type=plgpu.ShapeDtypeStruct(tile.shape, jnp.float32, TILE)
    )
    def run(_, x):
        f32 = ir.F32Type.get()
        count = x.shape[1] // 2
        sums = [None] * count
        for index, half, group in regs.walk(x):
            for e in range(2):
                sums[4 * group + 2 * half + e] = vector.extract(x.registers[index], [], [e])
        result = llvm.inline_asm(
            llvm.StructType.get_literal([f32] * count),
            sums,
            f"wgmma.wait_group.sync.aligned {groups};",
            ",".join(["=f"] * count + [str(n) for n in range(count)]),
            has_side_effects=True,
        )
        return _from_sums(x, [llvm.extractvalue(f32, result, [n]) for n in range(count)])

    return run(tile)


def _from_sums(like, sums):
    """A tile with the layout of ``like`` from the registers in the order of the instruction."""
    pair = ir.VectorType.get((2,), ir.F32Type.get())
    held = np.empty(like.registers.shape, dtype=object)
    for index, half, group in regs.walk(like):
        first = 4 * group + 2 * half
        held[index] = vector.from_elements(pair, sums[first : first + 2])
    return regs.like(like, held)


def _names(first, count):
    return ", ".join(f"${first + x}" for x in range(count))


def _words(tile):
    """A tile of a short format in the order in which the instructions take its registers."""
    i32 = ir.IntegerType.get_signless(32)
    words = [None] * (tile.shape[1] // 4)
    for index, half, group in regs.walk(tile):
        words[2 * group + half] = llvm.bitcast(i32, tile.registers[index])
    return words


def _descriptors(tiles, which, depth):
    """The descriptors of the 16 columns of one tile that each instruction reads."""
    i64 = ir.IntegerType.get_signless(64)
    which = arith.index_cast(ir.IndexType.get(), which.registers[()])
    tile = mgpu.utils.memref_slice(tiles, which)
    # From eight rows to the next eight: the groups of all columns.
    base = mma_utils.encode_descriptor(
        tile, leading_byte_offset=0, stride_byte_offset=depth // 64 * _GROUP, swizzle=128
    )
    found = []
    for step in range(depth // 16):
        # 16 columns are 32 bytes; four times that, and the next group of eight rows begins.
        ahead = step // 4 * _GROUP + step % 4 * 32
        constant = regs.constant(i64, mma_utils.encode_addr(ahead))
        found.append(llvm.add(base, constant, overflow_flags=llvm.IntegerOverflowFlags.none))
    return found
