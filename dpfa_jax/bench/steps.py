"""Training steps of the decoder: without privacy, ours, and those of other libraries.

Each step is ``(state, tokens) -> state`` with clipping, noise and AdamW, over the same
state, which it gives back in place: all versions of a shape share one copy.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from dpfa_jax import keys, optim
from dpfa_jax.bench import decoder
from dpfa_jax.bench.decoder import DecoderShape
from dpfa_jax.bench.timing import BenchError
from dpfa_jax.clipping import clipped_grad

CLIP_NORM = 1.0
NOISE_MULTIPLIER = 1.0
# Small: a bench must not train itself into numbers that are not finite.
_LEARNING_RATE = 1e-7

NON_PRIVATE = "non-private"
OURS = "dpfa auto"
OURS_NO_NOISE = "dpfa auto, no noise"
OURS_MICROBATCH = "dpfa auto, microbatch of 1/4"
Step = Callable[[PyTree, jax.Array], PyTree]
# (shape, trainable parameters, frozen parameters, tokens) -> clipped sum, or plain sum
Gradient = Callable[[PyTree, PyTree, jax.Array], PyTree]


@dataclasses.dataclass(frozen=True)
class Version:
    """One way to make a step.

    Attributes:
        name: for tables.
        gradient: ``shape -> (trainable, frozen, tokens) -> sum`` over the examples.
        noise: ``'none'``, ``'dpfa'`` or ``'threefry'`` (``jax.random.normal``).
        for_targets: whether a quick run measures it.
    """

    name: str
    gradient: Callable[[DecoderShape], Gradient]
    noise: str
    for_targets: bool = False


def example_loss(shape: DecoderShape) -> Callable[..., jax.Array]:
    """``(trainable, frozen, tokens) -> loss`` of one example."""

    def loss(trainable: PyTree, frozen: PyTree, tokens: jax.Array) -> jax.Array:
        base, lora = (trainable, None) if shape.lora_rank is None else (frozen, trainable)
        return decoder.loss(shape, base, lora, tokens)

    return loss


def _plain(shape: DecoderShape) -> Gradient:
    loss = example_loss(shape)

    def batch_loss(trainable: PyTree, frozen: PyTree, tokens: jax.Array) -> jax.Array:
        return jnp.sum(jax.vmap(loss, in_axes=(None, None, 0))(trainable, frozen, tokens))

    def gradient(trainable: PyTree, frozen: PyTree, tokens: jax.Array) -> PyTree:
        if shape.accumulate == 1:
            return jax.grad(batch_loss)(trainable, frozen, tokens)

        def body(total: PyTree, part: jax.Array) -> tuple[PyTree, None]:
            more = jax.grad(batch_loss)(trainable, frozen, part)
            return jax.tree.map(jnp.add, total, more), None

        parts = tokens.reshape(shape.accumulate, shape.batch, -1)
        return jax.lax.scan(body, jax.tree.map(jnp.zeros_like, trainable), parts)[0]

    return gradient


def _ours(engine: Any, microbatch: Callable[[DecoderShape], int | None]) -> Any:
    def of(shape: DecoderShape) -> Gradient:
        return clipped_grad(
            example_loss(shape),
            l2_clip_norm=CLIP_NORM,
            engine=engine,
            batch_argnums=2,
            microbatch_size=microbatch(shape),
        )

    return of


def _jax_privacy(share: int) -> Any:
    def of(shape: DecoderShape) -> Gradient:
        try:
            from jax_privacy import clipping
        except ImportError as error:
            raise BenchError(f"jax_privacy is not installed ({error}).") from error
        made: Gradient = clipping.clipped_grad(
            example_loss(shape),
            l2_clip_norm=CLIP_NORM,
            batch_argnums=2,
            keep_batch_dim=False,
            microbatch_size=max(1, shape.batch // share),
        )
        return made

    return of


def _optax(shape: DecoderShape) -> Gradient:
    """Per-example gradients of the whole physical batch, clipped by Optax."""
    if shape.accumulate > 1:
        raise BenchError("optax clips one batch at a time; this step accumulates several.")
    loss = example_loss(shape)

    def gradient(trainable: PyTree, frozen: PyTree, tokens: jax.Array) -> PyTree:
        each = jax.vmap(jax.grad(loss), in_axes=(None, None, 0))(trainable, frozen, tokens)
        leaves, structure = jax.tree.flatten(each)
        sums, _ = optax.per_example_global_norm_clip(leaves, CLIP_NORM)
        return jax.tree.unflatten(structure, sums)

    return gradient


def _whole(shape: DecoderShape) -> int | None:
    return None if shape.accumulate == 1 else shape.batch


VERSIONS: tuple[Version, ...] = (
    Version(NON_PRIVATE, _plain, "none", True),
    Version(OURS, _ours("auto", _whole), "dpfa", True),
    Version(OURS_NO_NOISE, _ours("auto", _whole), "none", True),
    Version(OURS_MICROBATCH, _ours("auto", lambda s: s.batch // 4 or 1), "dpfa"),
    Version("dpfa two_pass", _ours("two_pass", _whole), "dpfa"),
    Version("dpfa per_layer", _ours("per_layer", _whole), "dpfa"),
    Version("dpfa vmap, microbatch of 1/4", _ours("vmap", lambda s: s.batch // 4 or 1), "dpfa"),
    Version("jax_privacy, whole batch", _jax_privacy(1), "threefry", True),
    Version("jax_privacy, microbatch of 1/2", _jax_privacy(2), "threefry"),
    Version("jax_privacy, microbatch of 1/4", _jax_privacy(4), "threefry", True),
    Version("jax_privacy, microbatch of 1/16", _jax_privacy(16), "threefry"),
    Version("optax vmap", _optax, "threefry"),
)


def make_state(shape: DecoderShape) -> PyTree:
    """Parameters, AdamW's state and the noise's state."""

    def build() -> PyTree:
        made = decoder.init(shape, jax.random.key(0))
        base, lora = made["base"], made["lora"]
        trainable, frozen = (base, None) if lora is None else (lora, base)
        return {
            "trainable": trainable,
            "frozen": frozen,
            "adam": optax.adamw(_LEARNING_RATE).init(trainable),
        }

    state = jax.jit(build)()
    state["noise"] = _noise(shape).init(state["trainable"])
    return state


def make_tokens(shape: DecoderShape) -> jax.Array:
    """Random tokens, int32[batch · accumulate, length + 1]."""
    size = (shape.batch * shape.accumulate, shape.length + 1)
    return jax.random.randint(jax.random.key(1), size, 0, shape.vocabulary)


def _noise(shape: DecoderShape) -> optax.GradientTransformation:
    examples = float(shape.batch * shape.accumulate)
    return optim.add_noise(CLIP_NORM, NOISE_MULTIPLIER, examples, keys.SecureKey.generate())


def make_step(version: Version, shape: DecoderShape) -> Step:
    """The step, to be compiled with its state donated."""
    gradient, adam, noise = version.gradient(shape), optax.adamw(_LEARNING_RATE), _noise(shape)
    examples = shape.batch * shape.accumulate

    def step(state: PyTree, tokens: jax.Array) -> PyTree:
        trainable, noise_state = state["trainable"], state["noise"]
        total = gradient(trainable, state["frozen"], tokens)
        if version.noise == "dpfa":
            mean, noise_state = noise.update(total, noise_state)
        else:
            if version.noise == "threefry":
                total = _threefry(total, noise_state.step)
                noise_state = noise_state._replace(step=noise_state.step + jnp.uint32(1))
            mean = jax.tree.map(lambda x: x / examples, total)
        updates, adam_state = adam.update(mean, state["adam"], trainable)
        return {
            "trainable": optax.apply_updates(trainable, updates),
            "frozen": state["frozen"],
            "adam": adam_state,
            "noise": noise_state,
        }

    # Functions of JAX and Optax that are used here need it.
    return jax.numpy_dtype_promotion("standard")(step)


def _threefry(total: PyTree, step: jax.Array) -> PyTree:
    leaves, structure = jax.tree.flatten(total)
    key = jax.random.fold_in(jax.random.key(2, impl="threefry2x32"), step)
    drawn = jax.random.split(key, len(leaves))
    noisy = [
        x + NOISE_MULTIPLIER * CLIP_NORM * jax.random.normal(k, x.shape, x.dtype)
        for x, k in zip(leaves, drawn, strict=True)
    ]
    return jax.tree.unflatten(structure, noisy)
