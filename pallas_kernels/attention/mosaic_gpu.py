"""Attention for Hopper GPUs in Pallas Mosaic GPU: what can be asked of it, and the calls.

The kernels are in ``mosaic_gpu_factors.py`` (clipping), ``mosaic_gpu_rows.py``,
``mosaic_gpu_forward.py`` and ``mosaic_gpu_backward.py``.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.attention import (
    common,
    mosaic_gpu_backward,
    mosaic_gpu_backward_tiles,
    mosaic_gpu_factors,
    mosaic_gpu_forward,
    mosaic_gpu_rows,
    triton,
)
from pallas_kernels.attention.mosaic_gpu_factors import Factors
from pallas_kernels.attention.mosaic_gpu_forward import ROWS, Plan
from pallas_kernels.attention.spec import AttentionSpec

# For the tuning table, which looks where ``backward`` is.
BackwardBlocks = mosaic_gpu_backward.Blocks

__all__ = [
    "BackwardBlocks", "Blocks", "backward", "forward", "row_dots", "sums", "unsupported",
    "value_scale",
]  # fmt: skip

_DTYPES = (jnp.bfloat16, jnp.float16)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Block sizes of the forward kernel; 0 means the default for the call.

    Attributes:
        keys: keys of one tile, a multiple of 64 that divides ``common.HOPPER_CHUNK``.
        stages: tiles of keys and values in flight.
        warpgroups: compute warpgroups of a block, 1 to 3.
    """

    keys: int = 0
    stages: int = 2
    warpgroups: int = 0


def unsupported(spec: AttentionSpec, query: Any, key: Any, *, has_mask: bool) -> str | None:
    """See :class:`pallas_kernels.attention.fused.Backend`."""
    if query.dtype not in _DTYPES:
        return f"{query.dtype} operands; the matrix units take bfloat16 and float16"
    if spec.scale <= 0:
        return f"scale {spec.scale} is not positive"
    num_keys = key.shape[1]
    if spec.mode == "record" and numerator_unit(spec, num_keys) > common.largest_unit(
        spec, num_keys
    ):
        # The sensitivity counts on a unit that is small beside the clip.
        return f"numerator_std {spec.numerator_std} is too large for 32-bit sums"
    if max(query.shape[1], num_keys) > mosaic_gpu_backward_tiles.MOST:
        return f"more than {mosaic_gpu_backward_tiles.MOST} rows or keys"
    return None


def value_scale(value: jax.Array, spec: AttentionSpec) -> Factors:
    """See :class:`pallas_kernels.attention.fused.Backend`."""
    return mosaic_gpu_factors.value_factors(_pad_rows(value), spec.value_clip)


def row_dots(first: jax.Array, second: jax.Array) -> jax.Array:
    """See :class:`pallas_kernels.attention.fused.Backend`."""
    dots = mosaic_gpu_rows.row_dots(_pad_rows(first), _pad_rows(second))
    return dots[:, :, : first.shape[1]]


