"""Private multi-head attention for Flax NNX."""

from typing import Any

from flax import nnx
from jaxtyping import Array, Float, Key

from dpfa_jax import keys
from dpfa_jax.attention import AttentionPrivacy
from dpfa_jax.attention_fn import (
    AttentionFn,
    Implementation,
    check_layer_call,
    noise_key,
)


class DPMultiHeadAttention(nnx.MultiHeadAttention):
    """``flax.nnx.MultiHeadAttention`` with private attention.

    It takes the arguments of Flax's layer, except ``attention_fn``, and has the same
    parameters under the same names. With ``privacy=None`` it computes what Flax's layer
    computes. Otherwise every call draws a key from the random stream ``privacy``: that
    of ``rngs=`` at the call if it has one, or else the one that the layer was made with::

        layer = DPMultiHeadAttention(4, 64, privacy=privacy, decode=False,
                                     rngs=nnx.Rngs(params=0, privacy=key))
        out = layer(x)
        out = layer(x, rngs=nnx.Rngs(privacy=key_of_this_step))

    A stored stream counts its calls in the layer's state. ``nnx.jit`` carries the count
    on; under plain ``jax.jit`` return the state, or pass ``rngs`` made from a key that is
    an argument, or the next execution repeats the noise. Under ``nnx.scan``, and where a
    stack of layers is made under ``nnx.vmap``, split the stream (``nnx.split_rngs``) or
    carry it: broadcast to the iterations it gives each of them the same noise. None of
    this can be seen from the layer. The state also contains the key: with
    ``keep_rngs=False`` no key is stored, so none can reach a checkpoint.

    Guarantee: that of :func:`dpfa_jax.dp_dot_product_attention` on the projected keys
    and values; :func:`dpfa_jax.attention_event` gives its cost. Covered is what is
    computed from the attention's output, not a path around it (a residual connection),
    nor the gradients of the projections of private inputs.

    Args:
        *args: as in Flax: ``num_heads``, ``in_features``, ``qkv_features``, ...
        privacy: what to hide, or None. ``unit='record'`` hides rows of ``inputs_k`` and
            ``inputs_v`` and is refused where they are also ``inputs_q``, unless
            ``public_queries=True``.
        implementation: see :func:`dpfa_jax.dp_dot_product_attention`.
        rngs: as in Flax; a stream ``privacy`` in it, if any, is forked and stored.
        keep_rngs: whether to store that stream.
        **kwargs: as in Flax.

    Raises:
        ValueError: for privacy that a layer cannot keep, ``attention_fn``, and a stream
            ``privacy`` that is not a noise key; and at the call, at trace time, for a
            missing or unsuited key, dropout, ``sow_weights``, and ``decode=True`` with
            privacy.

    Example:
        >>> import jax.numpy as jnp
        >>> from dpfa_jax.keys import SecureKey
        >>> privacy = AttentionPrivacy(unit="sequence", noise_multiplier=4.0, value_clip=1.0,
        ...                            adjacency="replace_one")
        >>> rngs = nnx.Rngs(params=0, privacy=SecureKey.generate().key())
        >>> layer = DPMultiHeadAttention(2, 8, privacy=privacy, decode=False, rngs=rngs)
        >>> layer(jnp.ones((3, 5, 8)), is_causal=True).shape
        (3, 5, 8)
    """

    def __init__(
        self,
        *args: Any,
        privacy: AttentionPrivacy | None = None,
        implementation: Implementation | None = None,
        rngs: nnx.Rngs,
        keep_rngs: bool = True,
        **kwargs: Any,
    ):
        if "attention_fn" in kwargs:
            raise ValueError("attention_fn: this layer has its own; leave it out.")
        fn = AttentionFn(privacy, implementation)
        super().__init__(*args, attention_fn=fn, rngs=rngs, keep_rngs=keep_rngs, **kwargs)
        self.privacy = privacy
        self.privacy_rngs = nnx.data(None)
        if privacy is not None and keep_rngs and "privacy" in rngs:
            keys.check_noise_key(rngs["privacy"].key[...], "rngs.privacy")
            self.privacy_rngs = rngs["privacy"].fork()

    def __call__(
        self,
        inputs_q: Float[Array, "*batch T D"],
        inputs_k: Float[Array, "*batch S E"] | None = None,
        inputs_v: Float[Array, "*batch S E"] | None = None,
        *,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        decode: bool | None = None,
        **kwargs: Any,
    ) -> Float[Array, "*batch T O"]:
        """Applies the layer; the arguments are those of Flax's layer.

        Args:
            inputs_q: [*batch, T, in_features].
            inputs_k: [*batch, S, in_kv_features]; None means ``inputs_q``.
            inputs_v: [*batch, S, in_kv_features]; None means ``inputs_k``.
            deterministic: True switches dropout off.
            rngs: holds the stream ``privacy`` for this call, or is that stream.
            decode: as in Flax; refused with privacy.
            **kwargs: as in Flax: ``mask``, ``is_causal``, ...

        Returns:
            [*batch, T, out_features].

        Raises:
            ValueError: see the class.
        """
        check_layer_call(
            self.privacy,
            (inputs_q, inputs_k, inputs_v),
            dropout_rate=self.dropout_rate,
            deterministic=self.deterministic if deterministic is None else deterministic,
            decode=self.decode if decode is None else decode,
        )
        # Flax's layer looks for a stream 'dropout' in rngs; there is no dropout here.
        kwargs |= {"deterministic": deterministic, "decode": decode}
        if self.privacy is None:
            return super().__call__(inputs_q, inputs_k, inputs_v, **kwargs)
        with noise_key(self._key_of_call(rngs)):
            return super().__call__(inputs_q, inputs_k, inputs_v, **kwargs)

    def _key_of_call(self, rngs: nnx.Rngs | nnx.RngStream | None) -> Key[Array, ""]:
        stream = self.privacy_rngs
        if isinstance(rngs, nnx.RngStream):
            stream = rngs
        elif rngs is not None and "privacy" in rngs:
            stream = rngs["privacy"]
        if stream is None:
            raise ValueError(
                "rngs has no stream 'privacy': this layer adds noise. Make or call the layer with "
                "rngs=nnx.Rngs(privacy=key), with a key from dpfa_jax.SecureKey.generate().key()."
            )
        key = keys.check_noise_key(stream.key[...], "rngs.privacy")
        keys.refuse_frozen_key(key, "rngs.privacy")
        return stream()
