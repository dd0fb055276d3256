"""Small models with every kind of site, for the tests of the clipping engines.

Each function returns ``(loss, params, batch)``; ``loss(params, *example)`` is the loss of
one example, and ``batch`` is a tuple of arrays with a leading batch axis.
"""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

BATCH = 5


def normal(seed, *shape, scale=0.5, dtype=jnp.float32):
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), dtype)


def tokens(seed, *shape, rows=11):
    return jnp.asarray(np.random.default_rng(seed).integers(0, rows, shape), jnp.int32)


def spread(seed, *shape):
    """Inputs whose sizes differ from example to example, so that some are clipped."""
    x = normal(seed, BATCH, *shape, scale=1.0)
    return x * jnp.geomspace(0.05, 4.0, BATCH).reshape(-1, *[1] * len(shape))


def mlp():
    params = {"a": normal(0, 4, 6), "b": normal(1, 6), "c": normal(2, 6, 3), "d": normal(3, 3)}

    def loss(p, x, y):
        h = jnp.tanh(x @ p["a"] + p["b"]) @ p["c"] + p["d"]
        return -jax.nn.log_softmax(h)[y]

    return loss, params, (spread(4, 4), tokens(5, BATCH, rows=3))


def bfloat16_mlp():
    """Float32 parameters, bfloat16 arithmetic, several rows an example."""
    params = {"a": normal(0, 16, 24), "b": normal(1, 24), "c": normal(2, 24, 8)}

    def loss(p, x):
        p = jax.tree.map(lambda v: v.astype(jnp.bfloat16), p)
        h = jax.nn.gelu(x.astype(jnp.bfloat16) @ p["a"] + p["b"]) @ p["c"]
        return jnp.mean(jnp.square(h.astype(jnp.float32)))

    return loss, params, (spread(3, 5, 16),)


def cnn():
    """Strides, dilation, padding, channels last and first; a depthwise layer."""
    params = {
        "first": normal(0, 3, 3, 2, 4),
        "second": normal(1, 5, 4, 2, 2),
        "depth": normal(2, 3, 3, 1, 5),
        "head": normal(3, 45, 3),
    }

    def loss(p, x, y):
        h = jax.lax.conv_general_dilated(
            x[None], p["first"], (2, 1), "SAME", rhs_dilation=(1, 2),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        h = jnp.tanh(h).transpose(0, 3, 1, 2)
        h = jax.lax.conv_general_dilated(h, p["second"], (1, 2), [(1, 0), (0, 1)])
        h = jnp.tanh(h).transpose(0, 2, 3, 1)
        h = jax.lax.conv_general_dilated(
            h, p["depth"], (1, 1), "VALID", feature_group_count=5,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        h = jnp.resize(h.reshape(-1), 45) @ p["head"]
        return -jax.nn.log_softmax(h)[y]

    return loss, params, (spread(4, 8, 7, 2), tokens(5, BATCH, rows=3))


def linen_cnn():
    class CNN(nn.Module):
        @nn.compact
        def __call__(self, image):
            h = nn.relu(nn.Conv(4, (3, 3), strides=2)(image))
            return nn.Dense(3)(nn.relu(nn.Conv(5, (3, 3))(h)).reshape(-1))

    model = CNN()
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((8, 8, 2)))

    def loss(p, x, y):
        return -jax.nn.log_softmax(model.apply(p, x))[y]

    return loss, params, (spread(1, 8, 8, 2), tokens(2, BATCH, rows=3))


def tied_decoder():
    """Linen; the embedding is the output's matrix too."""

    class Decoder(nn.Module):
        @nn.compact
        def __call__(self, row):
            embed = nn.Embed(11, 8)
            h = embed(row) + self.param("position", nn.initializers.normal(0.1), (9, 8))[: len(row)]
            h = h + nn.MultiHeadDotProductAttention(num_heads=2)(
                nn.LayerNorm()(h), mask=nn.make_causal_mask(row)
            )
            h = h + nn.Dense(8)(nn.gelu(nn.Dense(16)(nn.LayerNorm()(h))))
            return embed.attend(nn.LayerNorm()(h))

    model = Decoder()
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros(6, jnp.int32))

    def loss(p, row):
        logits = model.apply(p, row[:-1])
        scale = 1.0 + row[0].astype(jnp.float32)
        return -scale * jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), row[1:, None], 1))

    return loss, params, (tokens(1, BATCH, 7),)


