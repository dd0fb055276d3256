"""The one entry point: checks, the choice of an implementation, and the call."""

import importlib
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from pallas_kernels.attention import common, fused, reference, tuning, xla
from pallas_kernels.attention.spec import AttentionSpec
from pallas_kernels.devices import PLATFORMS
from pallas_kernels.devices import wrong_device as _wrong_device

Implementation = Literal["mosaic_gpu", "triton", "mosaic_tpu", "xla", "reference"]

# Modules of kernels, best first. They are imported when first used: their compilers take a
# second to load.
_KERNELS = tuple(PLATFORMS)
_PLAIN: dict[str, Callable[..., jax.Array]] = {
    "xla": xla.attention,
    "reference": reference.attention,
}
_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def implementations() -> tuple[str, ...]:
    """The names that ``implementation=`` accepts, best first."""
    return (*_KERNELS, *_PLAIN)


def _module(name: str) -> Any:
    return importlib.import_module(f"pallas_kernels.attention.{name}")


def explain(
    query: Any, key: Any, spec: AttentionSpec, *, has_mask: bool = False
) -> list[tuple[str, str | None]]:
    """Every implementation, best first, with the reason why it cannot do this call.

    Args:
        query: an array or a ``jax.ShapeDtypeStruct`` of shape [B, T, N, H].
        key: likewise, [B, S, K, H].
        spec: static options of the call.
        has_mask: whether a ``mask`` array is given.

    Returns:
        Pairs of a name and a reason; None for a reason means that it can, and the first
        such is what ``implementation=None`` takes.
    """
    reasons: list[tuple[str, str | None]] = []
    for name in _KERNELS:
        reason = _wrong_device(name)
        reasons.append((name, reason or _unsupported(name, query, key, spec, has_mask)))
    return [*reasons, *((name, None) for name in _PLAIN)]


def _unsupported(name: str, query: Any, key: Any, spec: AttentionSpec, mask: bool) -> str | None:
    if query.shape[3] > max(fused.HEAD_DIMS):
        return f"head dimension {query.shape[3]} is above {max(fused.HEAD_DIMS)}"
    if mask:
        return "a mask array is given; kernels know causal, window and lengths only"
    reason: str | None = _module(name).unsupported(spec, query, key, has_mask=mask)
    return reason


def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    spec: AttentionSpec,
    *,
    key_words: UInt32[Array, "8"] | None = None,
    lengths: Int[Array, "B"] | None = None,
    mask: Bool[Array, "#B #N #T S"] | None = None,
    implementation: Implementation | None = None,
    interpret: bool = False,
    first_head: jax.Array | int = 0,
    first_batch: jax.Array | int = 0,
    batch_in_all: int | None = None,
) -> Float[Array, "B T N H"]:
    """Attention of ``query`` over ``key`` and ``value``; see :class:`AttentionSpec`.

    Args:
        query: [B, T, N, H], float32, bfloat16 or float16.
        key: [B, S, K, H], same dtype; N is a multiple of K.
        value: like ``key``.
        spec: static options.
        key_words: uint32[8], the ChaCha key of this call (noisy modes).
        lengths: [B], how many keys of each batch element exist.
        mask: bool, broadcastable to [B, N, T, S]; False hides a column.
        implementation: a name from :func:`implementations`; None takes the first that
            can do the call on this machine (:func:`explain` tells which, and why).
        interpret: run the kernels named by ``implementation`` in Pallas's interpreter,
            on any device. Slow; for tests.
        first_head: the first head's counter in the noise, for a call on some of the heads.
        first_batch: the first batch element's, for a call on some of them.
        batch_in_all: how many batch elements the calls have together; None for this one's.

    Returns:
        [B, T, N, H] in the dtype of ``query``.

    Raises:
        ValueError: for shapes, dtypes or names that do not fit.
    """
    check_arguments(query, key, value, spec, lengths, mask, implementation, interpret=interpret)
    if spec.is_noisy and key_words is None:
        raise ValueError(f"key_words=None: mode {spec.mode!r} adds noise and needs a key.")
    name = implementation or _best(query, key, spec, mask is not None)
    counters = None
    if key_words is not None and spec.is_noisy:
        operands = [x for x in (query, key, value, lengths, mask) if x is not None]
        counters = common.batch_counters(
            key_words, query.shape[0], operands, first=first_batch, in_all=batch_in_all
        )
    if name in _PLAIN:
        noise = None
        if counters is not None:
            assert key_words is not None
            noise = common.Noise(key_words, counters, first_head)
        return _PLAIN[name](query, key, value, spec, noise=noise, lengths=lengths, mask=mask)
    packed = None
    if counters is not None:
        assert key_words is not None
        packed = fused.pack_noise(key_words, counters, first_head=first_head)
    padded = jax.ShapeDtypeStruct(
        (*query.shape[:3], fused.padded_head_dim(query.shape[3])), query.dtype
    )
    blocks = (None, None)
    if not interpret:
        kind = jax.devices()[0].device_kind
        blocks = tuning.tuned_blocks(name, padded, key, spec, device_kind=kind)
    return fused.attention(
        _module(name), query, key, value, spec, noise=packed, lengths=lengths,
        blocks=blocks, interpret=interpret,
    )  # fmt: skip


