"""What the Triton kernels, forward and backward, compute on one tile of logits.

Logits are in units of ln 2 here: the hardware's exponential has base 2.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.attention import tile
from pallas_kernels.attention.spec import AttentionSpec
from pallas_kernels.rounding import round_half_even

LOG2_E = 1.4426950408889634


def check_blocks(blocks: Any) -> None:
    """Raises ValueError where a field of the dataclass ``blocks`` has no sensible size."""
    for field in dataclasses.fields(blocks):
        size = getattr(blocks, field.name)
        allowed: tuple[int, ...] = (16, 32, 64, 128, 256, 512)
        if field.name.endswith("warps"):
            allowed = (1, 2, 4, 8, 16)
        elif field.name.endswith("stages"):
            allowed = (1, 2, 3, 4, 5)
        if size not in allowed:
            raise ValueError(f"{field.name}={size!r}: allowed are {allowed}.")


def load(ref: Any, mask: jax.Array | None, other: float = 0.0) -> jax.Array:
    """The array behind ``ref``, and ``other`` where the mask is False.

    Elements that are masked out are not read: they may lie beyond the array or hold NaN.
    """
    if mask is None:
        return plgpu.load(ref)
    return plgpu.load(ref, mask=mask, other=other)


def dot(a: jax.Array, b: jax.Array, *, transpose_b: bool = False) -> jax.Array:
    """The matrix product in float32; float32 operands are multiplied as they are."""
    return jax.lax.dot_general(
        a,
        b,
        dimension_numbers=(((1,), (int(transpose_b),)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def visible_columns(
    spec: AttentionSpec, rows: jax.Array, length: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The columns that rows see: each row from its ``first`` up to before its ``end``.

    Causal masks, windows and lengths all leave one interval.
    """
    before, after = tile.reach(spec)
    first = jnp.zeros_like(rows) if before is None else jnp.maximum(rows - before, 0)
    end = jnp.broadcast_to(length, rows.shape)
    return first, end if after is None else jnp.minimum(end, rows + (after + 1))


def is_seen(spec: AttentionSpec, columns: jax.Array, first: jax.Array, end: jax.Array) -> jax.Array:
    """Whether columns lie in the intervals of :func:`visible_columns`."""
    seen = columns < end
    return seen if spec.window is None else seen & (columns >= first)


def bounded_weights(logits: jax.Array, bound: jax.Array, seen: jax.Array) -> jax.Array:
    """exp(min(x, U) − U), at most 1; 0 where not seen or NaN."""
    # Bounding the weight bounds the logit, and exp may round up above 1, which the
    # sensitivity counts on.
    weights = jnp.minimum(jnp.exp2(logits - bound), 1.0)
    return jnp.where(seen & ~jnp.isnan(logits), weights, 0.0)


def round_to_grid(x: jax.Array, spacing: float) -> jax.Array:
    """``x`` rounded to a multiple of ``spacing``, a power of two; 0 leaves it alone."""
    if spacing == 0.0:
        return x
    return round_half_even(x * jnp.float32(1.0 / spacing)) * jnp.float32(spacing)


def to_fixed_point(x: jax.Array, unit: float) -> jax.Array:
    """``x`` in multiples of ``unit``, a power of two, as int32."""
    return round_half_even(x * jnp.float32(1.0 / unit)).astype(jnp.int32)
