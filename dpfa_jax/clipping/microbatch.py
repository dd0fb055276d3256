"""A batch taken a microbatch at a time, to bound the memory."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

# (examples, is_padding_example, what to add to or None) -> (sum, per-example outputs)
Part = Callable[[list[Any], jax.Array, Any], tuple[Any, Any]]


def in_microbatches(
    part: Part,
    batch: Sequence[Any],
    is_padding_example: Bool[Array, "b"],
    size: int | None,
    *,
    skip: bool = False,
) -> tuple[Any, Any]:
    """Sums ``part``'s first output over microbatches and stacks its second.

    Args:
        part: ``(examples, is_padding_example, start) -> (sum, per-example outputs)``; the sum
            is on top of ``start``, where that is not None.
        batch: arrays with a leading batch axis.
        is_padding_example: bool[batch].
        size: examples in a microbatch; None means all.
        skip: whether microbatches of padding alone are left out. Their per-example outputs are
            zeros then, and what the call takes tells how many there were.
    """
    count = is_padding_example.shape[0]
    size = min(size or count, count)
    if size == count:
        return part(list(batch), is_padding_example, None)
    steps = -(-count // size)
    extra = steps * size - count

    def split(x: Any) -> jax.Array:
        # The last microbatch is filled up with copies of an example, marked as padding:
        # zeros might not be a valid example (a key array, an index).
        x = jnp.concatenate([x, jnp.repeat(x[:1], extra, axis=0)]) if extra else jnp.asarray(x)
        return x.reshape(steps, size, *x.shape[1:])

    padding = jnp.concatenate([is_padding_example, jnp.ones(extra, jnp.bool_)])
    xs = ([split(x) for x in batch], padding.reshape(steps, size))

    def body(total: Any, xs: tuple[Any, jax.Array]) -> tuple[Any, Any]:
        examples, padding = xs
        if not skip:
            return part(examples, padding, total)
        return jax.lax.cond(
            jnp.all(padding),
            lambda: (total, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), outputs)),
            lambda: part(examples, padding, total),
        )

    first = jax.tree.map(lambda x: x[0], xs)
    sums, outputs = jax.eval_shape(lambda examples, padding: part(examples, padding, None), *first)
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), sums)
    total, stacked = jax.lax.scan(body, zero, xs)
    flat = jax.tree.map(lambda x: x.reshape(steps * size, *x.shape[2:])[:count], stacked)
    return total, flat
