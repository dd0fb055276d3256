"""Linear views of a parameter: from a leaf to what an operation reads, and back.

Between a trainable leaf and the matrix product that uses it lie casts, transposes,
reshapes and slices. A :class:`View` says which, so that a gradient with respect to what
was read becomes a gradient with respect to the leaf. Every step moves entries about and
changes none, so both have the same norm.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Permute(NamedTuple):
    """``jnp.transpose(x, order)``."""

    order: tuple[int, ...]


class Reshape(NamedTuple):
    """Row-major reshape, from ``before``."""

    before: tuple[int, ...]


class Slice(NamedTuple):
    """``x[start:limit]`` in every dimension, of an array of shape ``before``."""

    before: tuple[int, ...]
    start: tuple[int, ...]
    limit: tuple[int, ...]


class Unstack(NamedTuple):
    """One step of a ``scan`` reads one row: the leading axis becomes the scan's."""


Step = Permute | Reshape | Slice | Unstack


@dataclasses.dataclass(frozen=True)
class View:
    """A value that is a rearranged part of one leaf.

    Attributes:
        leaf: number of the leaf.
        steps: from the leaf to the *base*, an array of shape ``base_shape``.
        base_shape: its shape.
        order: the value is the base, transposed by this.
        stacked: depths of the scans whose steps read different rows of the leaf.
    """

    leaf: int
    steps: tuple[Step, ...]
    base_shape: tuple[int, ...]
    order: tuple[int, ...]
    stacked: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """The value's shape."""
        return tuple(self.base_shape[i] for i in self.order)

    def _settled(self) -> tuple[Step, ...]:
        """The steps, with the transposition made one of them."""
        if self.order == tuple(range(len(self.order))):
            return self.steps
        return (*self.steps, Permute(self.order))

    def _fresh(self, step: Step, shape: tuple[int, ...], stacked: tuple[int, ...]) -> "View":
        steps = (*self._settled(), step)
        return View(self.leaf, steps, shape, tuple(range(len(shape))), stacked)

    def transposed(self, order: tuple[int, ...]) -> "View":
        """The view after ``lax.transpose``."""
        return dataclasses.replace(self, order=tuple(self.order[i] for i in order))

    def reshaped(self, shape: tuple[int, ...]) -> "View":
        """The view after a reshape; itself if the shape stays."""
        return (
            self if shape == self.shape else self._fresh(Reshape(self.shape), shape, self.stacked)
        )

    def sliced(self, start: tuple[int, ...], limit: tuple[int, ...]) -> "View":
        """The view after a slice of stride 1."""
        shape = tuple(b - a for a, b in zip(start, limit, strict=True))
        return self._fresh(Slice(self.shape, start, limit), shape, self.stacked)

    def unstacked(self, depth: int) -> "View":
        """What one step of the scan at ``depth`` reads."""
        return self._fresh(Unstack(), self.shape[1:], (*self.stacked, depth))


def to_leaf(gradient: jax.Array, steps: tuple[Step, ...], scans: int) -> jax.Array:
    """A gradient with respect to the base as one with respect to the leaf.

    Args:
        gradient: ``[*stacked scans, *base_shape]``.
        steps: of the view.
        scans: how many of the leading axes are scans.
    """
    for step in reversed(steps):
        lead = gradient.shape[:scans]
        match step:
            case Unstack():
                scans -= 1
            case Permute(order):
                inverse = sorted(range(len(order)), key=order.__getitem__)
                axes = (*range(scans), *(scans + i for i in inverse))
                gradient = jnp.transpose(gradient, axes)
            case Reshape(before):
                gradient = gradient.reshape(*lead, *before)
            case Slice(before, start, limit):
                width = [(a, n - b) for a, b, n in zip(start, limit, before, strict=True)]
                gradient = jnp.pad(gradient, [*[(0, 0)] * scans, *width])
    return gradient


def disjoint(first: tuple[Step, ...], second: tuple[Step, ...]) -> bool:
    """Whether two views are seen, from their slices of one array, to share no entry."""
    for a, b in zip(first, second, strict=False):
        if a == b:
            continue
        if not (isinstance(a, Slice) and isinstance(b, Slice) and a.before == b.before):
            return False
        return any(
            min(p, q) <= max(r, s)
            for p, q, r, s in zip(a.limit, b.limit, a.start, b.start, strict=True)
        )
    return False