def padded_encoder():
    """Positions beyond an example's length are masked; a repeated token in every example."""
    params = {
        "embed": normal(0, 11, 6),
        "qkv": normal(1, 6, 3, 2, 3),
        "out": normal(2, 2, 3, 6),
        "head": normal(3, 6, 2),
    }

    def loss(p, row, length, label):
        there = jnp.arange(len(row), dtype=jnp.float32) < length
        h = jnp.take(p["embed"], row, axis=0)
        q, k, v = jnp.einsum("td,dcnh->ctnh", h, p["qkv"])
        logits = jnp.where(there, jnp.einsum("tnh,snh->nts", q, k), -1e9)
        h = h + jnp.einsum("nts,snh,nhd->td", jax.nn.softmax(logits), v, p["out"])
        mean = jnp.sum(jnp.where(there[:, None], h, 0.0), axis=0) / length
        return -jax.nn.log_softmax(mean @ p["head"])[label]

    lengths = jnp.asarray([1.0, 2.0, 4.0, 6.0, 6.0])
    return loss, params, (tokens(4, BATCH, 6, rows=4), lengths, tokens(5, BATCH, rows=2))


def scanned_layers():
    """Stacked blocks in ``scan`` with ``jax.checkpoint``."""
    params = {
        "layers": {
            "up": normal(0, 3, 4, 8),
            "bias": normal(1, 3, 8),
            "down": normal(2, 3, 2, 4, 4),
            "norm": normal(3, 3, 4),
        },
        "head": normal(4, 4, 2),
    }

    def loss(p, x):
        @jax.checkpoint
        def block(h, w):
            y = jax.nn.relu((h * w["norm"]) @ w["up"] + w["bias"])
            down = w["down"].transpose(0, 2, 1).reshape(8, 4)
            return h + y @ down, jnp.sum(y)

        h, sums = jax.lax.scan(block, x, p["layers"], reverse=True)
        return jnp.sum(jnp.square(h @ p["head"])) + jnp.mean(sums)

    return loss, params, (spread(5, 6, 4),)


def linen_scan():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, h, _):
            return h + nn.Dense(4)(nn.gelu(nn.Dense(8)(nn.LayerNorm()(h)))), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            many = nn.scan(
                nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
            )
            return nn.Dense(2)(many()(x, None)[0])

    model = Model()
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((6, 4)))

    def loss(p, x):
        return jnp.sum(jnp.square(model.apply(p, x)))

    return loss, params, (spread(1, 6, 4),)


def experts():
    """A mixture of experts without capacity limits: every expert, weighted by its router."""
    params = {"router": normal(0, 4, 3), "up": normal(1, 3, 4, 6), "down": normal(2, 3, 6, 4)}

    def loss(p, x):
        share, chosen = jax.lax.top_k(jax.nn.softmax(x @ p["router"]), 2)
        h = jnp.tanh(jnp.einsum("td,edf->etf", x, p["up"]))
        y = jnp.einsum("etf,efd->etd", h, p["down"])
        picked = y[chosen, jnp.arange(len(x))[:, None]]
        return jnp.sum(jnp.square(jnp.einsum("tk,tkd->td", share, picked)))

    return loss, params, (spread(3, 5, 4),)


def routed_experts():
    """The other kind: each token's expert matrix is looked up."""
    params = {"router": normal(0, 4, 3), "expert": normal(1, 3, 4, 4)}

    def loss(p, x):
        share = jax.nn.softmax(x @ p["router"])
        best = jnp.argmax(share, axis=1)
        y = jnp.einsum("td,tdf->tf", x, p["expert"][best])
        return jnp.sum(jnp.square(y * jnp.max(share, axis=1)[:, None]))

    return loss, params, (spread(2, 5, 4),)


