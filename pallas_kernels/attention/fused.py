"""Fused kernels as differentiable functions: padding, clipping factors, ``vmap``.

A back end is a module with ``unsupported``, ``forward`` and ``backward`` over [B, T, N, H]
arrays; what they compute is written down at :class:`Backend`. Everything that is the
same for all of them is here, once.
"""

import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, UInt32

from pallas_kernels import batching
from pallas_kernels.attention.common import Units
from pallas_kernels.attention.partitioning import partitioned
from pallas_kernels.attention.spec import AttentionSpec

# Head dimensions that kernels are written for; others are padded with zeros.
HEAD_DIMS = (64, 128, 256)

# Statistic of a row that sees no key: exp(x − this) is zero for every logit.
NOTHING_SEEN = 1e30


def padded_head_dim(depth: int) -> int:
    """The head dimension that kernels see."""
    return next(d for d in HEAD_DIMS if d >= depth)


class Backend(Protocol):
    """What a module of kernels provides.

    ``value_scale`` is what the back end's function of that name returned: the clipping
    factors of the value rows (None in exact mode); a row with the factor 0 counts as zero
    even if it holds NaN. ``noise`` is
    uint32[B, 11]: the call's key, the first row's counter, the first head's counter and the
    batch counter; the kernels derive the children ``common.NUMERATOR`` and
    ``common.DENOMINATOR`` of the key. ``lengths`` is int32[B].
    """

    def unsupported(
        self, spec: AttentionSpec, query: Any, key: Any, *, has_mask: bool
    ) -> str | None:
        """Why this call is not possible on any device; None if it is."""

    def value_scale(self, value: jax.Array, spec: AttentionSpec) -> Any:
        """The factors of :func:`common.row_scales` in the form that the kernels take.

        For most, float32 [B, K, S]: :func:`common.value_scale`.
        """

    def row_dots(self, first: jax.Array, second: jax.Array) -> jax.Array:
        """Products of corresponding rows, float32 [B, N, T]; usually :func:`common.row_dots`."""

    def forward(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        value_scale: Any,
        noise: jax.Array | None,
        lengths: jax.Array,
        spec: AttentionSpec,
        *,
        blocks: Any = None,
        interpret: bool = False,
        keep_clean: bool = True,
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """The release, a float32 [B, N, T] statistic, and the output before the noise.

        The statistic is the denominator that was divided by (record mode) or the
        log-sum-exp of the row's logits. The third is for the gradient of sequence mode, and
        None otherwise or without ``keep_clean``.
        """

    def sums(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        value_scale: Any,
        lengths: jax.Array,
        spec: AttentionSpec,
        units: Units,
        *,
        blocks: Any = None,
        interpret: bool = False,
    ) -> tuple[jax.Array, jax.Array]:
        """Record mode's N and L without noise, for a caller who adds those of other keys.

        int32 [B, T, N, H] and [B, N, T], in ``units``. At most ``common.CHUNK`` keys
        (``HOPPER_CHUNK`` on Hopper) are summed in floating point.
        """

    def backward(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        value_scale: Any,
        lengths: jax.Array,
        lse: jax.Array,
        delta: jax.Array,
        d_out: jax.Array,
        spec: AttentionSpec,
        *,
        blocks: Any = None,
        interpret: bool = False,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Gradients for query, key and value.

        With p = exp(min(x, U) − lse) and dp = d_out·v̄ the logits' gradient is
        p (dp − delta), zero where the bound clamps; the gradient pᵀ·d_out of the clipped
        value v̄ becomes that of the value by :func:`common.through_clip`.
        """


def gradient_statistics(
    spec: AttentionSpec, stat: Float32[Array, "b n t"], dots: Float32[Array, "b n t"]
) -> tuple[Float32[Array, "b n t"], Float32[Array, "b n t"]]:
    """``lse`` and ``delta`` of :meth:`Backend.backward`.

    Args:
        spec: static options.
        stat: the statistic of :meth:`Backend.forward`.
        dots: the products of the rows of the output (before sequence mode's noise) and of
            its gradient.
    """
    if spec.mode != "record":
        return stat, dots
    # At the floor the denominator is a constant and passes no gradient.
    dots = jnp.where(stat > jnp.float32(spec.denominator_floor), dots, 0.0)
    return jnp.log(stat) + jnp.float32(spec.logit_bound), dots


def pack_noise(
    key_words: UInt32[Array, "8"],
    counters: UInt32[Array, "b"],
    *,
    first_row: jax.Array | int = 0,
    first_head: jax.Array | int = 0,
) -> UInt32[Array, "b 11"]:
    """Key and counters of a call, one row for each batch element."""
    first = jnp.stack([jnp.asarray(x).astype(jnp.uint32) for x in (first_row, first_head)])
    words = jnp.concatenate([key_words, first])
    every = jnp.broadcast_to(words, (counters.shape[0], words.shape[0]))
    return jnp.concatenate([every, counters[:, None]], axis=1)


def attention(
    backend: Backend,
    query: Float[Array, "b t n h"],
    key: Float[Array, "b s k h"],
    value: Float[Array, "b s k h"],
    spec: AttentionSpec,
    *,
    noise: UInt32[Array, "b 11"] | None,
    lengths: jax.Array | None,
    blocks: tuple[Any, Any] = (None, None),
    interpret: bool = False,
) -> Float[Array, "b t n h"]:
    """Attention by one back end, differentiable in query, key and value.

    Args:
        backend: the module of kernels.
        query: [B, T, N, H].
        key: [B, S, K, H].
        value: like ``key``.
        spec: static options.
        noise: from :func:`pack_noise`; None in exact mode.
        lengths: [B] or None.
        blocks: block sizes forward and backward; None takes the back end's own.
        interpret: run the kernels in Pallas's interpreter.

    Returns:
        [B, T, N, H].
    """
    batch, depth, num_keys = query.shape[0], query.shape[3], key.shape[1]
    padded = padded_head_dim(depth)
    if padded != depth:
        pad = [(0, 0)] * 3 + [(0, padded - depth)]
        query, key, value = (jnp.pad(x, pad) for x in (query, key, value))
    if lengths is None:
        # A constant: a broadcast would be a launch of its own on a GPU.
        lengths = jnp.asarray(np.full((batch,), num_keys, np.int32))
    else:
        lengths = jnp.clip(lengths, 0, num_keys).astype(jnp.int32)
    out = _differentiable(backend, spec, blocks, interpret, query, key, value, noise, lengths)
    return out[..., :depth]


_folded = functools.partial(batching.folded, partitioned=partitioned)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _differentiable(
    backend: Any,
    spec: AttentionSpec,
    blocks: tuple[Any, Any],
    interpret: bool,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    noise: jax.Array | None,
    lengths: jax.Array,
) -> jax.Array:
    scale = _value_scale(backend, value, spec)
    run = _folded(backend, "forward", spec, blocks=blocks[0], interpret=interpret, keep_clean=False)
    return run(query, key, value, scale, noise, lengths)[0]


def _forward(
    backend: Any,
    spec: AttentionSpec,
    blocks: tuple[Any, Any],
    interpret: bool,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    noise: jax.Array | None,
    lengths: jax.Array,
) -> tuple[jax.Array, tuple[Any, ...]]:
    scale = _value_scale(backend, value, spec)
    run = _folded(backend, "forward", spec, blocks=blocks[0], interpret=interpret)
    out, stat, clean = run(query, key, value, scale, noise, lengths)
    kept = out if clean is None else clean
    return out, (query, key, value, scale, lengths, kept, stat)


def _backward(
    backend: Any,
    spec: AttentionSpec,
    blocks: tuple[Any, Any],
    interpret: bool,
    residuals: tuple[Any, ...],
    d_out: jax.Array,
) -> tuple[jax.Array | None, ...]:
    query, key, value, scale, lengths, out, stat = residuals
    delta = _folded(backend, "row_dots")(d_out, out)
    lse, delta = gradient_statistics(spec, stat, delta)
    run = _folded(backend, "backward", spec, blocks=blocks[1], interpret=interpret)
    dq, dk, dv = run(query, key, value, scale, lengths, lse, delta, d_out)
    return dq, dk, dv, None, None


_differentiable.defvjp(_forward, _backward)


def _value_scale(backend: Any, value: jax.Array, spec: AttentionSpec) -> Any:
    return _folded(backend, "value_scale", spec)(value) if spec.is_noisy else None
