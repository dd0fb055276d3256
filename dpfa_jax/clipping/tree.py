"""Norms and clipping of gradient trees, float32 throughout."""

import dataclasses
import math
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, PyTree

from pallas_kernels.weighted_sum import weighted_sum

# A clipped gradient is aimed this much below C, so that the rounding of the norm and of
# the product leaves it at most C.
MARGIN = 2.0**-20


class Factors(NamedTuple):
    """What clipping does with each example.

    Attributes:
        weights: of each group, the factor f.
        keep: whether the example counts at all.
        norms: of its whole gradient, whether it counts or not.
    """

    weights: list[Float32[Array, "b"]]
    keep: Bool[Array, "b"]
    norms: Float32[Array, "b"]


@dataclasses.dataclass(frozen=True)
class Clip:
    """How norms become factors.

    Attributes:
        l2_clip_norm: C, the bound on one example's whole contribution; where it is adapted,
            and in ``verify``, a float32 scalar.
        groups: of each leaf, its group's number. k groups are clipped by themselves, each
            to C/√k.
        automatic: γ of automatic clipping, factor (C/√k)/(‖g‖ + γ); None clips.
        margin: how much below its bound a clipped gradient is aimed.
    """

    l2_clip_norm: float | jax.Array
    groups: tuple[int, ...]
    automatic: float | None = None
    margin: float = MARGIN

    def factors(
        self,
        squares: Sequence[Float32[Array, "b"]],
        is_padding_example: Bool[Array, "b"] | None = None,
    ) -> "Factors":
        """Every example's factors.

        Padding examples, and examples with a norm that is not finite, have the factor 0.

        Args:
            squares: of each leaf, every example's squared norm.
            is_padding_example: True for examples that contribute nothing.
        """
        count = max(self.groups) + 1
        norms = []
        for group in range(count):
            mine = [s for s, g in zip(squares, self.groups, strict=True) if g == group]
            norms.append(jnp.sqrt(sum(mine[1:], mine[0])))
        keep = jnp.isfinite(norms[0])
        for norm in norms[1:]:
            keep = keep & jnp.isfinite(norm)
        if is_padding_example is not None:
            keep = keep & ~is_padding_example
        target = jnp.asarray(
            self.l2_clip_norm * ((1.0 - self.margin) / math.sqrt(count)), jnp.float32
        )

        def factor(norm: jax.Array) -> jax.Array:
            if self.automatic is None:
                scale = jnp.minimum(1.0, target / jnp.where(norm > 0.0, norm, 1.0))
            else:
                scale = target / (norm + jnp.float32(self.automatic))
            return jnp.where(keep, scale, 0.0)

        whole = jnp.sqrt(sum((jnp.square(norm) for norm in norms[1:]), jnp.square(norms[0])))
        return Factors([factor(norm) for norm in norms], keep, whole)


def squared_norm(leaf: Array) -> Float32[Array, "b"]:
    """Each example's Σ g² over one leaf."""
    return jnp.sum(jnp.square(leaf.astype(jnp.float32)), axis=tuple(range(1, leaf.ndim)))


def per_example_norms(grads: PyTree[Array]) -> Float32[Array, "b"]:
    """The L2 norm of each example's gradient, over all leaves together."""
    squares = [squared_norm(leaf) for leaf in jax.tree.leaves(grads)]
    return jnp.sqrt(sum(squares[1:], squares[0]))


def onto(start: Sequence[Array] | None, sums: Sequence[Array]) -> list[Array]:
    """``start`` + ``sums``, where there is a start."""
    return list(sums) if start is None else [a + b for a, b in zip(start, sums, strict=True)]


def clip_and_sum(
    grads: PyTree[Array], clip: Clip | float, is_padding_example: Bool[Array, "b"] | None
) -> PyTree[Array]:
    """Σ_b min(1, C/‖g_b‖) g_b over the leading axis, in float32.

    Padding examples, and examples whose norm is not finite, contribute exactly zero.
    """
    return clip_and_sum_with_norms(grads, clip, is_padding_example)[0]


def clip_and_sum_with_norms(
    grads: PyTree[Array], clip: Clip | float, is_padding_example: Bool[Array, "b"] | None
) -> tuple[PyTree[Array], Float32[Array, "b"]]:
    """:func:`clip_and_sum`, and the norms before clipping."""
    leaves, structure = jax.tree.flatten(grads)
    if not isinstance(clip, Clip):
        clip = Clip(clip, (0,) * len(leaves))
    weights, _, norms = clip.factors([squared_norm(x) for x in leaves], is_padding_example)
    sums = [weighted_sum(x, weights[g]) for x, g in zip(leaves, clip.groups, strict=True)]
    return jax.tree.unflatten(structure, sums), norms


def check_clip_norm(l2_clip_norm: Any) -> float:
    """The clip norm as a float, or ValueError unless it is from 1e-9 to 1e9."""
    is_number = isinstance(l2_clip_norm, numbers.Real) and not isinstance(l2_clip_norm, bool)
    # Within these, squares of a norm neither vanish nor overflow in float32.
    if not (is_number and 1e-9 <= l2_clip_norm <= 1e9):
        raise ValueError(f"l2_clip_norm={l2_clip_norm!r}: allowed is a number from 1e-9 to 1e9.")
    return float(l2_clip_norm)
