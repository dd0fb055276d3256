"""Private attention inside Flax's own attention layers.

``flax.linen.MultiHeadDotProductAttention`` and ``flax.nnx.MultiHeadAttention`` take the
function that attends as an argument. :func:`attention_fn` makes one that is private, and
:func:`noise_key` gives it the keys that such a layer has no argument for::

    layer = flax.linen.MultiHeadDotProductAttention(
        num_heads=4, attention_fn=dpfa_jax.attention_fn(privacy))

    @jax.jit
    def apply(variables, x, key):
        with dpfa_jax.noise_key(key):
            return layer.apply(variables, x)

``dpfa_jax.linen`` and ``dpfa_jax.nnx`` have layers that take the key the way Flax passes
other random keys; they use the same two pieces.
"""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from dpfa_jax import keys
from dpfa_jax.attention import AttentionPrivacy, dp_dot_product_attention
from dpfa_jax.device_axes import DeviceAxes

Implementation = Literal["reference", "xla"]


# --- which key makes the noise ----------------------------------------------------------


@dataclasses.dataclass
class _Source:
    key: Key[Array, ""]
    device_axes: DeviceAxes | None = None
    calls: int = 0


_source: contextvars.ContextVar[_Source | None] = contextvars.ContextVar(
    "dpfa_jax noise key", default=None
)


@contextlib.contextmanager
def noise_key(key: Key[Array, ""], *, device_axes: DeviceAxes | None = None) -> Iterator[None]:
    """Gives every private attention inside the ``with`` block its own noise key.

    For layers that have no argument for a key, see :func:`attention_fn`. The i-th noisy
    call inside the block uses ``jax.random.fold_in(key, i)``, in the order of the calls.
    Blocks nest; the innermost counts. Enter the block inside the function that is
    jitted, scanned or checkpointed, with the key as an argument of that function.

    Args:
        key: a key<chacha20> array of shape (), for this block alone.
        device_axes: see :func:`dpfa_jax.dp_dot_product_attention`.

    Raises:
        ValueError: if the key is missing, unsuited or used before, or if it comes from
            outside the function being traced, so that each execution would repeat the
            noise.

    Example:
        >>> privacy = AttentionPrivacy(unit="sequence", noise_multiplier=1.0, value_clip=1.0,
        ...                            adjacency="replace_one")
        >>> attend = attention_fn(privacy)
        >>> x = jnp.ones((4, 2, 8))
        >>> with noise_key(keys.SecureKey.generate().key()):
        ...     first, second = attend(x, x, x), attend(x, x, x)
        >>> bool((first == second).any())
        False
    """
    key = keys.check_noise_key(key, "key")
    if key.shape != ():
        raise ValueError(f"key has shape {key.shape}: one key is needed, shape ().")
    keys.consume(key, "noise_key")
    token = _source.set(_Source(key, device_axes))
    try:
        yield
    finally:
        _source.reset(token)


def _next_key() -> tuple[Key[Array, ""], DeviceAxes | None]:
    """The key of the next noisy call, and where its device's part lies."""
    source = _source.get()
    if source is None:
        raise ValueError(
            "attention_fn adds noise and needs a key: call the layer inside "
            "`with dpfa_jax.noise_key(key):`."
        )
    keys.refuse_frozen_key(source.key, "noise_key")
    source.calls += 1
    return jax.random.fold_in(source.key, source.calls - 1), source.device_axes


