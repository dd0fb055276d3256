"""How a warpgroup holds a tile: the registers that the pieces of the Hopper kernels walk over.

A warpgroup (128 threads) holds a 64 × n float32 tile in the layout of its matrix
instruction: thread ``t`` has, for every group of eight columns, the columns
2 (t mod 4) and the next one of the rows 16 ⌊t/32⌋ + ⌊(t mod 32)/4⌋ and that plus 8.
"""

# ``mlir`` and the fragmented arrays have no types worth stating.
# mypy: allow-untyped-defs, allow-untyped-calls
# mypy: disable-error-code="no-any-return,arg-type,call-arg,abstract"

import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

TILE = plgpu.Layout.WGMMA
PER_ROW = plgpu.Layout.WGMMA.reduce(1)
PER_COLUMN = plgpu.Layout.WGMMA.reduce(0)
# One element a thread.
THREADS = plgpu.Layout.WG_STRIDED((128,), vec_size=1)

# How tiles of a short format lie in shared memory, and those of 32 bits.
SWIZZLED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
SWIZZLED_32 = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))


def walk(x):
    """Indices of a tile's registers with the row half (0, 1) and the column group."""
    shape = x.registers.shape
    groups = x.shape[1] // 8
    (half_axis,) = [i for i, n in enumerate(shape) if n == 2 and i != 1]
    assert shape[1] == groups, (shape, x.shape)
    for index in np.ndindex(shape):
        yield index, index[half_axis], index[1]


def over_quad(values, add):
    """Adds up, by ``add``, what the four threads of a row hold."""
    for distance in (1, 2):
        values = [add(x, mgpu.utils.shfl_bfly(x, distance)) for x in values]
    return values


def thread():
    """The thread's number within its warpgroup."""
    i32 = ir.IntegerType.get_signless(32)
    return arith.andi(mgpu.utils.thread_idx(), constant(i32, 127))


def thread_row():
    """The first of the two rows that the thread holds; the other is 8 further on."""
    i32 = ir.IntegerType.get_signless(32)
    warp = arith.shrui(thread(), constant(i32, 5))
    lane = arith.andi(thread(), constant(i32, 31))
    own = arith.shrui(lane, constant(i32, 2))
    return arith.addi(arith.muli(warp, constant(i32, 16)), own)


def constant(type_, value):
    """An integer or float constant; integers wrap around."""
    if isinstance(type_, ir.IntegerType):
        half = 1 << (type_.width - 1)
        value = (int(value) + half) % (2 * half) - half
        return arith.constant(type_, ir.IntegerAttr.get(type_, value))
    return arith.constant(type_, ir.FloatAttr.get(type_, value))


def like(x, registers):
    """A fragmented array with the layout of ``x``."""
    return mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=None)


def scalar(x):
    """A register as a scalar, also if it is a vector of one."""
    return vector.extract(x, [], [0]) if isinstance(x.type, ir.VectorType) else x


def with_register(x, value):
    """An int32 array of one element a thread, in the layout of ``x``."""
    registers = x.registers.copy()
    registers.flat[0] = as_register(x, value, value.type)
    return mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=True)


def row_values(x):
    """The values of the two rows that a thread holds, from a ``PER_ROW`` array."""
    values = list(x.registers.flat)
    assert len(values) == 2, x.registers.shape
    return [scalar(v) for v in values]


def as_register(like, value, element):
    """A scalar in the form that the registers of ``like`` have."""
    if isinstance(like.registers.flat[0].type, ir.VectorType):
        return vector.broadcast(ir.VectorType.get((1,), element), value)
    return value


def with_row_values(x, values):
    """The ``PER_ROW`` array ``x`` with other values."""
    registers = x.registers.copy()
    registers.flat[:] = [as_register(x, v, v.type) for v in values]
    return mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=x.is_signed)
