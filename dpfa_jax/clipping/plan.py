"""Which form each leaf's per-example gradient takes, by predicted time and memory.

A leaf whose gradient is Σ_t l_t ⊗ r_t (T rows, widths A and B, S times) can be handled in
two forms:

* ``gram``: the norm from two T×T matrices; then one product over all examples, which would
  be needed anyway.
* ``materialised``: the product an example at a time, as many multiply-adds as without
  clipping, but S A B entries an example that are written, read for the norm and read
  for the sum.

A tied embedding's two uses can take one form each: the output's product is materialised in
16 bits, the looked-up rows are not.

:mod:`dpfa_jax.clipping.cost` predicts both.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal

from dpfa_jax.clipping import cost
from dpfa_jax.clipping.recognise import Site
from dpfa_jax.clipping.trace import Trace
from dpfa_jax.clipping.views import disjoint

Form = Literal["gram", "materialised", "unused"]
# The Gram form is taken where its predicted time is at most this share of the other's: more
# than one, because it holds less.
_PREFERENCE = 1.2
# Per-example gradients may take this many times the memory of the activations and
# cotangents that the other form holds.
_MEMORY_SHARE = 2.0


@dataclasses.dataclass(frozen=True)
class LeafPlan:
    """What is done for one leaf; figures are for one example.

    Attributes:
        form: how.
        why: in words.
        extra_seconds: predicted, beyond a gradient without clipping.
        held_bytes: until the norm of the whole gradient is known.
        dtype: in which a materialised gradient is kept; None is as it comes.
        product: of the Gram form: whether its one dense product is materialised after all, and
            only what looks rows up is not.
    """

    form: Form
    why: str
    extra_seconds: float = 0.0
    held_bytes: float = 0.0
    dtype: Any = None
    product: bool = False


@dataclasses.dataclass(frozen=True)
class Plan:
    """A traced loss and the form of each leaf.

    Attributes:
        trace: the traced loss.
        leaves: of each leaf, what is done.
        recognised: leaves whose every use is a site, whichever form was chosen.
        loss_seconds: predicted, a forward and a backward pass of one example.
    """

    trace: Trace
    leaves: tuple[LeafPlan, ...]
    recognised: frozenset[int]
    loss_seconds: float = 0.0

    def of_form(self, form: Form) -> list[int]:
        """The leaves of one form."""
        return [i for i, p in enumerate(self.leaves) if p.form == form]


def layouts(sites: Sequence[Site]) -> list[list[Site]]:
    """The sites of one leaf, in groups whose factors can be multiplied with each other."""
    groups: dict[Any, list[Site]] = {}
    for site in sites:
        groups.setdefault(site.layout, []).append(site)
    return list(groups.values())


def make_plan(trace: Trace, shapes: Sequence[Any], machine: cost.Machine | None = None) -> Plan:
    """Chooses each leaf's form.

    Args:
        trace: the traced loss.
        shapes: the leaves, or what has their ``shape``.
        machine: whose rates; None means where JAX runs by default.
    """
    machine = machine or cost.this_machine()
    plans, recognised = [], set()
    for leaf in range(trace.leaves):
        groups = layouts(trace.sites[leaf])
        shape = shapes[leaf].shape
        held = float(cost.FLOAT32 * math.prod(shape))
        direct = LeafPlan("materialised", "", machine.move(3 * held), held)
        why = trace.unknown.get(leaf)
        if why is None and not separable(groups):
            why = "its uses overlap in layouts whose cross terms have no rule"
        if why is not None:
            plans.append(dataclasses.replace(direct, why=why))
        elif not groups:
            plans.append(LeafPlan("unused", "no path to the loss"))
        else:
            recognised.add(leaf)
            plans.append(_cheaper(groups, shape, machine))
    passes = 3.0 * cost.loss_seconds(trace.jaxpr.jaxpr, machine)
    return Plan(trace, tuple(plans), frozenset(recognised), passes)


def separable(groups: Sequence[Sequence[Site]]) -> bool:
    """Whether groups of different layout are seen to touch different entries of the leaf."""
    pairs = itertools.combinations([g[0].view.steps for g in groups], 2)
    return all(disjoint(a, b) for a, b in pairs)


def has_one_product(groups: Sequence[Sequence[Site]]) -> bool:
    """Whether a leaf is used in one matrix product, and else to look rows up."""
    if len(groups) != 1:
        return False
    dense = [site for site in groups[0] if not cost.indexes(site)]
    return len(dense) == 1 < len(groups[0]) and dense[0].kind == "dot"


def _cheaper(
    groups: Sequence[Sequence[Site]], shape: Sequence[int], machine: cost.Machine
) -> LeafPlan:
    sites = [site for group in groups for site in group]
    gram = sum(cost.gram_seconds(g, machine) for g in groups)
    direct = cost.materialised_seconds(sites, shape, machine)
    held = sum(cost.held_bytes(site) for site in sites)
    dtype = cost.entry_dtype(sites)
    whole = float(dtype.itemsize * math.prod(shape))
    why = " and ".join(dict.fromkeys(s.kind for s in sites))
    why += f": Gram {1e6 * gram:.3g}, materialised {1e6 * direct:.3g} µs an example"
    mixed, kept = math.inf, held
    if has_one_product(groups):
        (product,) = (s for s in sites if not cost.indexes(s))
        looked_up = [s for s in sites if cost.indexes(s)]
        short = cost.entry_dtype([product])
        mixed = cost.materialised_seconds([product], shape, machine)
        mixed += cost.gram_seconds(looked_up, machine)
        kept = float(short.itemsize * math.prod(shape)) + sum(map(cost.held_bytes, looked_up))
        why += f", its product alone {1e6 * mixed:.3g}"
    if gram <= _PREFERENCE * min(direct, mixed):
        return LeafPlan("gram", why, gram, held)
    if mixed < direct and kept <= _MEMORY_SHARE * held:
        return LeafPlan("gram", why, mixed, kept, short, product=True)
    if whole > _MEMORY_SHARE * held:
        return LeafPlan("gram", f"{why}, but {whole / 2**20:.1f} MiB of it", gram, held)
    return LeafPlan("materialised", why, direct, whole, dtype)
