"""Gaussian noise added to an array: one read and one write of it, whatever its size.

A Triton kernel on NVIDIA GPUs makes the noise in registers. Elsewhere XLA adds
:func:`~pallas_kernels.prng.normal_stream`. Both are the same stream, float32, rounded to
the same grid; their cosines and logarithms may differ in the last digits.
"""

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, UInt32

from pallas_kernels.devices import wrong_device
from pallas_kernels.prng.chacha import random_block
from pallas_kernels.prng.normal import STREAM_TILE, block_normals, normal_stream
from pallas_kernels.rounding import round_half_even

Implementation = Literal["triton", "xla"]
_IMPLEMENTATIONS = ("triton", "xla")
# Blocks of a program: four tiles of the stream, so that a thread makes forty numbers.
_BLOCKS = 512
_WARPS = 4
_MOST = 2**31 - _BLOCKS * 10


def add_normal(
    x: Float[Array, "*s"],
    key_words: UInt32[Array, "8"],
    nonce: tuple[int, int, int],
    *,
    std: float,
    spacing: float,
    divisor: float = 1.0,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> Float[Array, "*s"]:
    """round((x + std·g) / spacing) · spacing / divisor, g standard normals.

    The arithmetic is float32 and the result has the dtype of ``x``.

    Args:
        x: floating point.
        key_words: uint32[8], a key derived for this purpose alone.
        nonce: three numbers below 2³²: the stream, never used twice with a key.
        std: standard deviation, above 0.
        spacing: a power of two, the public grid.
        divisor: above 0.
        implementation: ``'triton'``, ``'xla'`` or None, which takes the kernel on NVIDIA
            GPUs that can run it.
        interpret: run the kernel in Pallas's interpreter, on any device. Slow; for tests.

    Raises:
        ValueError: for a number or a name that is not allowed, or a kernel that cannot run.

    Example:
        >>> x = add_normal(jnp.zeros(5), jnp.zeros(8, jnp.uint32), (0, 0, 0), std=1.0, spacing=0.5)
        >>> bool((x == jnp.round(x * 2) / 2).all())
        True
    """
    for name, value in (("std", std), ("spacing", spacing), ("divisor", divisor)):
        if not 0.0 < value < math.inf:
            raise ValueError(f"{name}={value!r}: allowed is a finite number > 0.")
    if math.frexp(spacing)[0] != 0.5:
        raise ValueError(f"spacing={spacing!r}: allowed is a power of two.")
    if implementation is not None and implementation not in _IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}: allowed are {_IMPLEMENTATIONS}.")
    reason = None if interpret else wrong_device("triton")
    if x.size >= _MOST:
        reason = reason or f"{x.size} numbers; their places are counted in 31 bits"
    if implementation == "triton" and reason is not None:
        raise ValueError(f"implementation='triton' cannot do this call: {reason}.")
    if implementation == "xla" or (reason is not None and implementation is None) or x.size == 0:
        g = normal_stream(key_words, x.size, nonce).reshape(x.shape)
        return _release(x, g, std, spacing, divisor)
    finish = functools.partial(_release, std=std, spacing=spacing, divisor=divisor)
    flat = x.reshape(-1)
    noisy = pl.pallas_call(
        functools.partial(_kernel, size=flat.size, nonce=nonce, finish=finish),
        out_shape=jax.ShapeDtypeStruct(flat.shape, flat.dtype),
        grid=(pl.cdiv(flat.size, _BLOCKS * 10),),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * 2,
        out_specs=pl.BlockSpec(memory_space=pl.ANY),
        compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=1),
        input_output_aliases={0: 0},
        interpret=interpret,
        name="add_normal",
    )(flat, key_words)
    return noisy.reshape(x.shape)


def _release(x: jax.Array, g: jax.Array, std: float, spacing: float, divisor: float) -> jax.Array:
    noisy = x.astype(jnp.float32) + jnp.float32(std) * g
    released = round_half_even(noisy * jnp.float32(1.0 / spacing)) * jnp.float32(spacing)
    return (released / jnp.float32(divisor)).astype(x.dtype)


def _kernel(x_ref: Any, key_ref: Any, out_ref: Any, *, size: int, nonce: Any, finish: Any) -> None:
    block = pl.program_id(0) * _BLOCKS + jnp.arange(_BLOCKS, dtype=jnp.int32)
    start = jax.lax.shift_right_logical(block, 7) * STREAM_TILE + (block & 127)
    key = [key_ref[i] for i in range(8)]
    counters = [block.astype(jnp.uint32), *(jnp.uint32(n) for n in nonce)]
    for k, g in enumerate(block_normals(random_block(key, counters))):
        place = start + 128 * k
        mask = place < size
        x = plgpu.load(x_ref.at[place], mask=mask, other=0.0)
        plgpu.store(out_ref.at[place], finish(x, g), mask=mask)
