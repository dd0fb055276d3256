"""Gaussians for arrays that several devices hold: each device makes its own part.

A stream is a function of its key and counters, so a device that holds a part of an array
begins in the middle of the stream. Where the part is a run of the flat array (split along
its first axis) that is all. Where it is not, each device makes a run of the same size and
one all-to-all gives every device its columns. Either way no device makes more than its
share, rounded up to a row or a tile, and the numbers are those of one device, bit for bit.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import ArrayMapping, SdyShardingRule, custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float32, UInt32

from pallas_kernels.partition import spec_of
from pallas_kernels.prng.normal import STREAM_TILE
from pallas_kernels.prng.streams import Nonce, normal_streams

Axes = tuple[str, ...]


def axes_by_dimension(spec: PartitionSpec | None, ndim: int) -> list[Axes]:
    """Of each dimension, the mesh axes along which it is split.

    Example:
        >>> axes_by_dimension(PartitionSpec(("a", "b"), None, "c"), 4)
        [('a', 'b'), (), ('c',), ()]
    """
    entries = [] if spec is None else list(spec)
    if len(entries) > ndim:
        raise ValueError(f"spec={spec}: names {len(entries)} dimensions of an array of {ndim}.")
    named = [() if e is None else (e,) if isinstance(e, str) else tuple(e) for e in entries]
    return named + [()] * (ndim - len(named))


def local_normals(
    key_words: UInt32[Array, "8"],
    shapes: Sequence[tuple[int, ...]],
    nonces: Sequence[Nonce],
    specs: Sequence[PartitionSpec | None],
    mesh_shape: Mapping[str, int],
) -> list[Float32[Array, "..."]]:
    """This device's parts of some arrays of Gaussians. For the inside of ``shard_map``.

    Args:
        key_words: uint32[8], the same on all devices.
        shapes: of the whole arrays.
        nonces: of each array, the name of its stream.
        specs: how each array is split; None is not at all.
        mesh_shape: sizes of the mesh's axes.

    Returns:
        float32, each the part of ``normal_stream(key_words, size, nonce).reshape(shape)``
        that this device holds. What pads an uneven split means nothing.
    """
    plans = [
        _Part(shape, axes_by_dimension(spec, len(shape)), mesh_shape)
        for shape, spec in zip(shapes, specs, strict=True)
    ]
    runs = [plan.begin() for plan in plans]
    made = normal_streams(
        key_words,
        [
            (p.count + (skip is not None) * (STREAM_TILE - 1), nonce)
            for p, (_, skip), nonce in zip(plans, runs, nonces, strict=True)
        ],
        first_tiles=[tile for tile, _ in runs],
    )
    return [
        plan.finish(x if skip is None else jax.lax.dynamic_slice(x, (skip,), (plan.count,)))
        for plan, x, (_, skip) in zip(plans, made, runs, strict=True)
    ]


class _Part:
    """Which run of the flat array this device makes, and how it becomes its part."""

    def __init__(
        self, shape: tuple[int, ...], by_dimension: list[Axes], mesh_shape: Mapping[str, int]
    ):
        split = [tuple(a for a in axes if mesh_shape[a] > 1) for axes in by_dimension]
        ways = [math.prod(mesh_shape[a] for a in axes) for axes in split]
        self.local = tuple(-(-n // k) for n, k in zip(shape, ways, strict=True))
        dimensions = [i for i, k in enumerate(ways) if k > 1]
        # (axes, distance between the beginnings of neighbouring devices' runs)
        self.strides: list[tuple[Axes, int]] = []
        lead = dimensions[0] if dimensions else None
        if lead is not None and math.prod(shape[:lead]) == 1:
            self.strides.append((split[lead], math.prod((self.local[lead], *shape[lead + 1 :]))))
            dimensions = dimensions[1:]
        self.exchange = [(i, split[i], ways[i]) for i in dimensions]
        if not dimensions:
            self.count = math.prod(self.local)
            return
        first = dimensions[0]
        self.rows, self.row_shape = math.prod(self.local[:first]), shape[first:]
        self.own_rows = -(-self.rows // math.prod(ways[i] for i in dimensions))
        self.count = self.own_rows * math.prod(self.row_shape)
        stride = self.count
        for _, axes, k in reversed(self.exchange):
            self.strides.append((axes, stride))
            stride *= k

    def begin(self) -> tuple[Any, Any]:
        """The first tile of the run, and how many numbers of it come before the run."""
        tile, skip, aligned = jnp.uint32(0), jnp.uint32(0), True
        if not self.strides:
            return 0, None
        for axes, stride in self.strides:
            index = jax.lax.axis_index(axes).astype(jnp.uint32)
            tile = tile + index * jnp.uint32(stride // STREAM_TILE)
            skip = skip + index * jnp.uint32(stride % STREAM_TILE)
            aligned = aligned and stride % STREAM_TILE == 0
        if aligned:
            return tile, None
        return tile + skip // STREAM_TILE, (skip % STREAM_TILE).astype(jnp.int32)

    def finish(self, run: jax.Array) -> jax.Array:
        """The run as this device's part."""
        if not self.exchange:
            return run.reshape(self.local)
        x = run.reshape(self.own_rows, *self.row_shape)
        offset = self.exchange[0][0] - 1
        for i, _, k in self.exchange:
            more = -x.shape[i - offset] % k
            if more:
                x = jnp.pad(x, [(0, more if d == i - offset else 0) for d in range(x.ndim)])
        for i, axes, _ in reversed(self.exchange):
            x = jax.lax.all_to_all(x, axes, split_axis=i - offset, concat_axis=0, tiled=True)
        return x[: self.rows].reshape(self.local)


