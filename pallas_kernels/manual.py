"""Arrays inside ``shard_map``: along which mesh axes their values differ between devices.

``shard_map`` keeps that in an array's type. Loops need carries of one type, kernels must say
the type of their results, and the gradient of a value that is the same on all devices is a
sum over them: so what is meant for one device has to be *varying* first.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
from jax.interpreters import mlir


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


def result(shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
    """The type of a kernel's result, for calls in :func:`without_types`: it does not vary."""
    kind = jax.sharding.ManualAxisType()
    return jax.ShapeDtypeStruct(tuple(shape), dtype, manual_axis_type=kind)


def without_types(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel for operands whose types may vary; its own program sees no such types.

    The inside of a Pallas kernel is one device's in any case, and its loops would have to be
    written for types that mean nothing there. The results vary where an operand does.
    """

    def run(*operands: Any) -> Any:
        axes = varying_axes(*operands)
        if not axes:
            return kernel(*operands)
        return vary(kernel(*map(_forget.bind, operands)), axes)

    return run


_forget = jax.extend.core.Primitive("forget_varying")
_forget.def_impl(lambda x: x)
_forget.def_abstract_eval(lambda x: x.update(manual_axis_type=jax.sharding.ManualAxisType()))
mlir.register_lowering(_forget, lambda _, x: [x])


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
