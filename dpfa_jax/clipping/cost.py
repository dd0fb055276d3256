"""Predicted time and memory of the two forms of a leaf, and of a whole loss.

The prediction is arithmetic over rates and bytes over bandwidth, the larger parts only:
it ranks the choices, and a test holds it against measured time.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpfa_jax.clipping.recognise import Site
from dpfa_jax.clipping.trace import inner_jaxprs

FLOAT32 = 4


class Machine(NamedTuple):
    """Rates that a program comes near to, in a second.

    Attributes:
        short: multiply-adds of 16-bit floats in matrix products.
        whole: of float32, not shortened.
        gram: the share of these that Gram matrices reach.
        bytes: to and from memory.
        passes: how many readings' time a materialised entry takes: it is written, which may hide
            behind its product, and read twice.
        tile: rows of the tiles on whose diagonal the symmetry of a Gram matrix is not used.
        has_kernel: whether :mod:`pallas_kernels.grad_norm` has a kernel that writes no matrix.
    """

    short: float
    whole: float
    gram: float
    bytes: float
    passes: float
    tile: int
    has_kernel: bool

    def multiply(self, multiply_adds: float, dtype: Any) -> float:
        """Seconds of a matrix product."""
        return multiply_adds / (self.short if jnp.dtype(dtype).itemsize < 4 else self.whole)

    def products(self, multiply_adds: float, dtype: Any) -> float:
        """Seconds of Gram matrices."""
        return self.multiply(multiply_adds, dtype) / self.gram

    def move(self, count: float) -> float:
        """Seconds of reading or writing bytes."""
        return count / self.bytes


# Sources: data sheets, less what good programs do not reach; of GPUs, steps of GPT-2's size on
# an H100 (benchmarks/results/2026-11-23_h100_clipping.json: Gram matrices at 260e12 of 400e12
# multiply-adds a second, materialised leaves 2.4 times their bytes); the CPU is two cores with wide
# vectors, where an entry that is written once and read twice takes 120 multiply-adds' time.
MACHINES = {
    "cpu": Machine(5e9, 5e10, 1.0, 5e9, 3.0, 256, False),
    "tpu": Machine(0.8e14, 1.4e13, 0.6, 0.7e12, 3.0, 128, True),
    "gpu": Machine(1.2e14, 0.9e13, 0.75, 1.5e12, 2.4, 128, True),
    "NVIDIA H100": Machine(3.0e14, 2.5e13, 0.75, 2.7e12, 2.4, 128, True),
    "NVIDIA H200": Machine(3.0e14, 2.5e13, 0.75, 3.8e12, 2.4, 128, True),
}


def this_machine() -> Machine:
    """The rates of the device that JAX uses by default."""
    platform = jax.default_backend()
    kind = jax.devices()[0].device_kind
    named = [m for name, m in MACHINES.items() if kind.startswith(name)]
    return named[0] if named else MACHINES.get(platform, MACHINES["gpu"])


def gram_seconds(sites: Sequence[Site], machine: Machine) -> float:
    """The Gram form, of one example: what it takes beyond a gradient without clipping.

    S T (T + t)/2 (A + B) multiply-adds for all T dense rows (t rows of a tile on the diagonal);
    for index rows and between them and dense ones the matrices are written and read. The
    narrower side is read and written once more, times the factors.
    """
    stack, _, left, right = sites[0].sizes
    kinds: dict[tuple[bool, bool, Any], int] = {}
    for site in sites:
        on_left = indexes(site) and site.operand_is_left
        kind = (on_left, indexes(site) and not on_left, jnp.dtype(site.output.dtype))
        kinds[kind] = kinds.get(kind, 0) + site.sizes[1]
    seconds = 0.0
    blocks = list(kinds.items())
    for n, ((*index, dtype), rows) in enumerate(blocks):
        is_dense = not any(index)
        pairs = rows * (rows + min(rows, machine.tile)) / 2 if is_dense else float(rows * rows)
        seconds += machine.products(pairs * _width(index, left, right), dtype)
        written = 0.0 if is_dense and machine.has_kernel else pairs
        for (*other, dtype_2), more in blocks[n + 1 :]:
            both = [a or b for a, b in zip(index, other, strict=True)]
            products = float(rows * more * _width(both, left, right))
            seconds += machine.products(products, max(dtype, dtype_2, key=lambda d: d.itemsize))
            written += rows * more
        seconds += machine.move(4 * FLOAT32 * written)
        if not (is_dense and machine.has_kernel):  # which reads while it multiplies
            seconds += machine.move(dtype.itemsize * rows * _width(index, left, right))
        seconds += machine.move(2 * dtype.itemsize * rows * min(left, right))
    return stack * seconds


def _width(index: Sequence[bool], left: int, right: int) -> int:
    """Numbers of a row of both sides; row numbers count as one."""
    return sum(1 if i else n for i, n in zip(index, (left, right), strict=True))


def materialised_seconds(sites: Sequence[Site], shape: Sequence[int], machine: Machine) -> float:
    """The materialised form: its gradient is written, and read for the norm and for the sum.

    Gradients of several uses, or of looked-up rows, are first added up in float32.
    """
    entries = math.prod(shape)
    moved = machine.passes * entry_dtype(sites).itemsize * entries
    if len(sites) > 1 or any(indexes(s) for s in sites):
        moved += 2.0 * FLOAT32 * entries * len(sites)
    return machine.move(moved)


def entry_dtype(sites: Sequence[Site]) -> Any:
    """What a materialised gradient is kept in: that of a single product, else float32.

    The product's gradient has its dtype whatever the leaf's, so nothing is lost.
    """
    (site, *others) = sites
    is_sum = len(site.scans) > len(site.view.stacked)
    short = jnp.dtype(site.output.dtype).itemsize < FLOAT32
    if others or is_sum or site.kind not in ("dot", "conv") or not short:
        return jnp.dtype(jnp.float32)
    return jnp.dtype(site.output.dtype)


def held_bytes(site: Site) -> float:
    """A site's operand and cotangent, of one example."""
    stack, rows, left, right = site.sizes
    operand, cotangent = (left, right) if site.operand_is_left else (right, left)
    operand = 1 if indexes(site) else operand
    return float(stack * rows * (operand + cotangent) * site.output.dtype.itemsize)


def indexes(site: Site) -> bool:
    """Whether the site's operand numbers rows."""
    return site.kind in ("gather", "dynamic_slice")


def loss_seconds(jaxpr: Any, machine: Machine, times: int = 1) -> float:
    """One forward pass of one example: its matrix products alone.

    A backward pass takes about twice that. What ``while`` does is counted once.
    """
    total = 0.0
    for eqn in jaxpr.eqns:
        inner = times * (eqn.params["length"] if eqn.primitive.name == "scan" else 1)
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            left = eqn.invars[0].aval.shape
            depth = math.prod(left[i] for i in contracted)
            out = eqn.outvars[0].aval
            total += machine.multiply(float(times * depth * out.size), out.dtype)
        elif eqn.primitive.name == "conv_general_dilated":
            kernel, out = eqn.invars[1].aval, eqn.outvars[0].aval
            features = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
            total += machine.multiply(float(times * out.size * kernel.size / features), out.dtype)
        total += sum(loss_seconds(body, machine, inner) for body in inner_jaxprs(eqn))
    return total
