"""Where a loss uses its parameters: the jaxpr, followed from each leaf to its uses.

The loss of one example is traced. From every trainable leaf, :func:`find_sites` follows
the linear views of it (:mod:`dpfa_jax.clipping.views`) through ``jit``, ``jax.checkpoint``
and ``scan``. A use that it knows becomes a :class:`Site`. Everything else, whatever it
is, puts the leaf on the list of those whose per-example gradients are materialised by
automatic differentiation: a leaf is never left out.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from dpfa_jax.clipping.recognise import SITE_OPS, VIEW_OPS, Path, Site
from dpfa_jax.clipping.views import View


@dataclasses.dataclass
class Trace:
    """A traced loss.

    Attributes:
        jaxpr: of ``(*leaves, *example) -> (loss, *aux)``.
        leaves: number of trainable leaves.
        sites: of each leaf, all its uses that are known.
        unknown: of each leaf, why its gradient must be materialised; absent if it need not.
    """

    jaxpr: Any
    leaves: int
    sites: dict[int, list[Site]]
    unknown: dict[int, str]


def checked_jaxpr(
    fn: Callable[..., Sequence[Any]], leaves: Sequence[Any], example: Sequence[Any]
) -> Any:
    """The jaxpr of ``fn(*leaves, *example) -> (loss, *aux)``.

    Raises:
        ValueError: for a loss with a collective or a side effect.
    """
    try:
        jaxpr = jax.make_jaxpr(fn)(*leaves, *example)
    except NameError as error:
        if "axis name" not in str(error):
            raise
        raise ValueError(f"loss_fn: {_COLLECTIVE} ({error})") from error
    for effect in jaxpr.effects:
        name = type(effect).__name__
        if name == "NamedAxisEffect":
            raise ValueError(f"loss_fn: {_COLLECTIVE}; found {effect}.")
        if "Debug" not in name:
            raise ValueError(
                f"loss_fn: has a side effect ({name}), such as writing running statistics of a "
                "batch. It must be a function of the parameters and one example."
            )
    return jaxpr


def inner_jaxprs(eqn: Any) -> Iterator[Any]:
    """The programs that an equation runs."""
    for param in eqn.params.values():
        for found in param if isinstance(param, tuple | list) else [param]:
            body = getattr(found, "jaxpr", found)
            if hasattr(body, "eqns"):
                yield body


def float_dtypes(jaxpr: Any) -> frozenset[np.dtype[Any]]:
    """In which a program computes, what it calls included."""
    variables = [*jaxpr.invars, *(v for eqn in jaxpr.eqns for v in eqn.outvars)]
    dtypes = {getattr(v.aval, "dtype", None) for v in variables}
    own = {np.dtype(d) for d in dtypes if d is not None and jnp.issubdtype(d, jnp.floating)}
    inner = (float_dtypes(body) for eqn in jaxpr.eqns for body in inner_jaxprs(eqn))
    return frozenset(own).union(*inner)


def is_narrow(dtype: Any) -> bool:
    """Whether a float's range ends early: its rounding of small numbers is relative to none."""
    return bool(jnp.finfo(dtype).smallest_normal > 1e-30)


def find_sites(jaxpr: Any, leaves: int) -> Trace:
    """Follows the first ``leaves`` inputs of a jaxpr whose first output is the loss."""
    found = _Walk()
    views: list[View | None] = [None] * len(jaxpr.invars)
    for i, variable in enumerate(jaxpr.invars[:leaves]):
        shape = tuple(variable.aval.shape)
        views[i] = View(i, (), shape, tuple(range(len(shape))))
    # What only the auxiliary outputs need has no part in the gradient.
    live = [i == 0 for i in range(len(jaxpr.outvars))]
    loss = found.walk(jaxpr, views, (), (), live)[0]
    if loss is not None:
        found.give_up(loss, "it is the loss itself")
    sites = {i: [s for s in found.sites if s.view.leaf == i] for i in range(leaves)}
    return Trace(jaxpr, leaves, sites, found.unknown)


