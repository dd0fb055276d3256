"""The engines: how the clipped sum of a batch is computed.

All take flat arrays and give float32 sums, one for each leaf. ``bookkeeping`` and
``per_layer`` are one forward and one backward pass; ``two_pass`` runs the backward pass
again and holds no cotangents; ``vmap`` is the reference.

Sources: the Gram form and the second pass are those of I. Goodfellow, Efficient
Per-Example Gradient Computations, 2015, and X. Li et al., Large Language Models Can Be
Strong Differentially Private Learners, 2022, section 4; one backward pass with kept
activations and cotangents is Z. Bu et al., Differentially Private Optimization on Large
Model at Small Cost, 2023 (book-keeping).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dpfa_jax.clipping.plan import Plan, layouts
from dpfa_jax.clipping.recognise import Site
from dpfa_jax.clipping.replay import Readings, read
from dpfa_jax.clipping.sites import (
    Block,
    Factor,
    factors,
    merged,
    own_terms,
    product_of,
    squared_norms,
    weighted_products,
)
from dpfa_jax.clipping.trace import float_dtypes
from dpfa_jax.clipping.tree import Clip, onto, squared_norm
from pallas_kernels.weighted_sum import weighted_sum

Sums = list[jax.Array]
# Of each example: the auxiliary outputs, and the norm before clipping.
Outputs = tuple[list[jax.Array], jax.Array]


@dataclasses.dataclass
class _Group:
    """Sites of one leaf and one layout, with what was read there.

    Where the plan says so, ``product`` holds the per-example product of the one dense site,
    whose block is not in ``blocks``.
    """

    leaf: int
    site: Site
    blocks: list[Block]
    product: jax.Array | None = None


def _groups(
    plan: Plan, sites: Sequence[Site], readings: Readings, products: bool = False
) -> list[_Group]:
    number = {site.path: n for n, site in enumerate(sites)}
    groups = []
    for leaf in dict.fromkeys(s.view.leaf for s in sites):
        for group in layouts(plan.trace.sites[leaf]):
            blocks = [
                factors(s, readings.operands[number[s.path]], readings.cotangents[number[s.path]])
                for s in group
            ]
            made = _Group(leaf, group[0], merged(blocks))
            if products and plan.leaves[leaf].product:
                (dense,) = (b for b in made.blocks if not (b[0].is_index or b[1].is_index))
                made.blocks = [b for b in made.blocks if b is not dense]
                made.product = product_of(dense)
            groups.append(made)
    return groups


def _sites(plan: Plan, leaves: Sequence[int]) -> list[Site]:
    return [site for leaf in leaves for site in plan.trace.sites[leaf]]


def _squares(
    plan: Plan, groups: Sequence[_Group], gradients: dict[int, jax.Array], count: int
) -> list[jax.Array]:
    """Each leaf's squared norms. Every leaf is in exactly one of the two, or unused."""
    squares: dict[int, jax.Array] = {leaf: squared_norm(g) for leaf, g in gradients.items()}
    own = own_terms([group.blocks for group in groups])
    for group, terms in zip(groups, own, strict=True):
        more = squared_norms(group.blocks, terms, group.product)
        squares[group.leaf] = squares[group.leaf] + more if group.leaf in squares else more
    for leaf in plan.of_form("unused"):
        squares[leaf] = jnp.zeros(count, jnp.float32)
    return [squares[leaf] for leaf in range(plan.trace.leaves)]


def _short_margin(plan: Plan, clip: Clip) -> Clip:
    """A margin for factors that are rounded to the dtype of short cotangents."""
    dtypes = [s.output.dtype for leaf in plan.recognised for s in plan.trace.sites[leaf]]
    widest = max((float(jnp.finfo(d).eps) / 2 for d in dtypes), default=0.0)
    return dataclasses.replace(clip, margin=max(clip.margin, widest))