@functools.cache
def _normals_like(nonces: tuple[Nonce, ...]) -> Any:
    """The operation for leaves of these names: partitioned as its operands are."""

    @jax.jit  # so that the kernels' tables are no constants of the operation's own program
    def whole(key_words: jax.Array, *leaves: jax.Array) -> list[jax.Array]:
        shapes = [x.shape for x in leaves]
        return local_normals(key_words, shapes, nonces, [None] * len(shapes), {})

    def partition(mesh: Any, arguments: Any, results: Any) -> Any:
        specs = [spec_of(r.sharding, mesh) for r in results]
        shardings = [NamedSharding(mesh, spec) for spec in specs]
        shapes = [a.shape for a in arguments[1:]]

        def local(key_words: jax.Array, *leaves: jax.Array) -> list[jax.Array]:
            return local_normals(key_words, shapes, nonces, specs, dict(mesh.shape))

        everywhere = NamedSharding(mesh, PartitionSpec())
        return mesh, local, shardings, (everywhere, *shardings)

    def rule(mesh: Any, operands: Any, results: Any) -> SdyShardingRule:
        named = [
            ArrayMapping(*(f"a{n}_{d}" for d in range(len(r.shape)))) for n, r in enumerate(results)
        ]
        return SdyShardingRule(
            (ArrayMapping("word"), *named), tuple(named), need_replication_factors=("word",)
        )

    operation = custom_partitioning(whole)
    operation.def_partition(partition=partition, decode_shardings=False, sharding_rule=rule)

    # Under vmap nothing is split: the lanes are made as one device makes them.
    # The outer jit is for arrays outside of any: it is what splits them.
    # XLA for TPUs cannot be told how to split an operation: there each chip makes all of a leaf
    # unless types say how it is split (Explicit axes, shard_map).
    @jax.jit
    def split(*arguments: jax.Array) -> Any:
        return jax.lax.platform_dependent(*arguments, tpu=whole, default=operation)

    mapped = jax.custom_batching.custom_vmap(split)

    @mapped.def_vmap
    def _(axis_size: int, in_batched: Any, *arguments: Any) -> Any:
        in_axes = [0 if batched else None for batched in in_batched]
        made = jax.vmap(whole, in_axes=in_axes, axis_size=axis_size)(*arguments)
        return made, [True] * len(made)

    return mapped


def normals_like(
    key_words: UInt32[Array, "8"], leaves: Sequence[Array], nonces: Sequence[Nonce]
) -> list[Float32[Array, "..."]]:
    """Gaussians of the leaves' shapes, split over devices as the leaves are.

    For plain ``jit``, where XLA decides how arrays are split: it asks for the part of each
    device when it has decided. Leaf n is ``normal_stream(key_words, size, nonces[n])``.

    Args:
        key_words: uint32[8], a key derived for this purpose alone.
        leaves: arrays whose shapes and shardings are taken; their values are not read.
        nonces: of each, three numbers below 2³² that name its stream.

    Returns:
        float32, one for each leaf.

    Example:
        >>> key = jnp.arange(8, dtype=jnp.uint32)
        >>> [x.shape for x in normals_like(key, [jnp.zeros((2, 3))], [(0, 0, 1)])]
        [(2, 3)]
    """
    return list(_normals_like(tuple(nonces))(key_words, *leaves))
