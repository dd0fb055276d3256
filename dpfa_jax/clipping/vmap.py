"""The reference engine: ``jax.vmap`` of ``jax.grad``.

Correct for every loss that ``vmap`` and ``grad`` take, because every example has a
gradient of its own in memory; its price is that memory. It reads no jaxpr, so that the
other engines are compared with something that shares nothing with them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from dpfa_jax.clipping.tree import Clip, clip_and_sum_with_norms, onto


def per_example_gradients(
    loss: Callable[..., Sequence[Any]], leaves: Sequence[Any], batch: Sequence[Any]
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Each example's gradient, a leaf at a time, and the auxiliary outputs.

    Args:
        loss: ``(*leaves, *example) -> (loss, *aux)``.
        leaves: the trainable leaves.
        batch: arrays with a leading batch axis.
    """

    def one(example: list[Any]) -> tuple[list[jax.Array], list[jax.Array]]:
        def split(leaves: list[Any]) -> tuple[Any, list[Any]]:
            value, *aux = loss(*leaves, *example)
            return value, aux

        return jax.grad(split, has_aux=True)(list(leaves))

    return jax.vmap(one)(list(batch))


def clipped_sum(
    loss: Callable[..., Sequence[Any]],
    leaves: Sequence[Any],
    batch: list[Any],
    padding: jax.Array,
    clip: Clip,
    start: Sequence[jax.Array] | None = None,
) -> tuple[list[jax.Array], tuple[list[jax.Array], jax.Array]]:
    """``start`` + Σ clip(∇); and of each example, the auxiliary outputs and the norm."""
    grads, aux = per_example_gradients(loss, leaves, batch)
    sums, norms = clip_and_sum_with_norms(grads, clip, padding)
    return onto(start, sums), (aux, norms)
