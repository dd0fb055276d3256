"""The shapes that are measured and the arrays of each."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from dpfa_jax.bench.timing import Build

Direction = Literal["forward", "forward+backward"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "forward+backward")

# Public bound on the logits. Norms of queries and keys are made to fit it, so that the
# same arrays serve the kernels that enforce the bound and those that rely on it.
LOGIT_BOUND = 2.0


@dataclasses.dataclass(frozen=True)
class Shape:
    """Self-attention of ``batch`` sequences, all in bfloat16."""

    batch: int
    length: int
    heads: int
    head_dim: int
    is_causal: bool

    def __str__(self) -> str:
        text = f"B={self.batch} T={self.length} H={self.heads} D={self.head_dim}"
        return text + (" causal" if self.is_causal else "")

    @property
    def scale(self) -> float:
        """The usual factor on the logits, 1/√D."""
        return 1.0 / math.sqrt(self.head_dim)

    def flops(self, direction: Direction) -> float:
        """Floating-point operations of exact attention, for TFLOP/s.

        2·2·B·H·T²·D for the two products, half of it if causal; the backward pass has
        five products and makes it 3.5 times as much.
        """
        forward = 4.0 * self.batch * self.heads * self.length**2 * self.head_dim
        forward *= 0.5 if self.is_causal else 1.0
        return forward * (1.0 if direction == "forward" else 3.5)


def _both(*dimensions: tuple[int, int, int, int]) -> tuple[Shape, ...]:
    return tuple(Shape(*d, is_causal) for d in dimensions for is_causal in (False, True))


# Most important first: what does not fit into the time is left out at the end.
STANDARD = _both((4, 4096, 16, 128), (4, 4096, 32, 64), (16, 1024, 16, 128), (1, 16384, 16, 128))
ALL = STANDARD + _both((1, 65536, 16, 128), (64, 256, 16, 64))
SMALL = (Shape(2, 64, 2, 64, False), Shape(1, 96, 2, 128, True))


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape in one direction, with its arrays, which are never written to."""

    shape: Shape
    direction: Direction
    query: jax.Array
    key: jax.Array
    value: jax.Array
    d_out: jax.Array
    key_words: jax.Array


@dataclasses.dataclass(frozen=True)
class Version:
    """One way to compute attention.

    Attributes:
        name: as printed and written.
        family: ``'ours'``; ``'jax'`` and ``'torch'``: peers without privacy; ``'steps'``:
            the private pipeline of separate steps.
        prepare: traces the version; the function that it returns compiles it, and may
            run beside others' in a thread.
        directions: what it can do.
        for_targets: whether some target needs it, or it is a peer.
        implementation: which of our implementations would run, where that is a question.
    """

    name: str
    family: Literal["ours", "jax", "torch", "steps"]
    prepare: Callable[[Case], Build]
    directions: tuple[Direction, ...] = DIRECTIONS
    for_targets: bool = True
    implementation: Callable[[Shape], str] | None = None


@functools.partial(jax.jit, static_argnums=0)
def _arrays(shape: Shape) -> tuple[jax.Array, ...]:
    full = (shape.batch, shape.length, shape.heads, shape.head_dim)
    arrays = [
        jax.random.normal(key, full, jnp.float32) for key in jax.random.split(jax.random.key(0), 4)
    ]
    # ‖q‖ = ‖k‖ = r with scale·r² a little under the bound, bfloat16's rounding included.
    norm = math.sqrt(0.98 * LOGIT_BOUND / shape.scale)
    for i in (0, 1):
        arrays[i] = arrays[i] * (norm / jnp.linalg.norm(arrays[i], axis=-1, keepdims=True))
    return tuple(x.astype(jnp.bfloat16) for x in arrays)


def make_case(shape: Shape, direction: Direction) -> Case:
    """Random arrays: zeros would run faster than any real input."""
    query, key, value, d_out = jax.block_until_ready(_arrays(shape))
    # A fixed key: times do not depend on it, and nothing private is released here.
    words = np.random.default_rng(0).integers(0, 2**32, 8, dtype=np.uint32)
    return Case(shape, direction, query, key, value, d_out, jnp.asarray(words))


def with_gradients(function: Callable[..., jax.Array]) -> Callable[..., Any]:
    """``f(d_out, q, k, v, *rest)`` -> the output and the gradients of the first three."""

    def run(d_out: jax.Array, *operands: jax.Array) -> tuple[jax.Array, ...]:
        out, pull = jax.vjp(lambda q, k, v: function(q, k, v, *operands[3:]), *operands[:3])
        return out, *pull(d_out)

    return run