def _best(query: jax.Array, key: jax.Array, spec: AttentionSpec, has_mask: bool) -> str:
    reasons = explain(query, key, spec, has_mask=has_mask)
    return next(name for name, reason in reasons if reason is None)


def partial_backend(
    query: Any,
    key: Any,
    spec: AttentionSpec,
    implementation: str | None,
    *,
    interpret: bool = False,
) -> Any:
    """The module whose ``sums`` (record mode), ``forward`` (exact) and ``backward`` do a call.

    For callers that put attention together from parts of the keys. ``'xla'`` is
    :mod:`pallas_kernels.attention.chunked` here.

    Args:
        query: an array or ``jax.ShapeDtypeStruct`` [B, T, N, H] of one part.
        key: likewise, [B, S, K, H].
        spec: static options.
        implementation: a name, or None for the best on this machine.
        interpret: as for :func:`attention`.

    Raises:
        ValueError: for a name that cannot do it; the message says why.
    """
    for name in _KERNELS if implementation is None else (implementation,):
        if name not in _KERNELS:
            break
        reason = None if interpret else _wrong_device(name)
        reason = reason or _unsupported(name, query, key, spec, False)
        if reason is None:
            return _module(name)
        if implementation is not None:
            raise ValueError(
                f"implementation={implementation!r} cannot do this call: {reason}. "
                "None picks one that can."
            )
    if implementation not in (None, "xla"):
        allowed = ", ".join(repr(name) for name in (*_KERNELS, "xla"))
        raise ValueError(f"implementation={implementation!r}: allowed are None, {allowed}.")
    return _module("chunked")


def check_arguments(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    spec: AttentionSpec,
    lengths: jax.Array | None,
    mask: jax.Array | None,
    implementation: str | None,
    *,
    interpret: bool = False,
) -> None:
    """Raises ValueError where :func:`attention` would, before a key is used up."""
    if implementation is not None and implementation not in implementations():
        raise ValueError(
            f"implementation={implementation!r}: allowed are None, "
            + ", ".join(repr(name) for name in implementations())
            + "."
        )
    if interpret and implementation not in _KERNELS:
        raise ValueError(
            f"interpret=True with implementation={implementation!r}: name the kernels to "
            f"interpret, one of {tuple(_KERNELS)}."
        )
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != 4:
            raise ValueError(f"{name} has shape {x.shape}: four axes are needed, [B, T, N, H].")
        if x.dtype not in _DTYPES:
            raise ValueError(f"{name} is {x.dtype}: allowed are float32, bfloat16 and float16.")
        if 0 in x.shape:
            raise ValueError(f"{name} has shape {x.shape}: no axis may be empty.")
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            f"query, key and value are {query.dtype}, {key.dtype} and {value.dtype}: "
            "one dtype is needed."
        )
    batch, num_rows, heads, depth = query.shape
    num_keys, kv_heads = key.shape[1:3]
    if key.shape != value.shape:
        raise ValueError(f"key has shape {key.shape} and value {value.shape}: they must agree.")
    if key.shape[0] != batch or key.shape[3] != depth:
        raise ValueError(
            f"query has shape {query.shape} and key {key.shape}: "
            "the batch (first) and the head dimension (last) must agree."
        )
    if heads % kv_heads:
        raise ValueError(
            f"query has {heads} heads and key {kv_heads}: the first must be a multiple "
            "of the second."
        )
    if lengths is not None:
        if lengths.shape != (batch,):
            raise ValueError(f"lengths has shape {lengths.shape}: ({batch},) is needed.")
        if not jnp.issubdtype(lengths.dtype, jnp.integer):
            raise ValueError(f"lengths is {lengths.dtype}: an integer dtype is needed.")
    if mask is not None:
        full = (batch, heads, num_rows, num_keys)
        if mask.dtype != jnp.bool_:
            raise ValueError(f"mask is {mask.dtype}: bool is needed (True keeps a column).")
        fits = mask.ndim == 4 and all(m in (1, f) for m, f in zip(mask.shape, full, strict=True))
        if not fits:
            raise ValueError(f"mask has shape {mask.shape}: it must broadcast to {full}.")
    if spec.is_noisy and query.dtype == jnp.float16 and spec.value_clip > 60000.0:
        raise ValueError(
            f"value_clip={spec.value_clip}: a float16 value holds at most 65504; "
            "scale the values down or use another dtype."
        )
    if implementation in _KERNELS:
        reason = None if interpret else _wrong_device(implementation)
        reason = reason or _unsupported(implementation, query, key, spec, mask is not None)
        if reason:
            raise ValueError(
                f"implementation={implementation!r} cannot do this call: {reason}. "
                "None picks one that can."
            )
