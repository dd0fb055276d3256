"""The public sentence encoder all-MiniLM-L6-v2 in JAX, read from safetensors.

A BERT with post-layer-norm blocks, followed by the mean of the token vectors and
L2 normalisation, as the sentence-transformers model card describes it
(<https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2>). The folder needs
``config.json``, ``model.safetensors`` and ``tokenizer.json``::

    encoder = minilm.load(folder)
    vectors = encoder.embed(["a dog barks", "a hound howls"])     # float32 [2, 384], unit norm

Every text is encoded alone: the rows of a batch never attend to each other, and the length
that a text is padded to depends on that text only. So one text changes one row of the result
(up to float32 rounding), which is what a record-level privacy claim about these rows needs.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import tokenizers

Params = dict[str, jax.Array]

FILES = ("config.json", "model.safetensors", "tokenizer.json")
LENGTH_STEP = 8  # texts are padded to a multiple of this many tokens


def _layer_norm(p: Params, name: str, x: jax.Array, eps: float) -> jax.Array:
    mean = x.mean(-1, keepdims=True)
    variance = jnp.square(x - mean).mean(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + eps) * p[f"{name}.weight"] + p[f"{name}.bias"]


def _dense(p: Params, name: str, x: jax.Array) -> jax.Array:
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]  # PyTorch keeps (out, in)


def _block(p: Params, x: jax.Array, bias: jax.Array, heads: int, eps: float) -> jax.Array:
    """One transformer layer. x [B, T, D]; bias [B, 1, 1, T] is added to the logits."""
    batch, length, width = x.shape

    def split(name: str) -> jax.Array:
        return _dense(p, f"attention.self.{name}", x).reshape(batch, length, heads, -1)

    q, k, v = split("query"), split("key"), split("value")
    logits = jnp.einsum("bqnh,bknh->bnqk", q, k) / (width // heads) ** 0.5 + bias
    mixed = jnp.einsum("bnqk,bknh->bqnh", jax.nn.softmax(logits), v).reshape(x.shape)
    x = _layer_norm(
        p, "attention.output.LayerNorm", x + _dense(p, "attention.output.dense", mixed), eps
    )
    hidden = jax.nn.gelu(_dense(p, "intermediate.dense", x), approximate=False)
    return _layer_norm(p, "output.LayerNorm", x + _dense(p, "output.dense", hidden), eps)


@functools.partial(jax.jit, static_argnames=("heads", "eps"))
def forward(
    outer: Params, layers: Params, ids: jax.Array, mask: jax.Array, *, heads: int, eps: float
) -> jax.Array:
    """Token ids int32 [B, T] and mask bool [B, T] to unit vectors float32 [B, D].

    ``outer`` holds the embedding tables; each array of ``layers`` has the layers stacked in front.
    """
    x = (
        outer["embeddings.word_embeddings.weight"][ids]
        + outer["embeddings.position_embeddings.weight"][: ids.shape[1]]
        + outer["embeddings.token_type_embeddings.weight"][0]
    )
    x = _layer_norm(outer, "embeddings.LayerNorm", x, eps)
    # A finite penalty: a row of padding alone stays free of NaN.
    bias = jnp.where(mask, 0.0, jnp.finfo(x.dtype).min)[:, None, None, :]
    x, _ = jax.lax.scan(lambda h, p: (_block(p, h, bias, heads, eps), None), x, layers)
    pooled = jnp.where(mask[..., None], x, 0.0).sum(1)  # the norm below cancels the count
    return pooled / jnp.maximum(jnp.linalg.norm(pooled, axis=-1, keepdims=True), 1e-12)


@dataclass(frozen=True)
class Encoder:
    """The weights, the shape and the tokenizer of one encoder."""

    outer: Params
    layers: Params
    heads: int
    eps: float
    tokenizer: tokenizers.Tokenizer

    def embed(
        self,
        texts: Sequence[str],
        *,
        max_tokens: int = 64,
        batch_size: int = 64,
        progress: Callable[[int, int], None] | None = None,
    ) -> np.ndarray:
        """Texts to unit vectors, float32 [len(texts), D], in the order of the texts.

        Args:
            texts: Any strings; what comes after ``max_tokens`` tokens is ignored.
            max_tokens: Cut-off, start and end marks included.
            batch_size: Texts per call of the jitted forward pass.
            progress: Called as ``progress(done, total)`` after each batch.
        """
        tokenizer = tokenizers.Tokenizer.from_str(self.tokenizer.to_str())
        tokenizer.no_padding()
        tokenizer.enable_truncation(max_tokens)
        tokens = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
        by_length: dict[int, list[int]] = {}
        for i, tokens_of_text in enumerate(tokens):
            by_length.setdefault(-(-len(tokens_of_text) // LENGTH_STEP) * LENGTH_STEP, []).append(i)

        width = self.outer["embeddings.word_embeddings.weight"].shape[1]
        vectors, done = np.empty((len(texts), width), np.float32), 0
        for length, members in sorted(by_length.items()):
            for start in range(0, len(members), batch_size):
                rows = members[start : start + batch_size]
                ids = np.zeros((batch_size, length), np.int32)
                mask = np.zeros((batch_size, length), bool)
                for row, i in enumerate(rows):
                    ids[row, : len(tokens[i])] = tokens[i]
                    mask[row, : len(tokens[i])] = True
                out = forward(self.outer, self.layers, ids, mask, heads=self.heads, eps=self.eps)
                vectors[rows] = np.asarray(out)[: len(rows)]
                done += len(rows)
                if progress is not None:
                    progress(done, len(texts))
        return vectors


def _check_files(folder: Path) -> None:
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"folder={str(folder)!r} lacks {', '.join(missing)}.")


def fingerprint(folder: str | Path) -> str:
    """SHA-256 over an encoder's files, to name what a cached embedding came from.

    Raises:
        ValueError: If a file is missing.
    """
    _check_files(Path(folder))
    digest = hashlib.sha256()
    for name in FILES:
        digest.update(hashlib.sha256((Path(folder) / name).read_bytes()).digest())
    return digest.hexdigest()


def load(folder: str | Path) -> Encoder:
    """Read an encoder from a folder with ``config.json``, weights and ``tokenizer.json``.

    Raises:
        ValueError: If a file is missing or the configuration is not that of a plain BERT.
    """
    folder = Path(folder)
    _check_files(folder)
    config = json.loads((folder / "config.json").read_text())
    for name, allowed in (("hidden_act", "gelu"), ("position_embedding_type", "absolute")):
        if config.get(name) != allowed:
            raise ValueError(
                f"{name}={config.get(name)!r} in config.json; only {allowed!r} is known."
            )
    weights = safetensors.numpy.load_file(folder / "model.safetensors")
    count = config["num_hidden_layers"]
    names = [n.removeprefix("encoder.layer.0.") for n in weights if ".layer.0." in n]
    return Encoder(
        outer={n: jnp.asarray(w) for n, w in weights.items() if n.startswith("embeddings.")},
        layers={
            name: jnp.stack([weights[f"encoder.layer.{i}.{name}"] for i in range(count)])
            for name in names
        },
        heads=config["num_attention_heads"],
        eps=config["layer_norm_eps"],
        tokenizer=tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")),
    )
