"""Private multi-head attention for Flax Linen."""

import dataclasses
import hashlib

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Array, Float, Key

from dpfa_jax import keys
from dpfa_jax.attention import AttentionPrivacy
from dpfa_jax.attention_fn import (
    AttentionFn,
    Implementation,
    check_layer_call,
    noise_key,
)


class DPMultiHeadDotProductAttention(nn.MultiHeadDotProductAttention):
    """``flax.linen.MultiHeadDotProductAttention`` with private attention.

    It takes the arguments of Flax's layer, except ``attention_fn``, and has the same
    parameters under the same names, so the weights of either load into the other. With
    ``privacy=None`` it computes what Flax's layer computes. Otherwise every call draws a
    key from the random stream ``'privacy'``, also while initialising::

        variables = layer.init({"params": jax.random.key(0), "privacy": key}, x)
        out = layer.apply(variables, x, rngs={"privacy": key_of_this_step})

    Layers and calls under one such key never share noise. Under ``nn.scan`` and
    ``nn.vmap`` name the stream in ``split_rngs={"privacy": True}``; ``False`` under
    ``nn.scan`` would repeat the noise at each iteration and raises. ``tabulate`` makes the
    key a constant of a traced function, which raises too: use it with ``privacy=None``.

    Guarantee: that of :func:`dpfa_jax.dp_dot_product_attention` on the projected keys
    and values; :func:`dpfa_jax.attention_event` gives its cost. Covered is what is
    computed from the attention's output, not a path around it (a residual connection,
    captured intermediates), nor the gradients of the projections of private inputs.

    Attributes:
        num_heads: as in Flax, like all that are not named here.
        privacy: what to hide, or None. ``unit='record'`` hides rows of ``inputs_k`` and
            ``inputs_v`` and is refused where they are also ``inputs_q``, unless
            ``public_queries=True``.
        implementation: see :func:`dpfa_jax.dp_dot_product_attention`.
        is_causal: row t sees the columns s <= t, on top of ``mask``.

    Raises:
        ValueError: for privacy that a layer cannot keep; and at the call, at trace time,
            for a missing or unsuited key, dropout, ``sow_weights``, and ``decode=True``
            with privacy.

    Example:
        >>> import jax.numpy as jnp
        >>> from dpfa_jax.keys import SecureKey
        >>> privacy = AttentionPrivacy(unit="sequence", noise_multiplier=4.0, value_clip=1.0,
        ...                            adjacency="replace_one")
        >>> layer = DPMultiHeadDotProductAttention(num_heads=2, privacy=privacy, is_causal=True)
        >>> x = jnp.ones((3, 5, 8))
        >>> rngs = {"params": jax.random.key(0), "privacy": SecureKey.generate().key()}
        >>> variables = layer.init(rngs, x)
        >>> sorted(variables["params"])
        ['key', 'out', 'query', 'value']
        >>> layer.apply(variables, x, rngs={"privacy": SecureKey.generate().key()}).shape
        (3, 5, 8)
    """

    # Not an argument: made from the three fields below.
    attention_fn: AttentionFn = dataclasses.field(init=False, repr=False)
    privacy: AttentionPrivacy | None = None
    implementation: Implementation | None = None
    is_causal: bool = False

    def __post_init__(self) -> None:
        # While decoding, Flax's mask over the cache does what is_causal does.
        fn = AttentionFn(self.privacy, self.implementation, self.is_causal and not self.decode)
        object.__setattr__(self, "attention_fn", fn)
        super().__post_init__()

    @nn.compact  # type: ignore[untyped-decorator]
    def __call__(
        self,
        inputs_q: Float[Array, "*batch T D"],
        inputs_k: Float[Array, "*batch S E"] | None = None,
        inputs_v: Float[Array, "*batch S F"] | None = None,
        *,
        mask: Array | None = None,
        deterministic: bool | None = None,
        dropout_rng: Array | None = None,
        sow_weights: bool = False,
    ) -> Float[Array, "*batch T O"]:
        """Applies the layer; the arguments are those of Flax's layer.

        Args:
            inputs_q: [*batch, T, features].
            inputs_k: [*batch, S, features]; None means ``inputs_q``.
            inputs_v: [*batch, S, features]; None means ``inputs_k``.
            mask: broadcastable to [*batch, num_heads, T, S]; zero or False hides a column.
            deterministic: True switches dropout off.
            dropout_rng: not used: dropout is refused.
            sow_weights: refused; only False.

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
            decode=self.decode,
        )
        arguments = {
            "mask": mask,
            "deterministic": deterministic,
            "dropout_rng": dropout_rng,
            "sow_weights": sow_weights,
        }
        if self.privacy is None:
            return super().__call__(inputs_q, inputs_k, inputs_v, **arguments)
        with noise_key(_key_of_call(self)):
            return super().__call__(inputs_q, inputs_k, inputs_v, **arguments)


def _key_of_call(module: nn.Module) -> Key[Array, ""]:
    """A key of the stream 'privacy' that no other layer and no other call has.

    Flax keeps layers and calls apart by 32 bits of a hash, which a model of many calls
    can bring to collide; another 96 bits of a hash of the module's path and of the
    number of the call are folded in.
    """
    if not module.has_rng("privacy"):
        raise ValueError(
            "rngs has no 'privacy' key: this layer adds noise. Pass rngs={'privacy': key} to "
            "apply or init, with a key from dpfa_jax.SecureKey.generate().key(); under nn.scan "
            "and nn.vmap also split_rngs={'privacy': True}."
        )
    given = module.scope.rngs["privacy"].rng
    keys.refuse_frozen_key(keys.check_noise_key(given, "rngs['privacy']"), "rngs['privacy']")
    key = module.make_rng("privacy")
    call = module.scope.rng_counters["privacy"]
    name = "".join(f"{len(part)}:{part}" for part in (*module.path, str(call)))
    for word in np.frombuffer(hashlib.sha256(name.encode()).digest()[:12], "<u4"):
        key = jax.random.fold_in(key, word)
    return key
