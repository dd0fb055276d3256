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


def start(first: Any, i: jax.Array, second: Any, j: jax.Array) -> jax.Array:
    """Starts first[i] · second[j]ᵀ and returns where it will be, to be given to :func:`wait`.

    A group of its own, as ``plgpu.wgmma`` makes one.

    Args:
        first: bfloat16 or float16 [..., 64, H] in shared memory, ``SWIZZLED``.
        i: which of them.
        second: likewise, [..., n, H].
        j: which of them.

    Returns:
        float32 [64, n], ``TILE``.
    """
    columns, depth = second.shape[-2:]
    name = "bf16" if second.dtype == jnp.bfloat16 else "f16"

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(SWIZZLED), plgpu.Layout.WG_SPLAT) * 2,
        return_type=plgpu.ShapeDtypeStruct((64, columns), jnp.float32, TILE),
    )
    def run(_, first, i, second, j):
        f32 = ir.F32Type.get()
        count = columns // 2
        sums = ", ".join(f"${x}" for x in range(count))
        steps = depth // 16
        lines = [".reg .pred p; wgmma.fence.sync.aligned;"]
        lines += [
            f"setp.ne.b32 p, {step}, 0;"
            f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{name}.{name}"
            f" {{{sums}}}, ${count + step}, ${count + steps + step}, p, 1, 1, 0, 0;"
            for step in range(steps)
        ]
        lines.append("wgmma.commit_group.sync.aligned;")
        result = llvm.inline_asm(
            llvm.StructType.get_literal([f32] * count),
            [*_descriptors(first, i, depth), *_descriptors(second, j, depth)],
            "{ " + " ".join(lines) + " }",
            ",".join(["=&f"] * count + ["l"] * (2 * steps)),
            has_side_effects=True,
        )
        empty = mgpu.FragmentedArray.splat(
            regs.constant(f32, 0.0), (64, columns), mgpu.WGMMA_LAYOUT
        )
        return _from_sums(empty, [llvm.extractvalue(f32, result, [x]) for x in range(count)])

    return run(first, i, second, j)


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
