"""Kernel calls under ``jit`` with sharded operands.

The partitioner of XLA cannot look into a kernel, and would gather its operands on every
device. Here it is told that batch elements and key heads are independent: each device runs
the kernel on those that it has, and nothing travels. A kernel on some of the heads counts
its noise from the number of its first one; batch elements bring their counters along.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels.partition import spec_of

# The axes of what kernels take and give: batch, query heads, key heads; what is not in here
# stays whole on each device. Factors of values come as one array or as two, None as none.
_QUERY, _KEY, _ROW = "b.n.", "b.k.", "bn."
_OPERANDS = {
    "value_scale": (_KEY,),
    "row_dots": (_QUERY, _QUERY),
    "forward": (_QUERY, _KEY, _KEY, "bk.", "b.", "b"),
    "backward": (_QUERY, _KEY, _KEY, "bk.", "b", _ROW, _ROW, _QUERY),
}
_RESULTS = {
    "value_scale": ("bk.",),
    "row_dots": (_ROW,),
    "forward": (_QUERY, _ROW, _QUERY),
    "backward": (_QUERY, _KEY, _KEY),
}
# Where the first head's counter stands among a batch element's words of noise.
_FIRST_HEAD = 9


def partitioned(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A back end's function ``name`` that runs where its operands' batch and heads are.

    Args:
        name: of :class:`pallas_kernels.attention.fused.Backend`.
        kernel: the function, its static arguments bound; it takes arrays, None, and
            tuples of arrays.
    """
    if name not in _OPERANDS:
        return kernel

    def run(*operands: Any) -> Any:
        if jax.sharding.get_abstract_mesh().manual_axes:
            return _in_shard_map(kernel, operands)
        leaves, tree = jax.tree.flatten(operands)
        axes = _axes(_OPERANDS[name], operands)
        heads = _heads(axes, leaves)
        axes.append("n")

        # The last operand, the heads' numbers, is for parts alone.
        def whole(*flat: Any) -> Any:
            return kernel(*jax.tree.unflatten(tree, flat[:-1]))

        def part(*flat: Any) -> Any:
            own = list(jax.tree.unflatten(tree, flat[:-1]))
            if name == "forward" and own[4] is not None:
                own[4] = own[4].at[:, _FIRST_HEAD].add(flat[-1][0])
            return kernel(*own)

        def rule(mesh: Any, operands: Any, results: Any) -> tuple[str, dict[str, Any]]:
            return _rule((axes, _axes(_RESULTS[name], tuple(results))), heads)

        def partition(mesh: Any, operands: Any, results: Any) -> tuple[Any, ...]:
            found = jax.tree.leaves(results)
            sides = axes, _axes(_RESULTS[name], tuple(found))
            mine, theirs = _shardings(mesh, sides, heads, (*operands, *found))
            return mesh, part, jax.tree.unflatten(jax.tree.structure(results), theirs), mine

        call = custom_partitioning(whole)
        call.def_partition(partition=partition, decode_shardings=False, sharding_rule=rule)
        return call(*leaves, jnp.arange(heads[0], dtype=jnp.uint32))

    return run


def _in_shard_map(kernel: Callable[..., Any], operands: tuple[Any, ...]) -> Any:
    """The call where all that is here is this device's own."""
    if any(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(operands)):
        raise ValueError(
            "implementation: inside shard_map kernels need check_vma=False, because they do not "
            "say along which axes their results differ (name the axes in device_axes); "
            "implementation='xla' runs with check_vma=True."
        )
    return kernel(*operands)


def _axes(patterns: Sequence[str], values: tuple[Any, ...]) -> list[str]:
    """The pattern of each array; the second of two factors has no last axis."""
    if len(values) > len(patterns):  # two factors
        patterns = [*patterns, *patterns]
    return [
        pattern[: _rank(x)]
        for pattern, value in zip(patterns, values, strict=False)
        for x in jax.tree.leaves(value)
    ]


def _rank(x: Any) -> int:
    return int(x.rank if hasattr(x, "rank") else len(x.shape))


def _heads(axes: Sequence[str], leaves: Sequence[Any]) -> tuple[int, int]:
    """How many query and key heads a call has; as many of each where one kind is not there."""
    found = {
        a: x.shape[p.index(a)] for p, x in zip(axes, leaves, strict=True) for a in "nk" if a in p
    }
    return found.get("n", found.get("k", 1)), found.get("k", found.get("n", 1))


def _names(axes: Sequence[Sequence[str]], heads: tuple[int, int]) -> list[list[str]]:
    """The factors of every axis, in the notation of a sharding rule."""
    numbers = iter(range(1000))
    query_heads = "k" if heads[0] == heads[1] else "(k g)"
    names = {"b": "b", "k": "k", "n": query_heads}
    return [
        [" ".join(names.get(a) or f"w{next(numbers)}" for a in pattern) for pattern in side]
        for side in axes
    ]


def _rule(axes: Sequence[Sequence[str]], heads: tuple[int, int]) -> tuple[str, dict[str, Any]]:
    """The sharding rule: which axes go together, and which no device may have a part of."""
    names = _names(axes, heads)
    every = " ".join(" ".join(side) for side in names).split()
    options: dict[str, Any] = {
        "need_replication_factors": tuple(n for n in every if n.startswith("w"))
    }
    if heads[0] != heads[1]:
        options["g"] = heads[0] // heads[1]
    return " -> ".join(", ".join(side) for side in names), options


def _shardings(
    mesh: Any,
    axes: Sequence[Sequence[str]],
    heads: tuple[int, int],
    arrays: Sequence[Any],
) -> tuple[tuple[NamedSharding, ...], ...]:
    """Which parts of operands and of results each device has."""
    # A mesh axis is split itself where more devices share the query heads than there are key heads.
    found = [spec_of(x.sharding, mesh) for x in arrays]

    def of(letters: str) -> Any:
        """The mesh axes of the first axis so named that has any."""
        for spec, pattern in zip(found, (*axes[0], *axes[1]), strict=True):
            for letter, names in zip(pattern, spec, strict=False):
                if letter in letters and names is not None:
                    return names
        return None

    def size(names: Any) -> int:
        every = () if names is None else names if isinstance(names, tuple) else (names,)
        return math.prod(mesh.shape[n] for n in every)

    batch, over_heads = of("b"), of("nk")
    # A device needs whole groups of query heads. Where it cannot have them, it does all heads.
    if heads[1] % size(over_heads):
        over_heads = None
    if arrays[0].shape[0] % size(batch):
        batch = None
    where = {"b": batch, "n": over_heads, "k": over_heads}
    return tuple(
        tuple(NamedSharding(mesh, PartitionSpec(*map(where.get, pattern))) for pattern in side)
        for side in axes
    )
