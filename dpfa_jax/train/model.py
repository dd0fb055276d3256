"""A small byte-level decoder, in Linen and in NNX, over exact or private attention.

Each attention head sees a window of earlier positions, from ``nearest`` to ``farthest``
steps back. A head that sees one position only is a shift, and one with a short window
knows roughly where it looks, so the model needs no position embedding: fewer parameters,
and so less noise in private training.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float32, Int32, Key, PyTree

from dpfa_jax.linen import DPMultiHeadDotProductAttention
from dpfa_jax.nnx import DPMultiHeadAttention
from dpfa_jax.train.config import ModelConfig
from dpfa_jax.train.data import SYMBOLS

_EMBED_STD = 1.0

Windows = Sequence[Sequence[int]]


def window_mask(windows: Windows, length: int) -> Bool[np.ndarray, "1 n t t"]:
    """Which earlier positions each head sees.

    A row whose window lies before the start sees position 0, which holds the start
    symbol: a row must see something.

    Example:
        >>> window_mask([[1, 1]], 3)[0, 0].astype(int).tolist()
        [[1, 0, 0], [1, 0, 0], [0, 1, 0]]
    """
    back = np.arange(length)[:, None] - np.arange(length)[None, :]
    heads = np.stack([(back >= near) & (back <= far) for near, far in windows])
    nothing = ~heads.any(axis=-1, keepdims=True)
    return (heads | (nothing & (np.arange(length) == 0)))[None]


def _inputs(symbols: jax.Array) -> jax.Array:
    """The symbols one step late, starting with 0; padding (-1) becomes 0."""
    late = jnp.pad(jnp.maximum(symbols, 0), ((0, 0), (1, 0)))
    return late[:, :-1]


class Decoder(nn.Module):
    """Linen: symbols [b, t] to logits [b, t, 97] for the same positions."""

    width: int
    layers: int
    head_windows: Windows
    mlp_ratio: int

    @nn.compact  # type: ignore[untyped-decorator]
    def __call__(self, symbols: Int32[Array, "b t"]) -> Float32[Array, "b t v"]:
        """Logits of each symbol given those before it."""
        embed = nn.initializers.normal(_EMBED_STD)
        x = nn.Embed(SYMBOLS, self.width, embedding_init=embed, name="embed")(_inputs(symbols))
        mask = jnp.asarray(window_mask(self.head_windows, symbols.shape[1]))
        for i in range(self.layers):
            y = nn.LayerNorm(name=f"norm_attention_{i}")(x)
            attend = DPMultiHeadDotProductAttention(
                num_heads=len(self.head_windows), name=f"attention_{i}"
            )
            x = x + attend(y, mask=mask)
            y = nn.LayerNorm(name=f"norm_mlp_{i}")(x)
            y = nn.gelu(nn.Dense(self.mlp_ratio * self.width, name=f"up_{i}")(y))
            x = x + nn.Dense(self.width, name=f"down_{i}")(y)
        x = nn.LayerNorm(name="norm")(x)
        return nn.Dense(SYMBOLS, kernel_init=nn.initializers.zeros, name="head")(x)


class NNXDecoder(nnx.Module):
    """NNX: the same computation as :class:`Decoder`."""

    def __init__(
        self, width: int, layers: int, head_windows: Windows, mlp_ratio: int, rngs: nnx.Rngs
    ):
        self.head_windows = tuple(tuple(w) for w in head_windows)
        embed = nnx.initializers.normal(_EMBED_STD)
        self.embed = nnx.Embed(SYMBOLS, width, embedding_init=embed, rngs=rngs)
        self.layers = nnx.List()
        for _ in range(layers):
            self.layers.append(
                nnx.Dict(
                    norm_attention=nnx.LayerNorm(width, rngs=rngs),
                    attention=DPMultiHeadAttention(
                        num_heads=len(head_windows), in_features=width, decode=False, rngs=rngs
                    ),
                    norm_mlp=nnx.LayerNorm(width, rngs=rngs),
                    up=nnx.Linear(width, mlp_ratio * width, rngs=rngs),
                    down=nnx.Linear(mlp_ratio * width, width, rngs=rngs),
                )
            )
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        zeros = nnx.initializers.zeros
        self.head = nnx.Linear(width, SYMBOLS, kernel_init=zeros, rngs=rngs)

    def __call__(self, symbols: Int32[Array, "b t"]) -> Float32[Array, "b t v"]:
        """Logits of each symbol given those before it."""
        x = self.embed(_inputs(symbols))
        mask = jnp.asarray(window_mask(self.head_windows, symbols.shape[1]))
        for layer in self.layers:
            x = x + layer["attention"](layer["norm_attention"](x), mask=mask)
            x = x + layer["down"](nnx.gelu(layer["up"](layer["norm_mlp"](x))))
        return self.head(self.norm(x))


class Model(NamedTuple):
    """A model as two functions, whichever Flax API it is written in."""

    init: Callable[[Key[Array, ""]], PyTree]
    apply: Callable[[PyTree, Int32[Array, "b t"]], Float32[Array, "b t v"]]


def make_model(config: ModelConfig, chunk_bytes: int) -> Model:
    """The configured decoder."""
    options: dict[str, Any] = {
        "width": config.width,
        "layers": config.layers,
        "head_windows": tuple(tuple(w) for w in config.head_windows),
        "mlp_ratio": config.mlp_ratio,
    }
    if config.flax_api == "linen":
        linen = Decoder(**options)
        sample = jnp.zeros((1, chunk_bytes), jnp.int32)
        return Model(lambda key: linen.init(key, sample), linen.apply)

    def split(key: jax.Array) -> tuple[Any, Any]:
        return nnx.split(NNXDecoder(**options, rngs=nnx.Rngs(params=key)))

    graph = nnx.split(nnx.eval_shape(lambda: NNXDecoder(**options, rngs=nnx.Rngs(0))))[0]
    return Model(lambda key: split(key)[1], lambda params, x: nnx.merge(graph, params)(x))


def losses(logits: Float32[Array, "b t v"], symbols: Int32[Array, "b t"]) -> tuple[Array, Array]:
    """Sum of nats and number of bytes, each over all positions that hold a symbol."""
    there = symbols >= 0
    log_p = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(log_p, jnp.maximum(symbols, 0)[..., None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(there, chosen, 0.0)), jnp.sum(there).astype(jnp.float32)
