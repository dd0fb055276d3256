"""The decoder that ``dpfa bench clipping`` trains: GPT-2's layout, in plain JAX."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Key, PyTree

from dpfa_jax.attention import dp_dot_product_attention


@dataclasses.dataclass(frozen=True)
class DecoderShape:
    """A decoder and a batch for it.

    Attributes:
        name: for tables.
        batch: examples in a physical batch.
        length: tokens of an example.
        width: of the residual stream.
        layers: blocks.
        heads: attention heads.
        vocabulary: rows of the embedding, which is also the output's matrix.
        dtype: of activations and products; parameters are float32.
        lora_rank: None trains all parameters; a number trains two matrices of this rank
            beside each of a block's four, and nothing else.
        accumulate: physical batches in a step.
        remat: whether blocks are computed again in the backward pass.
        attention: ``'cudnn'``, ``'dpfa'`` (our kernels, without noise) or ``'xla'``; None is
            the fastest that is known for the device. All versions of a step use the same.
    """

    name: str
    batch: int
    length: int
    width: int
    layers: int
    heads: int
    vocabulary: int = 50304
    dtype: str = "bfloat16"
    lora_rank: int | None = None
    accumulate: int = 1
    remat: bool = False
    attention: str | None = None

    def __str__(self) -> str:
        return f"{self.name}: B={self.batch}, T={self.length}, d={self.width}, {self.layers} layers"


# What the targets are about, the CPU's shape, and one for tests.
GPT2_256 = DecoderShape("GPT-2 small", 64, 256, 768, 12, 12)
GPT2_1024 = DecoderShape("GPT-2 small", 16, 1024, 768, 12, 12)
LARGE = DecoderShape("1.3 B", 4, 1024, 2048, 24, 16, accumulate=4, remat=True)
LORA = DecoderShape("GPT-2 small, LoRA", 16, 1024, 768, 12, 12, lora_rank=16)
CPU = DecoderShape("CPU", 16, 64, 768, 4, 12, dtype="float32")
SMALL = DecoderShape("small", 4, 8, 16, 2, 2, vocabulary=32, dtype="float32", accumulate=2)
SMALL_LORA = DecoderShape("small LoRA", 4, 8, 16, 1, 2, vocabulary=32, lora_rank=2)
SHAPES = {
    "all": (GPT2_256, GPT2_1024, LORA, LARGE),
    "cpu": (CPU,),
    "small": (SMALL, SMALL_LORA),
}


ATTENTION = ("cudnn", "dpfa", "xla")


def attention_of(shape: DecoderShape) -> str:
    """Which attention the decoder uses: cuDNN's on NVIDIA GPUs, which has 16-bit floats only."""
    if shape.attention is not None:
        return shape.attention
    on_gpu = jax.default_backend() == "gpu" and jnp.dtype(shape.dtype).itemsize == 2
    return "cudnn" if on_gpu else "xla"


def _attend(name: str, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Causal attention of one example: [T, N, H]. Under ``vmap`` the batch is folded in."""
    if name == "dpfa":
        made = dp_dot_product_attention(q[None], k[None], v[None], is_causal=True)
        return made[0]
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=True, implementation="cudnn" if name == "cudnn" else "xla"
    )


def init(shape: DecoderShape, key: Key[Array, ""]) -> PyTree:
    """Float32 parameters: GPT-2's initial scales; zeros for the second LoRA matrices."""
    d = shape.width
    matrices = {"qkv": (d, 3 * d), "out": (d, d), "up": (d, 4 * d), "down": (4 * d, d)}
    keys = iter(jax.random.split(key, 2 + 8 * shape.layers))

    def normal(dims: tuple[int, ...]) -> jax.Array:
        return 0.02 * jax.random.normal(next(keys), dims, jnp.float32)

    def norm() -> dict[str, jax.Array]:
        return {"scale": jnp.ones(d, jnp.float32), "bias": jnp.zeros(d, jnp.float32)}

    def block() -> dict[str, Any]:
        made: dict[str, Any] = {"norm_1": norm(), "norm_2": norm()}
        for name, dims in matrices.items():
            made[name] = {"kernel": normal(dims), "bias": jnp.zeros(dims[1], jnp.float32)}
        return made

    base = {
        "tokens": normal((shape.vocabulary, d)),
        "positions": normal((shape.length, d)),
        "blocks": [block() for _ in range(shape.layers)],
        "norm": norm(),
    }
    if shape.lora_rank is None:
        return {"base": base, "lora": None}
    rank = shape.lora_rank
    lora = [
        {
            name: {"down": normal((i, rank)), "up": jnp.zeros((rank, o), jnp.float32)}
            for name, (i, o) in matrices.items()
        }
        for _ in range(shape.layers)
    ]
    return {"base": base, "lora": lora}


def loss(
    shape: DecoderShape,
    base: PyTree,
    lora: PyTree,
    tokens: Int32[Array, "t1"],
    use: Callable[[Array], Array] = lambda x: x,
) -> Float[Array, ""]:
    """Mean cross-entropy of one example's next tokens, float32.

    JAX's own attention needs its standard dtype promotion.

    Args:
        shape: of the decoder.
        base: parameters, as :func:`init` makes them.
        lora: likewise.
        tokens: one more than the length.
        use: what each parameter of ``base`` passes through where it is used, already in the
            dtype of the products.
    """
    dtype, attention = jnp.dtype(shape.dtype), attention_of(shape)

    def norm(p: PyTree, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + 1e-5)
        return (y * use(p["scale"]) + use(p["bias"])).astype(dtype)

    def dense(p: PyTree, extra: PyTree | None, x: jax.Array) -> jax.Array:
        y = x @ use(p["kernel"].astype(dtype)) + use(p["bias"].astype(dtype))
        if extra is not None:
            y = y + (x @ extra["down"].astype(dtype)) @ extra["up"].astype(dtype)
        return y

    def block(p: PyTree, extra: PyTree | None, x: jax.Array) -> jax.Array:
        more = dict.fromkeys(("qkv", "out", "up", "down")) if extra is None else extra
        heads = dense(p["qkv"], more["qkv"], norm(p["norm_1"], x))
        q, k, v = jnp.split(heads.reshape(len(x), 3 * shape.heads, -1), 3, axis=1)
        y = _attend(attention, q, k, v)
        x = x + dense(p["out"], more["out"], y.reshape(x.shape))
        y = jax.nn.gelu(dense(p["up"], more["up"], norm(p["norm_2"], x)))
        return x + dense(p["down"], more["down"], y)

    if shape.remat:
        block = jax.checkpoint(block)
    inputs, targets = tokens[:-1], tokens[1:]
    table = use(base["tokens"].astype(dtype))
    x = table[inputs] + use(base["positions"].astype(dtype))
    for i, p in enumerate(base["blocks"]):
        x = block(p, None if lora is None else lora[i], x)
    logits = (norm(base["norm"], x) @ table.T).astype(jnp.float32)
    # Not an indexed read: its gradient would be a scatter into all logits in float32.
    chosen = jnp.arange(shape.vocabulary) == targets[:, None]
    picked = jnp.sum(jnp.where(chosen, logits, 0.0), axis=1)
    return jnp.mean(jax.nn.logsumexp(logits, axis=1) - picked)