def backward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    value_scale: Factors | None,
    lengths: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    d_out: jax.Array,
    spec: AttentionSpec,
    *,
    blocks: mosaic_gpu_backward.Blocks | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See :class:`pallas_kernels.attention.fused.Backend`.

    For head dimensions above 128 the gradients are the Triton kernels'.
    """
    scale = None
    if value_scale is not None:
        # Those that the forward pass multiplied with.
        scale = value_scale.scale[:, :, : key.shape[1]].astype(jnp.float32)
    operands = (query, key, value, scale, lengths, lse, delta, d_out, spec)
    if query.shape[3] > 128:
        return triton.backward(*operands, interpret=interpret)
    return mosaic_gpu_backward.backward(*operands, blocks=blocks, interpret=interpret)


def forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    value_scale: Factors | None,
    noise: jax.Array | None,
    lengths: jax.Array,
    spec: AttentionSpec,
    *,
    blocks: Blocks | None = None,
    interpret: bool = False,
    keep_clean: bool = True,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """See :class:`pallas_kernels.attention.fused.Backend`."""
    if interpret:
        raise ValueError(
            "interpret=True: the Mosaic GPU interpreter knows no register operands of matrix "
            "products; run these kernels on a Hopper GPU."
        )
    plan = make_plan(query, key, spec, blocks or Blocks())
    num_rows = query.shape[1]
    query, key, value = (_pad_rows(x) for x in (query, key, value))
    out, stat, clean = mosaic_gpu_forward.launch(
        spec, plan, query, key, value, value_scale, noise, lengths,
        keep_clean=keep_clean and spec.mode == "sequence",
    )  # fmt: skip
    stat = lax.bitcast_convert_type(stat, jnp.float32)
    return out[:, :num_rows], stat[:, :, :num_rows], None if clean is None else clean[:, :num_rows]


# A call's last tile of keys is summed by itself, so that the integers depend on where calls end.
SUMS_END_TOGETHER = True


def sums(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    value_scale: Factors,
    lengths: jax.Array,
    spec: AttentionSpec,
    units: common.Units,
    *,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """See :class:`pallas_kernels.attention.fused.Backend`."""
    if interpret:
        raise ValueError("interpret=True: run these kernels on a Hopper GPU.")
    spec = dataclasses.replace(spec, grid=None)
    plan = dataclasses.replace(
        make_plan(query, key, spec, blocks or Blocks()),
        unit=units.numerator, row_unit=units.denominator, sums_only=True,
    )  # fmt: skip
    num_rows = query.shape[1]
    query, key, value = (_pad_rows(x) for x in (query, key, value))
    # Nobody reads these.
    noise = jnp.zeros((query.shape[0], 11), jnp.uint32)
    numerator, denominator, _ = mosaic_gpu_forward.launch(
        spec, plan, query, key, value, value_scale, noise, lengths, keep_clean=False
    )
    return numerator[:, :num_rows], denominator[:, :, :num_rows]


def make_plan(query: Any, key: Any, spec: AttentionSpec, blocks: Blocks) -> Plan:
    """The sizes of a call: those asked for, and defaults for the others."""
    (_, num_rows, _, depth), num_keys = query.shape, key.shape[1]
    keys, warpgroups = blocks.keys, blocks.warpgroups
    if depth > 128:
        # The bank of a wide head leaves room for one warpgroup's rows.
        keys, warpgroups = keys or 64, warpgroups or (1 if spec.is_noisy else 2)
    keys, warpgroups = keys or 128, warpgroups or 2
    unit = row_unit = 1.0
    if spec.is_noisy:
        unit = numerator_unit(spec, num_keys)
        row_unit = max(
            common.fixed_point_unit(1.0, max(num_keys, 2**10)),
            common.fixed_point_unit(max(8.0 * spec.denominator_std, 1e-30), 1),
        )
    return Plan(
        keys=keys,
        stages=blocks.stages,
        warpgroups=warpgroups,
        tiles=pl.cdiv(num_keys, keys),
        row_tiles=pl.cdiv(num_rows, warpgroups * ROWS),
        unit=unit,
        row_unit=row_unit,
    )


def numerator_unit(spec: AttentionSpec, num_keys: int) -> float:
    """The power of two whose multiples the bank counts.

    The whole sum and the noise (8 standard deviations) must fit 31 bits, and the sum of
    one chunk 22 bits and a sign.
    """
    noise = common.fixed_point_unit(max(8.0 * spec.numerator_std, 1e-30), 1)
    return max(noise, common.largest_unit(spec, num_keys)) if spec.mode == "record" else noise


def _pad_rows(x: jax.Array) -> jax.Array:
    """The copy engine wants row counts that are multiples of 8."""
    missing = -x.shape[1] % 8
    return jnp.pad(x, [(0, 0), (0, missing), (0, 0), (0, 0)]) if missing else x