_COLLECTIVE = (
    "it communicates over a named axis, so one example's gradient would depend on others "
    "and no clipping bounds its sensitivity. Normalise within an example instead"
)


class _Walk:
    """Follows views through a jaxpr and collects sites."""

    def __init__(self) -> None:
        self.sites: list[Site] = []
        self.unknown: dict[int, str] = {}

    def give_up(self, view: View, why: str) -> None:
        self.unknown.setdefault(view.leaf, why)

    def walk(
        self,
        jaxpr: Any,
        inputs: Sequence[View | None],
        path: Path,
        scans: tuple[int, ...],
        live: Sequence[bool],
    ) -> list[View | None]:
        """The views among the outputs. ``live``: which outputs the loss may depend on."""
        env = {v: view for v, view in zip(jaxpr.invars, inputs, strict=True) if view is not None}
        needed = _needed(jaxpr, live)
        for number, eqn in enumerate(jaxpr.eqns):
            if not any(v in needed for v in eqn.outvars):
                continue
            views = [None if isinstance(v, jex.Literal) else env.get(v) for v in eqn.invars]
            if any(v is not None for v in views):
                wanted = [v in needed for v in eqn.outvars]
                outputs = self._equation(eqn, views, (*path, number), scans, wanted)
                env.update(
                    {v: o for v, o in zip(eqn.outvars, outputs, strict=True) if o is not None}
                )
        return [None if isinstance(v, jex.Literal) else env.get(v) for v in jaxpr.outvars]

    def _equation(
        self,
        eqn: Any,
        views: list[View | None],
        path: Path,
        scans: tuple[int, ...],
        live: Sequence[bool],
    ) -> list[View | None]:
        name = eqn.primitive.name
        nothing: list[View | None] = [None] * len(eqn.outvars)
        if name in ("jit", "remat2", "closed_call"):
            return self.walk(eqn.params["jaxpr"], views, path, scans, live)
        if name == "scan":
            self._scan(eqn, views, path, scans)
            return nothing
        if name == "stop_gradient":
            return nothing
        present = [v for v in views if v is not None]
        if len(present) == 1 and views[0] is not None and name in VIEW_OPS:
            seen = VIEW_OPS[name](views[0], eqn)
            if seen is not None:
                return seen
        if len(present) == 1 and name in SITE_OPS:
            site = SITE_OPS[name](eqn, views.index(present[0]), present[0], path, scans)
            if site is not None:
                self.sites.append(site)
                return nothing
        for view in present:
            self.give_up(view, f"used by {name}")
        return nothing

    def _scan(self, eqn: Any, views: list[View | None], path: Path, scans: tuple[int, ...]) -> None:
        consts, carry = scan_counts(eqn)
        inner: list[View | None] = []
        for i, view in enumerate(views):
            if view is None or i < consts:
                inner.append(view)
            elif i < consts + carry:
                self.give_up(view, "carried from step to step of a scan")
                inner.append(None)
            else:
                inner.append(view.unstacked(len(scans)))
        body = eqn.params["jaxpr"]
        live = [True] * len(body.outvars)
        outputs = self.walk(body, inner, path, (*scans, eqn.params["length"]), live)
        for view in outputs:
            if view is not None:
                self.give_up(view, "an output of a scan")


def _needed(jaxpr: Any, live: Sequence[bool]) -> set[Any]:
    """The variables that the live outputs depend on."""
    needed = {
        v
        for v, use in zip(jaxpr.outvars, live, strict=True)
        if use and not isinstance(v, jex.Literal)
    }
    for eqn in reversed(jaxpr.eqns):
        if any(v in needed for v in eqn.outvars):
            needed.update(v for v in eqn.invars if not isinstance(v, jex.Literal))
    return needed


def scan_counts(eqn: Any) -> tuple[int, int]:
    """How many inputs of a scan are constants, and how many are carried."""
    consts, carry, _ = (len(x) for x in eqn.params["ft_in"].unpack())
    return consts, carry
