"""Noise on several devices inside ``shard_map`` and ``pmap``: who counts from where.

There, code sees one device's part of the data, and the same key makes the same noise on
all devices. A release on several devices is that on one if every device counts its
positions from where its part begins; for that it must know what an axis splits.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import jax
from jax import lax

Meaning = Literal["batch", "heads", "key", "same"]
DeviceAxes = Mapping[str, Meaning]
_MEANINGS = ("batch", "heads", "key", "same")


class Position(NamedTuple):
    """Where this device's part lies.

    Attributes:
        part: its number, a traced int32 or 0.
        parts: how many there are.
    """

    part: jax.Array | int
    parts: int


def positions(
    rng: jax.Array, operands: Sequence[jax.Array], device_axes: DeviceAxes | None
) -> tuple[Position, Position]:
    """This device's part of the batch and of the heads, after checking that noise differs.

    Args:
        rng: the call's key.
        operands: the call's data.
        device_axes: what the caller says of the axes of ``shard_map`` or ``pmap``: they split
            the ``'batch'`` or the ``'heads'`` (and the key is the same on all), or every
            device has a ``'key'`` of its own, or data and key are the ``'same'`` on all.

    Raises:
        ValueError: for an unknown axis or meaning; if data differs along an axis and neither
            the key nor ``device_axes`` does; if both do; and if an axis is not named where JAX
            does not say what differs (``pmap``, ``check_vma=False``).
    """
    manual = tuple(map(str, jax.sharding.get_abstract_mesh().manual_axes))
    named = dict(device_axes or {})
    for axis, meaning in named.items():
        if axis not in manual:
            raise ValueError(
                f"device_axes={named!r}: {axis!r} is no axis of shard_map or pmap here; these "
                f"have {manual}."
            )
        if meaning not in _MEANINGS:
            raise ValueError(f"device_axes={named!r}: allowed are the values {_MEANINGS}.")
    split = {axis for axis, meaning in named.items() if meaning in ("batch", "heads")}
    if all(axis in _varying(lax.axis_index(axis)) for axis in manual):
        own_keys = _varying(rng)
        missing = frozenset().union(*map(_varying, operands)) - own_keys - split
        if missing:
            axes = ", ".join(sorted(map(str, missing)))
            raise ValueError(
                f"rng: the data differs along the mesh axis {axes} and the key does not, so every "
                "device would add the same noise. Say what the axis splits, device_axes="
                "{axis: 'batch'} or {axis: 'heads'}, or use "
                "jax.random.fold_in(rng, jax.lax.axis_index(axis))."
            )
        if own_keys & split:
            axes = ", ".join(sorted(map(str, own_keys & split)))
            raise ValueError(
                f"rng: the key differs along the mesh axis {axes}, which device_axes={named!r} "
                "counts along. Give all devices the same key."
            )
    elif set(manual) - set(named):
        raise ValueError(
            f"device_axes={named!r}: in pmap and with check_vma=False JAX does not say which data "
            f"differs between devices. Say it for {tuple(sorted(set(manual) - set(named)))}: "
            "'batch', 'heads', 'key' (each device has its own) or 'same'."
        )

    def position(meaning: Meaning) -> Position:
        index: jax.Array | int = 0
        count = 1
        for axis, own in named.items():
            if own == meaning:
                size = lax.axis_size(axis)
                index, count = index * size + lax.axis_index(axis), count * size
        return Position(index, count)

    return position("batch"), position("heads")


def _varying(x: jax.Array) -> frozenset[str]:
    # No default: without this attribute the check would pass everything in silence.
    return frozenset(jax.typeof(x).manual_axis_type.varying)
