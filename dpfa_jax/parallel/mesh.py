"""Meshes by name, and how arrays lie on them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

DATA, MODEL = "data", "model"


def parse_mesh(text: str) -> dict[str, int]:
    """``'data=4,model=2'`` as sizes by axis.

    Raises:
        ValueError: for another form, an axis without a meaning here, one that comes twice, or a
            size below 1.

    Example:
        >>> parse_mesh("data=4,model=2")
        {'data': 4, 'model': 2}
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (piece.strip() for piece in part.partition("="))
        if name not in (DATA, MODEL) or name in sizes or not size.isdecimal() or int(size) < 1:
            raise ValueError(
                f"mesh={text!r}: allowed are 'data=N', 'model=N' or both with a comma, N a whole "
                "number >= 1."
            )
        sizes[name] = int(size)
    return sizes


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh whose axes XLA splits arrays over by itself (``Auto``).

    Args:
        sizes: of each axis.
        devices: to use; None means all, of all processes, and the sizes must fit.

    Raises:
        ValueError: if the sizes ask for another number of devices than there are.

    Example:
        >>> make_mesh({"data": 1}).shape
        OrderedDict({'data': 1})
    """
    given = list(jax.devices() if devices is None else devices)
    wanted = math.prod(sizes.values())
    if wanted != len(given):
        raise ValueError(
            f"mesh={dict(sizes)}: needs {wanted} devices; there are {len(given)}. Allowed are "
            "sizes whose product is that."
        )
    if devices is not None:
        return Mesh(
            np.array(given).reshape(tuple(sizes.values())),
            tuple(sizes),
            axis_types=(AxisType.Auto,) * len(sizes),
        )
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes)
    )


def fsdp_spec(shape: Sequence[int], ways: int, axis: str = DATA) -> PartitionSpec:
    """How fully sharded training splits one array: along one dimension, into equal parts.

    The first dimension, if it divides: noise is then made where it is used, without any
    exchange. Else the longest that divides; else none.

    Example:
        >>> fsdp_spec((50304, 768), 8), fsdp_spec((3, 64), 8), fsdp_spec((3,), 8)
        (P('data',), P(None, 'data'), P())
    """
    fitting = [d for d, n in enumerate(shape) if n and n % ways == 0]
    if not fitting or ways == 1:
        return PartitionSpec()
    chosen = 0 if fitting[0] == 0 else max(fitting, key=lambda d: shape[d])
    return PartitionSpec(*[None] * chosen, axis)


def _size(mesh: Mesh, axis: str) -> int:
    if axis not in mesh.shape:
        raise ValueError(
            f"mesh has the axes {tuple(mesh.axis_names)}: one named {axis!r} is needed, along "
            "which the batch is split."
        )
    return int(mesh.shape[axis])


def fsdp_shardings(tree: PyTree, mesh: Mesh, axis: str = DATA) -> PyTree:
    """Parameters, gradients or an optimiser's state, each array split over ``axis``.

    Args:
        tree: arrays, or their ``jax.ShapeDtypeStruct``.
        mesh: has the axis.
        axis: along which the batch is split too.

    Returns:
        The tree with a ``NamedSharding`` in place of each array.

    Raises:
        ValueError: if the mesh does not have the axis.
    """
    ways = _size(mesh, axis)

    def one(x: Any) -> NamedSharding:
        return NamedSharding(mesh, fsdp_spec(x.shape, ways, axis))

    return jax.tree.map(one, tree)


def parameter_shardings(tree: PyTree, mesh: Mesh, *, fsdp: bool = False) -> PyTree:
    """Parameters, or an optimiser's state, over a mesh with the axes ``data`` and ``model``.

    Matrices are split over ``model`` along their last dimension, if it divides. With ``fsdp``
    every array is split over ``data`` too, along the first dimension left that divides.

    Args:
        tree: arrays, or their ``jax.ShapeDtypeStruct``.
        mesh: of these two axes, or of ``data`` alone.
        fsdp: whether no device holds all parameters.

    Returns:
        The tree with a ``NamedSharding`` in place of each array.

    Raises:
        ValueError: if the mesh has no axis ``data``.
    """
    data, model = _size(mesh, DATA), mesh.shape.get(MODEL, 1)

    def one(x: Any) -> NamedSharding:
        names: list[str | None] = [None] * len(x.shape)
        if model > 1 and len(x.shape) >= 2 and x.shape[-1] % model == 0:
            names[-1] = MODEL
        if fsdp and data > 1:
            free = [d for d, n in enumerate(x.shape) if names[d] is None and n and n % data == 0]
            if free:
                names[free[0]] = DATA
        while names and names[-1] is None:
            names.pop()
        return NamedSharding(mesh, PartitionSpec(*names))

    return jax.tree.map(one, tree)


def gathered(x: jax.Array, mesh: Mesh) -> jax.Array:
    """All of a parameter on every device, for the moment of its use in a loss.

    XLA finds by itself that fully sharded parameters have to be gathered; in some places it
    would rather gather activations, of all devices' examples (an embedding table, most of all).
    This leaves it no choice. Cast first: what travels has the dtype that is used. Inside
    ``jax.checkpoint`` the backward pass gathers again, and no device holds all layers.

    Example:
        >>> mesh = make_mesh({"data": 1}, jax.devices()[:1])
        >>> jax.jit(lambda w: gathered(w, mesh) * 2)(jax.numpy.ones(2)).tolist()
        [2.0, 2.0]
    """
    # Without the barrier XLA gathers first and casts what arrived.
    x = jax.lax.optimization_barrier(x)
    # Within clipped_grad the axes of an Explicit mesh are Auto.
    here = jax.sharding.get_abstract_mesh()
    over = NamedSharding(mesh if here.empty else here, PartitionSpec())
    return jax.lax.with_sharding_constraint(x, over)


def replicated(tree: PyTree, mesh: Mesh) -> PyTree:
    """The tree with, in place of each array, that every device holds all of it."""
    return jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), tree)