def lora():
    base = {"up": normal(0, 6, 8), "down": normal(1, 8, 3)}
    params = {k: (normal(2, v.shape[0], 2), normal(3, 2, v.shape[1])) for k, v in base.items()}

    def loss(p, x):
        def dense(name, h):
            a, b = p[name]
            return h @ base[name] + 0.5 * ((h @ a) @ b)

        return jnp.sum(jnp.square(dense("down", jnp.tanh(dense("up", x)))))

    return loss, params, (spread(4, 4, 6),)


def rnn():
    """A recurrent network in ``scan``: one matrix for all steps, one row of a table a step."""
    params = {"embed": normal(0, 11, 4), "w": normal(1, 4, 4), "u": normal(2, 4, 4)}
    params |= {"b": normal(3, 4), "out": normal(4, 4, 11)}

    def loss(p, row):
        def step(h, token):
            h = jnp.tanh(h @ p["w"] + p["embed"][token] @ p["u"] + p["b"])
            return h, jax.nn.log_softmax(h @ p["out"])

        _, logits = jax.lax.scan(step, jnp.zeros(4), row[:-1])
        return -jnp.sum(jnp.take_along_axis(logits, row[1:, None], axis=1))

    return loss, params, (tokens(5, BATCH, 6),)


def nested_scans():
    """Stacked layers inside a loop over time, and time inside stacked layers."""
    params = {"w": normal(0, 2, 3, 3), "v": normal(1, 3, 3), "z": normal(2, 2, 2, 3, 3)}

    def loss(p, x):
        def layer(h, w):
            return jnp.tanh(h @ w @ p["v"]), None

        def step(h, row):
            return jax.lax.scan(layer, h + row, p["w"])[0], None

        def outer(h, z):
            return jax.lax.scan(lambda g, y: (jnp.tanh(g @ y), g), h, z)

        h, _ = jax.lax.scan(step, jnp.zeros(3), x)
        h, gs = jax.lax.scan(outer, h, p["z"])
        return jnp.sum(jnp.square(h)) + jnp.sum(gs)

    return loss, params, (spread(3, 4, 3),)


def shared_weights():
    """One matrix in three layers, once transposed; one table read in three ways."""
    params = {"w": normal(0, 5, 5), "table": normal(1, 7, 5)}

    def loss(p, x, ids):
        h = jnp.tanh(x @ p["w"])
        h = jnp.tanh(h @ p["w"].T)
        h = h + p["table"][ids] + jnp.take(p["table"], ids[::-1], axis=0, mode="clip")
        h = jnp.einsum("td,de->te", h, p["w"])
        return jax.nn.logsumexp(h @ p["table"].T) + jnp.sum(p["table"][ids[0]])

    return loss, params, (spread(2, 4, 5), tokens(3, BATCH, 4, rows=7))


def slices_and_casts():
    """Parts of one matrix, split, sliced, reshaped, transposed and rounded."""
    params = {"qkv": normal(0, 4, 12), "pair": normal(1, 2, 4, 4), "table": normal(2, 6, 2, 4)}

    def loss(p, x, ids):
        q, k, v = jnp.split(p["qkv"], 3, axis=1)
        h = jnp.tanh(x @ q) * (x @ k) + x @ v.reshape(2, 2, 4).reshape(4, 4)
        h = jnp.tanh(h @ p["pair"][0]) @ jnp.squeeze(p["pair"][1:2]).T
        y = h.astype(jnp.bfloat16) @ p["pair"][0].astype(jnp.bfloat16)[None][0]
        rows = jnp.take(jnp.swapaxes(p["table"], 0, 1), ids, axis=1)
        return (
            jnp.sum(jnp.square(h))
            + jnp.sum(jnp.square(y.astype(jnp.float32)))
            + jnp.sum(jnp.tanh(rows))
        )

    return loss, params, (spread(3, 3, 4), tokens(4, BATCH, 5, rows=6))


