"""Clipping factors of values for the Hopper kernels, in one pass over them.

XLA makes three launches of them.
"""

# ``mlir`` and the fragmented arrays have no types worth stating.
# mypy: allow-untyped-defs, allow-untyped-calls
# mypy: disable-error-code="no-any-return,arg-type,call-arg,abstract"

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.attention import mosaic_gpu_registers as regs

_ROWS = 32  # of a warp: each lane keeps the factor of one
_WARPS = 4  # of a block
_MULTIPLE = 128
# Rows that a warp asks for at a time, 16 bytes of each in a thread (or more: ptxas may join two).
_IN_FLIGHT = 8


class Factors(NamedTuple):
    """``common.row_scales`` of a [B, S, K, H] array.

    Attributes:
        scale: [B, K, S] in the dtype of the values, rounded towards zero; S padded to a
            multiple of 128 with ones.
        dirty: int32 [B, K], 1 where a row of the head is not finite.
    """

    scale: jax.Array
    dirty: jax.Array


def value_factors(value: jax.Array, bound: float) -> Factors:
    """The factors min(1, bound/‖v‖); 0 for a row that is not finite.

    Args:
        value: bfloat16 or float16 [B, S, K, H], S a multiple of 8, H of 64.
        bound: the clip C.
    """
    batch, num_keys, heads, _ = value.shape
    padded = pl.cdiv(num_keys, _MULTIPLE) * _MULTIPLE
    blocks = batch * heads * padded // (_ROWS * _WARPS)
    scale: jax.Array = plgpu.kernel(
        functools.partial(_kernel, blocks, bound),
        out_type=jax.ShapeDtypeStruct((batch, heads, padded), value.dtype),
        grid=(blocks,),
        grid_names=("block",),
        kernel_name="value_factors",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )(value)
    return Factors(scale, jnp.any(scale == 0.0, axis=2).astype(jnp.int32))


def _kernel(blocks: int, bound: float, value_ref: Any, scale_ref: Any) -> None:
    """A block's rows, the last ones first.

    Attention begins with the first ones, which are then still in the L2 cache; and what made
    the values has left the last ones there.
    """
    block = blocks - 1 - lax.axis_index("block")
    _, num_keys, heads, depth = value_ref.shape
    warps_of_head = scale_ref.shape[2] // _ROWS
    short = "bf16" if value_ref.dtype == jnp.bfloat16 else "f16"

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.RefType(), plgpu.Layout.WG_SPLAT),
    )
    def run(_, value, scale, block):
        f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)
        lanes = depth // 8  # that read a row together, 16 bytes each

        def constant(x):
            return regs.constant(i32, x)

        thread = regs.thread()
        warp, lane = arith.shrui(thread, constant(5)), arith.andi(thread, constant(31))
        warp = arith.addi(arith.muli(block.registers[()], constant(_WARPS)), warp)
        head = arith.divui(warp, constant(warps_of_head))
        first = arith.muli(arith.remui(warp, constant(warps_of_head)), constant(_ROWS))
        # Lane i of those that read rows together has the factor of their i-th row in the end.
        own = arith.andi(lane, constant(lanes - 1))
        row = arith.addi(first, arith.subi(lane, own))
        batch, of_batch = arith.divui(head, constant(heads)), arith.remui(head, constant(heads))
        place = arith.addi(arith.muli(batch, constant(num_keys)), row)
        place = arith.addi(arith.muli(_wide(place), _wide(constant(heads))), _wide(of_batch))
        place = arith.muli(place, _wide(constant(2 * depth)))
        place = arith.addi(place, _wide(arith.muli(own, constant(16))))
        place = arith.addi(_base(value), place)
        stride = 2 * heads * depth
        mine = regs.constant(f32, 0.0)
        for start in range(0, lanes, _IN_FLIGHT):
            # Rows beyond the last are zeros, whose factor is 1.
            left = arith.subi(constant(num_keys - start), row)
            here = arith.addi(place, _wide(constant(start * stride)))
            for i, square in enumerate(_row_squares(here, left, stride, lanes, short)):
                is_own = arith.cmpi(arith.CmpIPredicate.eq, own, constant(start + i))
                mine = arith.select(is_own, square, mine)
        to = arith.addi(arith.muli(warp, constant(_ROWS)), lane)
        to = arith.addi(_base(scale), arith.muli(_wide(to), _wide(constant(2))))
        limits = [regs.constant(f32, bound * bound), regs.constant(f32, bound)]
        llvm.inline_asm(
            ir.Type.parse("!llvm.void"),
            [mine, to, *limits],
            "{ .reg .pred p; .reg .f32 r; .reg .b16 h;"
            " setp.gt.f32 p, $0, $2; rsqrt.approx.ftz.f32 r, $0; mul.ftz.f32 r, r, $3;"
            " selp.f32 r, r, 0f3F800000, p;"
            " setp.lt.f32 p, $0, 0f7F800000; selp.f32 r, r, 0f00000000, p;"  # infinite or NaN
            f" cvt.rz.{short}.f32 h, r; st.global.b16 [$1], h; }}",
            "f,l,f,f,~{memory}",
            has_side_effects=True,
        )

    run(value_ref, scale_ref, block)


def _row_squares(place, left, stride, lanes, short):
    """The sums of squares of the next rows, in all lanes of a row; of rows from ``left`` on, 0."""
    f32, count = ir.F32Type.get(), _IN_FLIGHT
    lines = [
        f".reg .pred p<{count}>; .reg .b32 w<{4 * count}>; .reg .f32 x, y, even, odd;",
        ".reg .b16 h, i;",
    ]
    for r in range(count):
        words = [f"w{4 * r + i}" for i in range(4)]
        lines.append(f"setp.gt.s32 p{r}, ${count + 1}, {r};")
        lines += [f"mov.b32 {w}, 0;" for w in words]
        to = "{" + ", ".join(words) + "}"
        lines.append(f"@p{r} ld.global.nc.L1::no_allocate.v4.b32 {to}, [${count} + {r * stride}];")
    for r in range(count):
        lines.append("mov.f32 even, 0f00000000; mov.f32 odd, 0f00000000;")
        for i in range(4):
            word = f"w{4 * r + i}"
            if short == "bf16":
                lines.append(f"shl.b32 x, {word}, 16; and.b32 y, {word}, 0xffff0000;")
            else:
                lines.append(f"mov.b32 {{h, i}}, {word}; cvt.f32.f16 x, h; cvt.f32.f16 y, i;")
            lines.append("fma.rn.f32 even, x, x, even; fma.rn.f32 odd, y, y, odd;")
        lines.append(f"add.f32 ${r}, even, odd;")
        distance = 1
        while distance < lanes:
            lines.append(f"shfl.sync.bfly.b32 x, ${r}, {distance}, 0x1f, 0xffffffff;")
            lines.append(f"add.f32 ${r}, ${r}, x;")
            distance *= 2
    values = llvm.inline_asm(
        llvm.StructType.get_literal((f32,) * count),
        [place, left],
        "{ " + " ".join(lines) + " }",
        "=&f," * count + "l,r",
        has_side_effects=True,
    )
    return [llvm.extractvalue(f32, values, (r,)) for r in range(count)]


def _wide(x):
    return arith.extui(ir.IntegerType.get_signless(64), x)


def _base(ref):
    """The address of an array in device memory."""
    pointer = llvm.addrspacecast(ir.Type.parse("!llvm.ptr<1>"), mgpu.utils.memref_ptr(ref))
    return llvm.ptrtoint(ir.IntegerType.get_signless(64), pointer)
