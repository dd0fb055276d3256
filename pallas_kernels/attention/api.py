"""The one entry point: checks, the choice of an implementation, and the call."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from pallas_kernels.attention import common, reference, xla
from pallas_kernels.attention.spec import AttentionSpec

Implementation = Literal["reference", "xla"]

_IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "xla": xla.attention,
    "reference": reference.attention,
}
_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def implementations() -> tuple[str, ...]:
    """The names that ``implementation=`` accepts, the default first."""
    return tuple(_IMPLEMENTATIONS)


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
        implementation: a name from :func:`implementations`; None picks one.

    Returns:
        [B, T, N, H] in the dtype of ``query``.

    Raises:
        ValueError: for shapes, dtypes or names that do not fit.
    """
    check_arguments(query, key, value, spec, lengths, mask, implementation)
    if spec.is_noisy and key_words is None:
        raise ValueError(f"key_words=None: mode {spec.mode!r} adds noise and needs a key.")
    run = _IMPLEMENTATIONS[implementation or "xla"]
    noise = None
    if spec.is_noisy:
        assert key_words is not None
        operands = [x for x in (query, key, value, lengths, mask) if x is not None]
        counters = common.batch_counters(key_words, query.shape[0], operands)
        noise = (key_words, counters)
    return run(query, key, value, spec, noise=noise, lengths=lengths, mask=mask)


def check_arguments(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    spec: AttentionSpec,
    lengths: jax.Array | None,
    mask: jax.Array | None,
    implementation: str | None,
) -> None:
    """Raises ValueError where :func:`attention` would, before a key is used up."""
    if implementation is not None and implementation not in _IMPLEMENTATIONS:
        raise ValueError(
            f"implementation={implementation!r}: allowed are None, "
            + ", ".join(repr(name) for name in _IMPLEMENTATIONS)
            + "."
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