# --- the function -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class AttentionFn:
    """What :func:`attention_fn` returns: Flax's interface to private attention.

    A value, not a closure, so that layers which hold equal ones are equal and share
    compiled code.
    """

    privacy: AttentionPrivacy | None
    implementation: Implementation | None = None
    is_causal: bool = False

    def __post_init__(self) -> None:
        privacy = self.privacy
        if privacy is not None and not isinstance(privacy, AttentionPrivacy):
            raise ValueError(f"privacy is a {type(privacy).__name__}: AttentionPrivacy or None.")
        if privacy is not None and privacy.rows_per_record != 1:
            raise ValueError(
                f"rows_per_record={privacy.rows_per_record}: a layer cannot tell which rows are "
                "one record's; allowed is 1. Use dpfa_jax.dp_dot_product_attention with record_ids."
            )

    def __call__(
        self,
        query: Float[Array, "*batch T N H"],
        key: Float[Array, "*batch S K H"],
        value: Float[Array, "*batch S K H"],
        bias: Array | None = None,
        mask: Array | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        precision: Any = None,
        module: Any = None,
        is_causal: bool = False,
        qk_attn_weights_einsum: Any = None,
        attn_weights_value_einsum: Any = None,
    ) -> Float[Array, "*batch T N H"]:
        """Attends; the arguments are those of Flax's ``dot_product_attention``.

        Args:
            query: [*batch, T, N, H], any number of leading batch axes, or none.
            key: [*batch, S, K, H]; N is a multiple of K.
            value: like ``key``.
            bias: refused; only None.
            mask: broadcastable to [*batch, N, T, S]; zero or False hides a column.
            broadcast_dropout: not used.
            dropout_rng: not used.
            dropout_rate: 0, unless ``deterministic``.
            deterministic: True switches dropout off.
            dtype: the dtype to compute in and to return; None infers it.
            precision: refused, other than None and the default.
            module: refused; Flax passes it for ``sow_weights=True``.
            is_causal: row t sees the columns s <= t.
            qk_attn_weights_einsum: refused; only None.
            attn_weights_value_einsum: refused; only None.

        Returns:
            [*batch, T, N, H]. A row that sees nothing gives zero (plus noise, if any);
            Flax gives the mean of the values there.

        Raises:
            ValueError: at trace time, for a refused argument, shapes that do not fit, or
                a missing or unsuited key.
        """
        del broadcast_dropout, dropout_rng
        if bias is not None:
            raise ValueError("bias: allowed is None; private attention bounds the logits itself.")
        if module is not None:
            raise ValueError(
                "sow_weights=True (module): attention weights are private and are never formed "
                "as a whole; allowed is False."
            )
        if dropout_rate > 0.0 and not deterministic:
            raise ValueError(_no_dropout(dropout_rate))
        if precision not in (None, jax.lax.Precision.DEFAULT, "default"):
            raise ValueError(
                f"precision={precision!r}: allowed is None; the kernels multiply in the inputs' "
                "dtype and sum in float32, which is what their sensitivity is proved for."
            )
        if qk_attn_weights_einsum is not None or attn_weights_value_einsum is not None:
            raise ValueError(
                "qk_attn_weights_einsum and attn_weights_value_einsum: allowed is None; the "
                "kernels have their own products."
            )
        if dtype is None:
            dtype = jnp.result_type(query, key, value)
        query, key, value = (jnp.asarray(x, dtype) for x in (query, key, value))
        if min(query.ndim, key.ndim, value.ndim) < 3 or not (
            query.shape[:-3] == key.shape[:-3] == value.shape[:-3]
        ):
            raise ValueError(
                f"query, key and value have shapes {query.shape}, {key.shape} and {value.shape}: "
                "[*batch, length, heads, features] with one and the same batch is needed."
            )
        if mask is not None:
            full = (*query.shape[:-3], query.shape[-2], query.shape[-3], key.shape[-3])
            mask = _one_batch_axis(jnp.asarray(mask), full)
        batch = math.prod(query.shape[:-3])
        rng, device_axes = (None, None) if self.privacy is None else _next_key()
        out = dp_dot_product_attention(
            *(x.reshape(batch, *x.shape[-3:]) for x in (query, key, value)),
            privacy=self.privacy,
            rng=rng,
            is_causal=is_causal or self.is_causal,
            mask=mask,
            implementation=self.implementation,
            device_axes=device_axes,
        )
        return out.reshape(query.shape)