def unrecognised_paths():
    """Weights that are transformed, carried, branched on, or reached by a custom rule."""

    @jax.custom_vjp
    def dense(w, x):
        return x @ w

    dense.defvjp(lambda w, x: (x @ w, (w, x)), lambda r, g: (r[1].T @ g, g @ r[0].T))
    params = {name: normal(i, 3, 3) for i, name in enumerate("abcdefghi")} | {
        "unused": normal(9, 2)
    }

    def loss(p, x):
        h = x @ (p["a"] / jnp.linalg.norm(p["a"]))
        h = jnp.tanh(h @ (p["b"] @ p["c"]))
        h = dense(p["d"], h)
        h = jax.lax.cond(x[0, 0] > 0, lambda h: h @ p["e"], lambda h: jnp.sin(h @ p["e"]), h)
        h = jax.lax.fori_loop(0, 2, lambda _, h: jnp.tanh(h @ p["f"]), h)
        swap = lambda c, _: ((jnp.tanh(c[0] @ c[1]), c[2], c[1]), None)  # noqa: E731
        (h, *_), _ = jax.lax.scan(swap, (h, p["g"], p["i"]), length=2)
        return (
            jnp.sum(h)
            + jnp.sum(jnp.square(p["h"])) * x[0, 1]
            + jnp.sum(jax.lax.stop_gradient(p["h"]) @ h.T)
        )

    return loss, params, (spread(10, 4, 3),)


def out_of_range_rows():
    """Row numbers outside the table: gather's gradient drops them, or moves them to the end."""
    params = {"a": normal(0, 5, 3), "b": normal(1, 5, 3), "w": normal(2, 3, 2)}

    def loss(p, ids):
        h = jnp.take(p["a"], ids, axis=0, mode="fill", fill_value=0.25)
        h = h + jnp.take(p["b"], ids, axis=0, mode="clip")
        row = jax.lax.dynamic_index_in_dim(p["b"], ids[0], 0, keepdims=False)
        return jnp.sum(jnp.square(h @ p["w"])) + jnp.sum(jnp.tanh(row))

    return loss, params, (jnp.asarray(np.arange(-10, 10).reshape(BATCH, 4), jnp.int32),)


def nnx_model():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(11, 8, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
            self.norm = nnx.LayerNorm(8, rngs=rngs)
            self.up = nnx.Linear(8, 16, rngs=rngs)
            self.down = nnx.Linear(16, 8, rngs=rngs)

        def __call__(self, row):
            h = self.embed(row)
            h = h + self.attention(self.norm(h))
            h = h + self.down(nnx.gelu(self.up(h)))
            return self.embed.attend(h)

    graph, params, rest = nnx.split(Model(nnx.Rngs(0)), nnx.Param, ...)

    def loss(p, row):
        logits = nnx.merge(graph, p, rest)(row[:-1])
        return -jnp.sum(jnp.take_along_axis(jax.nn.log_softmax(logits), row[1:, None], axis=1))

    return loss, params, (tokens(0, BATCH, 6),)


def equinox_model():
    model = eqx.nn.MLP(4, 3, 8, 2, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss(p, x, y):
        return -jax.nn.log_softmax(eqx.combine(p, static)(x))[y]

    return loss, params, (spread(0, 4), tokens(1, BATCH, rows=3))


def haiku_model():
    def forward(row):
        embed = hk.Embed(11, 8)
        h = embed(row) + hk.get_parameter(
            "position", (6, 8), init=hk.initializers.RandomNormal(0.1)
        )
        h = h + hk.MultiHeadAttention(2, 4, model_size=8, w_init=hk.initializers.RandomNormal(0.3))(
            h, h, h
        )
        h = hk.LayerNorm(-1, True, True)(h)
        return hk.nets.MLP([16, 8])(h) @ embed.embeddings.T

    model = hk.without_apply_rng(hk.transform(forward))
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros(6, jnp.int32))

    def loss(p, row):
        logits = model.apply(p, row[:-1])
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), row[1:, None], axis=1))

    return loss, params, (tokens(0, BATCH, 7),)


MODELS = {
    f.__name__: f
    for f in (
        mlp, bfloat16_mlp, cnn, linen_cnn, tied_decoder, padded_encoder, scanned_layers, linen_scan,
        experts, routed_experts, lora, rnn, nested_scans, shared_weights, slices_and_casts,
        unrecognised_paths, out_of_range_rows, nnx_model, equinox_model, haiku_model,
    )
}  # fmt: skip
