"""Kernel calls on arrays that are split over devices.

XLA cannot split a kernel that it did not make: left alone it gathers the operands and every
device does all of it. Here it learns that the batch is independent: each device calls the
kernel on the examples it has, and nothing is sent.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

# JAX has no public way to read what the partitioner says; custom_partitioning does it so too.
from jax._src.sharding_impls import parse_flatten_op_sharding
from jax.experimental.custom_partitioning import ArrayMapping, SdyShardingRule, custom_partitioning
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pallas_kernels.manual import without_types


def spec_of(sharding: Any, mesh: Any) -> PartitionSpec:
    """Where the axes of an undecoded sharding lie; nowhere if it splits an axis of the mesh itself.

    The partitioner does that to sizes that a mesh axis does not divide. Nowhere is never wrong:
    each device then has all of the array and does all of the work.
    """
    try:
        return PartitionSpec(*parse_flatten_op_sharding(sharding._hlo_sharding, mesh)[0])
    except (AssertionError, IndexError, NotImplementedError, ValueError):
        return PartitionSpec()


def whole_parts(spec: PartitionSpec, shape: Sequence[int], mesh: Any) -> tuple[Any, ...]:
    """The mesh axes of each of the array's axes; None for one that they do not divide.

    What the partitioner fills a last part up with is no zero, but whatever was there: in a
    slice, the rows that were cut off.
    """

    def size(names: Any) -> int:
        every = () if names is None else names if isinstance(names, tuple) else (names,)
        return math.prod(mesh.shape[n] for n in every)

    named = (*spec, *[None] * (len(shape) - len(spec)))
    return tuple(None if n % size(x) else x for n, x in zip(shape, named, strict=True))


def by_batch(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """:func:`split_by_batch`, for :func:`pallas_kernels.batching.folded`."""
    del name
    return split_by_batch(kernel)


@functools.cache
def split_by_batch(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel as an operation that XLA splits along the first axis.

    Inside ``shard_map`` it is the kernel itself, whose operands are one device's already. On a
    mesh of ``Explicit`` axes it is that inside a ``shard_map`` of its own.

    Args:
        kernel: of arrays, to a tree of arrays; the first axis of all is the batch, and no
            example has a part in another's results.

    Example:
        >>> import jax.numpy as jnp
        >>> def total(x):
        ...     return jnp.sum(x, axis=1)
        >>> split_by_batch(total)(jnp.ones((2, 3))).tolist()
        [3.0, 3.0]
    """

    @jax.jit  # so that a kernel's tables are no constants of the operation's own program
    def whole(*operands: jax.Array) -> Any:
        return kernel(*operands)

    def partition(mesh: Any, arguments: Any, results: Any) -> Any:
        first = jax.tree.leaves(results)[0]
        batch = whole_parts(spec_of(first.sharding, mesh), first.shape, mesh)[0]
        rows = NamedSharding(mesh, PartitionSpec(batch))
        return mesh, kernel, jax.tree.map(lambda _: rows, results), (rows,) * len(arguments)

    def rule(mesh: Any, operands: Any, results: Any) -> SdyShardingRule:
        def factors(side: str, types: Any) -> tuple[ArrayMapping, ...]:
            ranks = [len(t.shape) for t in types]
            return tuple(
                ArrayMapping("batch", *(f"{side}{n}_{d}" for d in range(1, rank)))
                for n, rank in enumerate(ranks)
            )

        given, made = factors("x", operands), factors("y", results)
        rest = tuple(f for mapping in (*given, *made) for f in mapping if f != "batch")
        return SdyShardingRule(given, made, need_replication_factors=rest)

    operation = custom_partitioning(whole)
    operation.def_partition(partition=partition, decode_shardings=False, sharding_rule=rule)

    def run(*operands: jax.Array) -> Any:
        if AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types:
            return without_types(kernel)(*operands)
        typed = jax.typeof(operands[0]).sharding
        if AxisType.Explicit in typed.mesh.axis_types:
            rows = PartitionSpec(next(iter(typed.spec), None))
            return jax.shard_map(
                kernel, mesh=typed.mesh, in_specs=rows, out_specs=rows, check_vma=False
            )(*operands)
        return operation(*operands)

    return run


@functools.cache
def split_and_add(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel that sums over examples, as an operation that XLA splits along all axes.

    Each device sums the examples that it has, for the entries that it has; one sum over the
    devices that have other examples of the same entries follows.

    Args:
        kernel: of rows [B, *dims] and weights [B], to [*dims].

    Example:
        >>> import jax.numpy as jnp
        >>> def total(rows, weights):
        ...     return jnp.einsum("b,bn->n", weights, rows)
        >>> split_and_add(total)(jnp.ones((2, 3)), jnp.ones(2)).tolist()
        [2.0, 2.0, 2.0]
    """

    @jax.jit
    def whole(rows: jax.Array, weights: jax.Array) -> jax.Array:
        return kernel(rows, weights)

    def partition(mesh: Any, arguments: Any, result: Any) -> Any:
        given = arguments[0]
        batch, *dims = whole_parts(spec_of(given.sharding, mesh), given.shape, mesh)

        def part(rows: jax.Array, weights: jax.Array) -> jax.Array:
            own = kernel(rows, weights)
            return own if batch is None else jax.lax.psum(own, batch)

        own = PartitionSpec(batch, *dims), PartitionSpec(batch), PartitionSpec(*dims)
        *operands, made = (NamedSharding(mesh, spec) for spec in own)
        return mesh, part, made, tuple(operands)

    def rule(mesh: Any, operands: Any, results: Any) -> SdyShardingRule:
        dims = [f"d{n}" for n in range(len(operands[0].shape) - 1)]
        given = ArrayMapping("batch", *dims), ArrayMapping("batch")
        return SdyShardingRule(given, (ArrayMapping(*dims),), reduction_factors=("batch",))

    operation = custom_partitioning(whole)
    operation.def_partition(partition=partition, decode_shardings=False, sharding_rule=rule)

    def run(rows: jax.Array, weights: jax.Array) -> jax.Array:
        if AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types:
            made: jax.Array = without_types(kernel)(rows, weights)
            return made
        typed = jax.typeof(rows).sharding
        if AxisType.Explicit in typed.mesh.axis_types:
            spec: tuple[Any, ...] = tuple(typed.spec)
            batch, *dims = spec + (None,) * (rows.ndim - len(spec))

            def part(rows: jax.Array, weights: jax.Array) -> jax.Array:
                own = kernel(rows, weights)
                return own if batch is None else jax.lax.psum(own, batch)

            return jax.shard_map(
                part,
                mesh=typed.mesh,
                in_specs=(PartitionSpec(batch, *dims), PartitionSpec(batch)),
                out_specs=PartitionSpec(*dims),
                check_vma=False,
            )(rows, weights)
        made = operation(rows, weights)
        return made

    return run
