"""A batch taken a microbatch at a time, to bound the memory."""

import math
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
        sharding: how the batch's first axis is split; each microbatch is split likewise, and takes
            as many examples from each part, so that none is moved.

    Raises:
        ValueError: if the batch, or a microbatch, does not divide into so many parts.
    """
    count = is_padding_example.shape[0]
    size = min(size or count, count)
    if size == count:
        return part(list(batch), is_padding_example, None)
    parts = parts_of(sharding)
    if size % parts or count % parts:
        raise ValueError(
            f"microbatch_size={size} of a batch of {count}: allowed are multiples of {parts}, the "
            "devices that batch_sharding splits them over."
        )
    # Of each part of the batch, a microbatch takes as many examples.
    own, local = count // parts, size // parts
    steps = -(-own // local)
    extra = steps * local - own

    def split(x: Any) -> jax.Array:
        # The last microbatch is filled up with copies of an example, marked as padding:
        # zeros might not be a valid example (a key array, an index).
        x = jnp.asarray(x).reshape(parts, own, *x.shape[1:])
        if extra:
            x = jnp.concatenate([x, jnp.repeat(x[:, :1], extra, axis=1)], axis=1)
        x = x.reshape(parts, steps, local, *x.shape[2:]).swapaxes(0, 1)
        return _place(x.reshape(steps, size, *x.shape[3:]), sharding)

    padding = is_padding_example.reshape(parts, own)
    padding = jnp.concatenate([padding, jnp.ones((parts, extra), jnp.bool_)], axis=1)
    padding = padding.reshape(parts, steps, local).swapaxes(0, 1).reshape(steps, size)
    xs = ([split(x) for x in batch], _place(padding, sharding))

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

    def whole(x: jax.Array) -> jax.Array:
        x = x.reshape(steps, parts, local, *x.shape[2:]).swapaxes(0, 1)
        return x.reshape(parts, steps * local, *x.shape[3:])[:, :own].reshape(count, *x.shape[3:])

    return total, jax.tree.map(whole, stacked)


def _rows(sharding: NamedSharding) -> tuple[str, ...]:
    first = sharding.spec[0] if len(sharding.spec) else None
    return () if first is None else (first,) if isinstance(first, str) else tuple(first)


def parts_of(sharding: NamedSharding | None) -> int:
    """Over how many devices a batch is split."""
    if sharding is None:
        return 1
    return math.prod(sharding.mesh.shape[axis] for axis in _rows(sharding))


def _place(x: jax.Array, sharding: NamedSharding | None) -> jax.Array:
    """Microbatches, each split as the batch is."""
    if sharding is None:
        return x
    spec = PartitionSpec(None, _rows(sharding) or None)
    return jax.lax.with_sharding_constraint(x, NamedSharding(sharding.mesh, spec))
