"""A batch taken a microbatch at a time, to bound the memory."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool

from pallas_kernels import manual

# (examples, is_padding_example, what to add to or None) -> (sum, per-example outputs)
Part = Callable[[list[Any], jax.Array, Any], tuple[Any, Any]]


def in_microbatches(
    part: Part,
    batch: Sequence[Any],
    is_padding_example: Bool[Array, "b"],
    size: int | None,
    *,
    skip: bool = False,
    sharding: NamedSharding | None = None,
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
        sharding: how the batch's first axis is split; each microbatch is split likewise.
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
        x = x.reshape(steps, size, *x.shape[1:])
        if sharding is None:
            return x
        rows = sharding.spec[0] if len(sharding.spec) else None
        return jax.lax.with_sharding_constraint(
            x, NamedSharding(sharding.mesh, PartitionSpec(None, rows))
        )

    padding = jnp.concatenate([is_padding_example, jnp.ones(extra, jnp.bool_)])
    xs = ([split(x) for x in batch], padding.reshape(steps, size))

    def body(total: Any, xs: tuple[Any, jax.Array]) -> tuple[Any, Any]:
        examples, padding = xs
        if not skip:
            return part(examples, padding, total)
        return jax.lax.cond(
            jnp.all(padding),
            lambda: (total, zeros(outputs)),
            lambda: part(examples, padding, total),
        )

    axes = manual.varying_axes(is_padding_example, *batch)

    def zeros(like: Any) -> Any:
        return jax.tree.map(lambda s: manual.vary(jnp.zeros(s.shape, s.dtype), axes), like)

    first = jax.tree.map(lambda x: x[0], xs)
    sums, outputs = jax.eval_shape(lambda examples, padding: part(examples, padding, None), *first)
    total, stacked = jax.lax.scan(body, zeros(sums), xs)
    flat = jax.tree.map(lambda x: x.reshape(steps * size, *x.shape[2:])[:count], stacked)
    return total, flat
