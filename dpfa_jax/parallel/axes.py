"""Under which of JAX's three ways to use several devices a function is being traced.

* ``jit`` over a mesh of ``Auto`` axes: arrays are whole, XLA splits them. Nothing to see here.
* ``jit`` over a mesh of ``Explicit`` axes (``jax.make_mesh``): types say how arrays are split.
* ``shard_map`` and ``pmap``: each device sees its part; axes are ``Manual``. Unless checks are
  off (``check_vma=False``, and ``pmap`` always), types say along which axes values differ.
"""

from collections.abc import Sequence

import jax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from jaxtyping import PyTree

from pallas_kernels.manual import varying_axes

AxisNames = str | Sequence[str]


def manual_axes() -> tuple[str, ...]:
    """The axes over which the code being traced is one of several devices' programs.

    Example:
        >>> manual_axes()
        ()
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in kinds if kind == AxisType.Manual)


def types_tell(axis: str) -> bool:
    """Whether types say which values differ between devices along a manual axis."""
    return bool(varying_axes(jax.lax.axis_index(axis)))


def explicit_mesh(tree: PyTree) -> AbstractMesh | None:
    """The mesh of arrays whose types say how they are split; None where no type does.

    Raises:
        ValueError: for a mesh that mixes ``Explicit`` axes with others.
    """
    for x in jax.tree.leaves(tree):
        if not isinstance(x, jax.Array) or manual_axes():
            continue
        mesh = jax.typeof(x).sharding.mesh
        kinds = set(mesh.axis_types)
        if AxisType.Explicit not in kinds:
            continue
        if len(kinds) > 1:
            raise ValueError(
                f"mesh axes {mesh.axis_names} are of the types {mesh.axis_types}: allowed are "
                "axes that are all Auto or all Explicit."
            )
        return mesh
    return None


def whole_sum(
    updates: PyTree,
    key: jax.Array,
    axis_name: AxisNames | None,
    specs: Sequence[PartitionSpec] | None,
) -> PyTree:
    """The sum over all devices, or an error where that is not sure: what noise is added to.

    Noise that each device adds to its own part of a sum is added as often as there are
    devices; and with a key of its own, each device would release the sum another time.

    Args:
        updates: sums.
        key: the noise key.
        axis_name: the manual axes over which the sums are still to be added up; ``()`` says
            that this was done; None lets types tell.
        specs: of each leaf, how it is split over manual axes; None: not at all.

    Raises:
        ValueError: outside ``shard_map`` and ``pmap`` with an ``axis_name``, for an axis that is
            not there, and inside them where a sum is not over all devices or cannot be told, or
            ``specs`` split what is the same on all devices (which each would release).
    """
    names = () if axis_name is None else (axis_name,) if isinstance(axis_name, str) else axis_name
    manual = manual_axes()
    absent = [n for n in names if n not in manual]
    if absent:
        raise ValueError(
            f"axis_name={axis_name!r}: no such axis here (there are {manual}). Allowed are axes "
            "of shard_map or pmap; under jit alone, where a sum is over all devices already, None."
        )
    if not manual:
        if specs is not None:
            raise ValueError("specs: allowed inside shard_map only; jit finds them by itself.")
        return updates
    leaves, structure = jax.tree.flatten(updates)
    given = [PartitionSpec()] * len(leaves) if specs is None else specs
    splits = [_axes_of(spec) for spec in given]
    if both := sorted(set(names) & frozenset().union(*splits)):
        raise ValueError(
            f"specs: a sum is split along {both}, and axis_name={axis_name!r} adds it up along the "
            "same, after which every device would release the whole with noise of its own. "
            "Allowed are different axes; jax.lax.psum_scatter adds up and splits."
        )
    if not all(types_tell(axis) for axis in manual):
        if axis_name is None:
            raise ValueError(
                f"axis_name=None under pmap, or shard_map with check_vma=False, over {manual}: "
                "types do not tell here whether the sum is over all devices. Allowed is "
                f"axis_name={manual[0]!r} (each device gives its own sum; they are added up here), "
                "or axis_name=() for a sum over all devices."
            )
    elif varying_axes(key):
        raise ValueError(
            f"rng: the key differs along {sorted(varying_axes(key))}, so that every device would "
            "add noise of its own to the same sum. All devices need the same key."
        )
    else:
        for split, x in zip(splits, leaves, strict=True):
            differs = varying_axes(x)
            whole = sorted(a for a in split - differs if jax.lax.axis_size(a) > 1)
            if whole:
                raise ValueError(
                    f"specs: a sum is the same along {whole}, not split, so every device would "
                    "release it with noise of its own. Allowed are the axes along which each "
                    "device has a part."
                )
            done = sorted(set(names) - differs)
            if done:
                raise ValueError(
                    f"axis_name={axis_name!r}: the sum is the same along {done}, so it was added "
                    "up before; a second time would multiply it by the number of devices."
                )
            left = sorted(differs - set(names) - split)
            if left:
                raise ValueError(
                    f"axis_name={axis_name!r}: the sum differs along {left}, so it is one device's "
                    "part, and every device would add the noise of the whole. Allowed is "
                    f"axis_name={left[0]!r}, or a jax.lax.psum before."
                )
    if names:
        leaves = jax.lax.psum(leaves, tuple(names))
    return jax.tree.unflatten(structure, leaves)


def _axes_of(spec: PartitionSpec) -> frozenset[str]:
    entries = [e if isinstance(e, tuple) else (e,) for e in spec if e is not None]
    return frozenset(axis for entry in entries for axis in entry)


def agreed_words(words: jax.Array) -> jax.Array:
    """The key words of the first device, on all of them, where types do not tell.

    So that devices whose states came apart still make one noise.
    """
    axes = tuple(axis for axis in manual_axes() if not types_tell(axis))
    if not axes:
        return words
    first = jax.lax.axis_index(axes) == 0
    return jax.lax.psum(jax.numpy.where(first, words, jax.numpy.zeros_like(words)), axes)