def attention_fn(
    privacy: AttentionPrivacy | None, *, implementation: Implementation | None = None
) -> AttentionFn:
    """A private ``attention_fn=`` for Flax's own attention layers, Linen and NNX.

    With ``privacy=None`` it is exact attention: Flax's result, up to rounding. Otherwise
    each call needs a key from :func:`noise_key`.

    Guarantee: that of :func:`dpfa_jax.dp_dot_product_attention` for every call, on the
    layer's projected keys and values. What goes around the attention (a residual
    connection, captured intermediates) and the gradients of what lies before it are not
    covered.

    Args:
        privacy: what to hide, or None. ``unit='record'`` needs ``public_queries=True``:
            this function cannot see whether queries and keys come from one input.
        implementation: see :func:`dpfa_jax.dp_dot_product_attention`.

    Raises:
        ValueError: for privacy that a layer cannot keep; the message says why.

    Example:
        >>> import flax.linen
        >>> from dpfa_jax.keys import SecureKey
        >>> privacy = AttentionPrivacy(unit="sequence", noise_multiplier=4.0, value_clip=1.0,
        ...                            adjacency="replace_one")
        >>> layer = flax.linen.MultiHeadDotProductAttention(
        ...     num_heads=2, attention_fn=attention_fn(privacy))
        >>> @jax.jit
        ... def init_and_apply(init_key, key, x):
        ...     with noise_key(key):
        ...         variables = layer.init(init_key, x)
        ...         return layer.apply(variables, x)
        >>> init_and_apply(jax.random.key(0), SecureKey.generate().key(), jnp.ones((3, 5, 8))).shape
        (3, 5, 8)
    """
    fn = AttentionFn(privacy, implementation)
    if privacy is not None and privacy.unit == "record" and not privacy.public_queries:
        raise ValueError(
            "public_queries=False: unit='record' hides keys and values only, and attention_fn "
            "cannot see whether the queries come from the same input. Allowed is "
            "public_queries=True, if the queries do not depend on the records."
        )
    return fn


def _one_batch_axis(mask: Array, full: tuple[int, ...]) -> Array:
    """``mask`` as bool [B or 1, N or 1, T or 1, S], where ``full`` is [*batch, N, T, S]."""
    shape = (1,) * (len(full) - mask.ndim) + mask.shape
    if len(shape) != len(full) or any(m not in (1, f) for m, f in zip(shape, full, strict=True)):
        raise ValueError(f"mask has shape {mask.shape}: it must broadcast to {full}.")
    batch = full[:-3] if math.prod(shape[:-3]) > 1 else shape[:-3]
    mask = jnp.broadcast_to(mask.astype(jnp.bool_), (*batch, *shape[-3:-1], full[-1]))
    return mask.reshape(math.prod(batch), *mask.shape[-3:])


# --- what the layers check before anything private is read --------------------------------


def _no_dropout(rate: float) -> str:
    return (
        f"dropout_rate={rate!r}: dropout divides the kept attention weights by the probability of "
        "keeping them, which breaks the bound on what one record contributes. Allowed is 0, or "
        "deterministic=True."
    )


def check_layer_call(
    privacy: AttentionPrivacy | None,
    inputs: tuple[Array, Array | None, Array | None],
    *,
    dropout_rate: float,
    deterministic: bool | None,
    decode: bool | None,
) -> None:
    """What a layer's call must satisfy.

    Args:
        privacy: the layer's.
        inputs: ``inputs_q``, ``inputs_k`` and ``inputs_v`` as the caller gave them.
        dropout_rate: the layer's.
        deterministic: the call's, or else the layer's.
        decode: the call's, or else the layer's.

    Raises:
        ValueError: for active dropout; and with privacy, for a decoding cache, and for
            records whose queries come from the same input.
    """
    if dropout_rate > 0.0 and not deterministic:
        raise ValueError(_no_dropout(dropout_rate))
    if privacy is None:
        return
    if decode:
        raise ValueError(
            "decode=True: the cache holds keys and values without noise; with privacy, allowed is "
            "decode=False."
        )
    inputs_q, inputs_k, inputs_v = inputs
    same = inputs_k is None or inputs_k is inputs_q or inputs_v is inputs_q
    if privacy.unit == "record" and same and not privacy.public_queries:
        raise ValueError(
            "inputs_k: unit='record' hides keys and values, and here the queries come from the "
            "same input, so a record would also change its own query row. Pass public inputs_q "
            "and private inputs_k, use unit='sequence', or state that the input of the queries "
            "is public with public_queries=True."
        )
