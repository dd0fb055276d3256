"""Arrays inside ``shard_map``: along which mesh axes their values differ between devices.

``shard_map`` keeps that in an array's type. Loops need carries of one type, kernels must say
the type of their results, and the gradient of a value that is the same on all devices is a
sum over them: so what is meant for one device has to be *varying* first.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def varying_axes(*arrays: Any) -> frozenset[str]:
    """The mesh axes along which one of the arrays differs between devices, as typed.

    Example:
        >>> varying_axes(jnp.zeros(3), 1.0)
        frozenset()
    """
    types = [jax.typeof(x).manual_axis_type for x in arrays if hasattr(x, "dtype")]
    return frozenset().union(*(t.varying for t in types if t is not None))


def vary(tree: Any, axes: Iterable[str]) -> Any:
    """The tree with every array's type varying along (at least) the axes; values are kept."""
    wanted = frozenset(axes)
    if not wanted:
        return tree

    def one(x: Any) -> Any:
        missing = wanted - varying_axes(x)
        return jax.lax.pcast(jnp.asarray(x), tuple(sorted(missing)), to="varying") if missing else x

    return jax.tree.map(one, tree)


def shape_like(
    shape: Sequence[int], dtype: Any, *operands: Any, weak_type: bool = False
) -> jax.ShapeDtypeStruct:
    """The type of an array that is made from the operands: varying where one of them is."""
    axes = varying_axes(*operands)
    more: dict[str, Any] = {}
    if axes:
        like = next(jax.typeof(x) for x in operands if varying_axes(x))
        more["manual_axis_type"] = jax.sharding.ManualAxisType(varying=axes)
        more["sharding"] = jax.sharding.NamedSharding(like.sharding.mesh, jax.P())
    return jax.ShapeDtypeStruct(tuple(shape), dtype, weak_type=weak_type, **more)
