"""Which form each leaf's per-example gradient takes, by a rule over arithmetic and memory.

A leaf whose gradient is Σ_t l_t ⊗ r_t (T rows, widths A and B, S times) can be handled in
two forms:

* ``gram``: the norm from two T×T matrices, S T² (A + B) multiply-adds more than without
  clipping; then one product over all examples, which would be needed anyway.
* ``materialised``: the product an example at a time, as many multiply-adds as without
  clipping, but S A B entries an example that are written, read for the norm and read
  for the sum.

One multiply-add is taken as the unit; an entry costs :func:`entry_cost` of them.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax

from dpfa_jax.clipping.recognise import Site
from dpfa_jax.clipping.trace import Trace
from dpfa_jax.clipping.views import disjoint

Form = Literal["gram", "materialised", "unused"]
FLOAT32 = 4
# Per-example gradients may take this many times the memory of the activations and
# cotangents that the other form holds.
_MEMORY_SHARE = 2.0


@dataclasses.dataclass(frozen=True)
class LeafPlan:
    """What is done for one leaf; figures are for one example.

    Attributes:
        form: how.
        why: in words.
        extra_multiply_adds: beyond a gradient without clipping, memory traffic included.
        held_bytes: until the norm of the whole gradient is known.
    """

    form: Form
    why: str
    extra_multiply_adds: float = 0.0
    held_bytes: float = 0.0


@dataclasses.dataclass(frozen=True)
class Plan:
    """A traced loss and the form of each leaf.

    Attributes:
        trace: the traced loss.
        leaves: of each leaf, what is done.
        recognised: leaves whose every use is a site, whichever form was chosen.
    """

    trace: Trace
    leaves: tuple[LeafPlan, ...]
    recognised: frozenset[int]

    def of_form(self, form: Form) -> list[int]:
        """The leaves of one form."""
        return [i for i, p in enumerate(self.leaves) if p.form == form]


def entry_cost(platform: str) -> float:
    """Multiply-adds in the time of one float32 entry's three passes through memory.

    About 40 a pass on CPU cores with wide vectors, and 340 on an accelerator with matrix
    units (an H100: 5·10¹⁴ bfloat16 multiply-adds a second at most, 3·10¹² bytes a second).
    """
    return 120.0 if platform == "cpu" else 1000.0


def layouts(sites: Sequence[Site]) -> list[list[Site]]:
    """The sites of one leaf, in groups whose factors can be multiplied with each other."""
    groups: dict[Any, list[Site]] = {}
    for site in sites:
        groups.setdefault(site.layout, []).append(site)
    return list(groups.values())


def make_plan(trace: Trace, shapes: Sequence[Any], platform: str | None = None) -> Plan:
    """Chooses each leaf's form.

    Args:
        trace: the traced loss.
        shapes: the leaves, or what has their ``shape``.
        platform: ``'cpu'`` or another; None means where JAX runs by default.
    """
    entry = entry_cost(platform or jax.default_backend())
    plans, recognised = [], set()
    for leaf in range(trace.leaves):
        groups = layouts(trace.sites[leaf])
        entries = math.prod(shapes[leaf].shape)
        direct = LeafPlan("materialised", "", entry * entries, float(FLOAT32 * entries))
        why = trace.unknown.get(leaf)
        if why is None and not separable(groups):
            why = "its uses overlap in layouts whose cross terms have no rule"
        if why is not None:
            plans.append(dataclasses.replace(direct, why=why))
        elif not groups:
            plans.append(LeafPlan("unused", "no path to the loss"))
        else:
            recognised.add(leaf)
            plans.append(_cheaper(groups, direct))
    return Plan(trace, tuple(plans), frozenset(recognised))


def separable(groups: Sequence[Sequence[Site]]) -> bool:
    """Whether groups of different layout are seen to touch different entries of the leaf."""
    pairs = itertools.combinations([g[0].view.steps for g in groups], 2)
    return all(disjoint(a, b) for a, b in pairs)


def _cheaper(groups: Sequence[Sequence[Site]], direct: LeafPlan) -> LeafPlan:
    gram = sum(gram_multiply_adds(g) for g in groups)
    held = sum(held_bytes(site) for group in groups for site in group)
    kinds = " and ".join(dict.fromkeys(s.kind for g in groups for s in g))
    costs = f"Gram {gram:.2g}, materialised {direct.extra_multiply_adds:.2g} multiply-adds"
    if gram <= direct.extra_multiply_adds:
        return LeafPlan("gram", f"{kinds}: {costs}", gram, held)
    if direct.held_bytes > _MEMORY_SHARE * held:
        why = f"{kinds}: {costs}, but {direct.held_bytes / 2**20:.1f} MiB an example"
        return LeafPlan("gram", why, gram, held)
    return dataclasses.replace(direct, why=f"{kinds}: {costs}")


def gram_multiply_adds(sites: Sequence[Site]) -> float:
    """S T² (A + B), T the rows of all sites; a side of row numbers is only compared."""
    stack, _, left, right = sites[0].sizes
    rows = sum(site.sizes[1] for site in sites)
    widths = 0
    for width, is_left in ((left, True), (right, False)):
        dense = any(not _indexes(s) or s.operand_is_left != is_left for s in sites)
        widths += width if dense else 1
    return float(stack * rows * rows * widths)


def held_bytes(site: Site) -> float:
    """A site's operand and cotangent, of one example."""
    stack, rows, left, right = site.sizes
    operand, cotangent = (left, right) if site.operand_is_left else (right, left)
    operand = 1 if _indexes(site) else operand
    return float(stack * rows * (operand + cotangent) * site.output.dtype.itemsize)


def _indexes(site: Site) -> bool:
    return site.kind in ("gather", "dynamic_slice")
