"""Attention whose query heads have static options of their own, such as their noise.

Kernels take one set of options for all heads. So heads that follow one another with equal
options make one call; the counters of the noise are those of the whole.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt32

from pallas_kernels.attention import api
from pallas_kernels.attention.spec import AttentionSpec


class _Piece(NamedTuple):
    """Query heads with equal options, and the key heads that they read."""

    spec: AttentionSpec
    heads: slice
    kv_heads: slice

    def mask(self, mask: jax.Array | None) -> jax.Array | None:
        return mask if mask is None or mask.shape[1] == 1 else mask[:, self.heads]


def _pieces(specs: Sequence[AttentionSpec], groups: int) -> Iterator[_Piece]:
    """``specs`` cut so that a piece reads whole key heads, or a part of one.

    Example:
        >>> a, b = AttentionSpec(mode="exact", scale=1.0), AttentionSpec(mode="exact", scale=2.0)
        >>> [(p.heads.start, p.heads.stop) for p in _pieces([a, a, a, a, a, b], 2)]
        [(0, 4), (4, 5), (5, 6)]
    """
    start = 0
    for spec, run in itertools.groupby(specs):
        end = start + len(list(run))
        while start < end:
            stop = min(end, start + groups - start % groups)
            if start % groups == 0 and end - start >= groups:
                stop = end - end % groups
            yield _Piece(spec, slice(start, stop), slice(start // groups, -(-stop // groups)))
            start = stop


def attention_by_head(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    specs: Sequence[AttentionSpec],
    *,
    key_words: UInt32[Array, "8"] | None = None,
    mask: Bool[Array, "#B #N #T S"] | None = None,
    **options: Any,
) -> Float[Array, "B T N H"]:
    """:func:`pallas_kernels.attention.attention` with one spec for each query head.

    Head n is what a call with ``specs[n]`` for all heads gives it, its noise included.

    Args:
        query: [B, T, N, H].
        key: [B, S, K, H].
        value: like ``key``.
        specs: N of them.
        key_words: uint32[8], the ChaCha key of this call (noisy modes).
        mask: bool, broadcastable to [B, N, T, S].
        **options: ``lengths``, ``implementation``, ``interpret``, ``first_batch``,
            ``batch_in_all``.

    Raises:
        ValueError: for another number of specs, and as ``attention``.
    """
    if len(specs) != query.shape[2]:
        raise ValueError(
            f"{len(specs)} specs for {query.shape[2]} query heads: one each is needed."
        )
    parts = [
        api.attention(
            query[:, :, p.heads], key[:, :, p.kv_heads], value[:, :, p.kv_heads], p.spec,
            key_words=key_words, mask=p.mask(mask), first_head=p.heads.start, **options,
        )
        for p in _pieces(specs, query.shape[2] // key.shape[2])
    ]  # fmt: skip
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=2)