def bookkeeping(
    plan: Plan,
    leaves: Sequence[Any],
    batch: list[Any],
    padding: jax.Array,
    clip: Clip,
    start: Sums | None = None,
) -> tuple[Sums, Outputs]:
    """One backward pass; activations and cotangents are kept until the norms are known.

    What is returned is ``start`` plus the clipped sum.
    With one group a leaf (``per_layer``), nothing has to be kept beyond its layer.
    """
    sites = _sites(plan, plan.of_form("gram"))
    clip = _short_margin(plan, clip)
    readings = read(plan.trace, sites, plan.of_form("materialised"), leaves, batch)
    # What is kept is what is measured: the norm is that of the rounded gradient.
    kept_as = {leaf: plan.leaves[leaf].dtype or g.dtype for leaf, g in readings.gradients.items()}
    gradients = {leaf: g.astype(kept_as[leaf]) for leaf, g in readings.gradients.items()}
    groups = _groups(plan, sites, readings, products=True)
    squares = _squares(plan, groups, gradients, padding.size)
    weights, keep, norms = clip.factors(squares, padding)

    def total(groups: Sequence[_Group], gradients: dict[int, jax.Array], kept: Any) -> Sums:
        sums = {
            # Who is not kept has the weight 0.
            leaf: weighted_sum(g, weights[clip.groups[leaf]], all_finite=kept is None)
            for leaf, g in gradients.items()
        }
        for group in groups:
            blocks = group.blocks if kept is None else _without(group.blocks, kept)
            factor, product = weights[clip.groups[group.leaf]], group.product
            if product is not None:
                product = weighted_sum(product, factor, all_finite=kept is None)
            more = weighted_products(group.site, blocks, factor, product)
            sums[group.leaf] = sums[group.leaf] + more if group.leaf in sums else more
        full = [
            sums[i] if i in sums else jnp.zeros_like(leaves[i], jnp.float32)
            for i in range(plan.trace.leaves)
        ]
        return onto(start, full)

    # An example that is not finite must be replaced by zeros: a pass over everything that
    # was read, so only where there is one. A finite norm means finite readings.
    sums = jax.lax.cond(
        jnp.all(jnp.isfinite(sum(squares[1:], squares[0]))),
        lambda: total(groups, gradients, None),
        lambda: total(groups, gradients, keep),
    )
    return sums, (readings.aux, norms)


def _without(blocks: Sequence[Block], keep: jax.Array) -> list[Block]:
    def clean(x: Factor) -> Factor:
        mask = keep.reshape(keep.size, *[1] * (x.rows.ndim - 1))
        return x if x.is_index else Factor(jnp.where(mask, x.rows, 0), x.width)

    return [(clean(a), clean(b)) for a, b in blocks]


def two_pass(
    plan: Plan,
    leaves: Sequence[Any],
    batch: list[Any],
    padding: jax.Array,
    clip: Clip,
    start: Sums | None = None,
) -> tuple[Sums, Outputs]:
    """Norms first; then a second pass, whose products are summed times their factors.

    The factors are not put into the cotangents: what is summed is rounded as what was measured.
    """
    # The second pass may round anew, wherever it rounds.
    rounding = [float(jnp.finfo(d).eps) / 2 for d in float_dtypes(plan.trace.jaxpr)]
    clip = dataclasses.replace(clip, margin=max(clip.margin, 2.0**-12, *rounding))
    sites = _sites(plan, plan.of_form("gram"))
    readings = read(plan.trace, sites, plan.of_form("materialised"), leaves, batch)
    squares = _squares(plan, _groups(plan, sites, readings), readings.gradients, padding.size)
    (weight,), keep, norms = clip.factors(squares, padding)

    # An example that counts for nothing is replaced by one that counts: 0 · NaN is NaN.
    stand_in = jnp.where(keep, jnp.arange(keep.size), jnp.argmax(keep))
    clean = [jnp.asarray(x)[stand_in] for x in batch]
    recognised = sorted(plan.recognised)
    rest = [i for i in plan.of_form("materialised") if i not in plan.recognised]
    sites = _sites(plan, recognised)
    second = read(plan.trace, sites, rest, leaves, clean)
    sums = {leaf: weighted_sum(g, weight) for leaf, g in second.gradients.items()}
    for group in _groups(plan, sites, second):
        more = weighted_products(group.site, group.blocks, weight)
        sums[group.leaf] = sums[group.leaf] + more if group.leaf in sums else more
    some = jnp.any(keep)
    full = [
        jnp.where(some, sums[i], 0.0) if i in sums else jnp.zeros_like(leaves[i], jnp.float32)
        for i in range(plan.trace.leaves)
    ]
    return onto(start, full), (readings.aux, norms)
