"""The reference engine: ``jax.vmap`` of ``jax.grad``, a microbatch at a time.

Correct for every loss that ``vmap`` and ``grad`` take, because every example has a
gradient of its own in memory; its price is that memory.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dpfa_jax.clipping.tree import clip_and_sum


def clipped_sum(
    per_example: Callable[..., tuple[Any, Any]],
    args: Sequence[Any],
    batch_argnums: tuple[int, ...],
    is_padding_example: jax.Array,
    *,
    l2_clip_norm: float,
    microbatch_size: int | None,
) -> tuple[Any, Any]:
    """Σ clip(∇) and the stacked auxiliary outputs.

    Args:
        per_example: ``(*args) -> (gradient, aux)`` of one example.
        args: positional arguments; those in ``batch_argnums`` have a leading batch axis.
        batch_argnums: which arguments are batched.
        is_padding_example: bool[batch].
        l2_clip_norm: C.
        microbatch_size: examples whose gradients are in memory together; None means all.
    """
    batch = is_padding_example.shape[0]
    size = min(microbatch_size or batch, batch)
    in_axes = tuple(0 if i in batch_argnums else None for i in range(len(args)))
    over_examples = jax.vmap(per_example, in_axes=in_axes)

    def microbatch(batched: tuple[Any, ...], padding: jax.Array) -> tuple[Any, Any]:
        full = list(args)
        for i, x in zip(batch_argnums, batched, strict=True):
            full[i] = x
        grads, aux = over_examples(*full)
        return clip_and_sum(grads, l2_clip_norm, padding), aux

    batched = tuple(args[i] for i in batch_argnums)
    if size == batch:
        return microbatch(batched, is_padding_example)

    steps = -(-batch // size)
    extra = steps * size - batch

    def split(x: jax.Array) -> jax.Array:
        # The last microbatch is filled up with copies of an example, marked as padding:
        # zeros might not be a valid example (a key array, an index).
        x = jnp.concatenate([x, jnp.repeat(x[:1], extra, axis=0)]) if extra else x
        return x.reshape(steps, size, *x.shape[1:])

    padding = jnp.concatenate([is_padding_example, jnp.ones(extra, jnp.bool_)])

    def body(total: Any, xs: tuple[Any, jax.Array]) -> tuple[Any, Any]:
        part, aux = microbatch(*xs)
        return jax.tree.map(jnp.add, total, part), aux

    xs = (jax.tree.map(split, batched), padding.reshape(steps, size))
    shapes = jax.eval_shape(lambda x: microbatch(*x)[0], jax.tree.map(lambda x: x[0], xs))
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, aux = jax.lax.scan(body, zero, xs)
    return total, jax.tree.map(lambda x: x.reshape(steps * size, *x.shape[2:])[:batch], aux)
