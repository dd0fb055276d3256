"""Runs a traced loss again and reads, at each site, its operand and its cotangent.

:func:`replay` evaluates the jaxpr as it is. At a site the output passes through
:func:`_tap`, the identity, whose second argument (a *probe*) receives the output's
cotangent when the loss is differentiated with respect to it. The parameters of tapped
sites are constants of that differentiation: no gradient of theirs is computed here, and
under ``vmap`` over examples their matrix products stay one large product each.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax.lax import GatherScatterMode

from dpfa_jax.clipping.recognise import Path, Site
from dpfa_jax.clipping.trace import Trace, scan_counts
from pallas_kernels import manual


@jax.custom_vjp
def _tap(value: jax.Array, probe: jax.Array) -> jax.Array:
    del probe
    return value


def _tap_forward(value: jax.Array, probe: jax.Array) -> tuple[jax.Array, None]:
    del probe
    return value, None


def _tap_backward(_: None, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    return cotangent, cotangent


_tap.defvjp(_tap_forward, _tap_backward)

Numbered = dict[int, jax.Array]


class Readings(NamedTuple):
    """What one backward pass over a batch gives; leading axis: examples.

    Attributes:
        operands: of each tapped site.
        cotangents: of each tapped site's output.
        gradients: of each materialised leaf.
        aux: the loss's auxiliary outputs.
    """

    operands: Numbered
    cotangents: Numbered
    gradients: Numbered
    aux: list[jax.Array]


def read(
    trace: Trace,
    sites: Sequence[Site],
    materialised: Sequence[int],
    leaves: Sequence[Any],
    batch: Sequence[Any],
) -> Readings:
    """One forward and backward pass over a batch, one example at a time under ``vmap``.

    Args:
        trace: the traced loss.
        sites: those to tap.
        materialised: leaves whose per-example gradients to form.
        leaves: the trainable leaves.
        batch: the examples' leaves, each with a leading batch axis.
    """
    paths = {site.path: number for number, site in enumerate(sites)}
    axes = manual.varying_axes(*leaves, *batch)
    probes = {
        n: manual.vary(jnp.zeros((*s.scans, *s.output.shape), s.output.dtype), axes)
        for n, s in enumerate(sites)
    }

    def one(example: list[Any]) -> Readings:
        def loss(probes: Numbered, chosen: Numbered) -> tuple[jax.Array, Any]:
            values = [chosen.get(i, x) for i, x in enumerate(leaves)]
            outputs, operands = replay(
                trace.jaxpr, [*values, *example], _Sites(sites, paths), probes, ()
            )
            return outputs[0], (operands, outputs[1:])

        chosen = {i: jnp.asarray(leaves[i]) for i in materialised}
        value, pull, (operands, aux) = jax.vjp(loss, probes, chosen, has_aux=True)
        cotangents, gradients = pull(jnp.ones_like(value))
        return Readings(operands, cotangents, gradients, aux)

    return jax.vmap(one)(list(batch))


class _Sites:
    """The sites by path, and which equations hold one."""

    def __init__(self, sites: Sequence[Site], paths: Mapping[Path, int]):
        self.by_number = sites
        self.paths = paths
        self.around = {p[:i] for p in paths for i in range(1, len(p))}

    def below(self, path: Path) -> list[int]:
        return [n for p, n in self.paths.items() if p[: len(path)] == path]


def replay(
    jaxpr: Any, args: Sequence[Any], sites: _Sites, probes: Numbered, path: Path
) -> tuple[list[Any], Numbered]:
    """The jaxpr's outputs, and the operands of the sites in it."""
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, jaxpr.consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))
    operands: Numbered = {}

    def value(v: Any) -> Any:
        return v.val if isinstance(v, jex.Literal) else env[v]

    for number, eqn in enumerate(jaxpr.eqns):
        here = (*path, number)
        inputs = [value(v) for v in eqn.invars]
        if here in sites.around:
            outputs, inner = _enter(eqn, inputs, sites, probes, here)
            operands |= inner
        else:
            with eqn.ctx.manager:
                made = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
            outputs = list(made) if eqn.primitive.multiple_results else [made]
            if here in sites.paths:
                n = sites.paths[here]
                outputs = [_tap(outputs[0], probes[n])]
                operands[n] = _operand(sites.by_number[n], inputs)
        env.update(zip(eqn.outvars, outputs, strict=True))
    return [value(v) for v in jaxpr.outvars], operands


def _enter(
    eqn: Any, inputs: list[Any], sites: _Sites, probes: Numbered, path: Path
) -> tuple[list[Any], Numbered]:
    """An equation with a jaxpr inside that holds a site."""
    inner = eqn.params["jaxpr"]
    mine = {n: probes[n] for n in sites.below(path)}
    if eqn.primitive.name == "scan":
        return _scan(eqn, inputs, sites, mine, path)

    def run(inputs: list[Any], probes: Numbered) -> tuple[list[Any], Numbered]:
        return replay(inner, inputs, sites, probes, path)

    if eqn.primitive.name == "remat2":
        run = jax.checkpoint(
            run, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"]
        )
    return run(inputs, mine)


def _scan(
    eqn: Any, inputs: list[Any], sites: _Sites, probes: Numbered, path: Path
) -> tuple[list[Any], Numbered]:
    consts, carry = scan_counts(eqn)
    fixed, start, xs = inputs[:consts], inputs[consts : consts + carry], inputs[consts + carry :]

    def body(state: list[Any], row: tuple[list[Any], Numbered]) -> tuple[list[Any], Any]:
        x, probes = row
        outputs, operands = replay(eqn.params["jaxpr"], [*fixed, *state, *x], sites, probes, path)
        return outputs[:carry], (outputs[carry:], operands)

    state, (ys, operands) = jax.lax.scan(
        body,
        list(start),
        (list(xs), probes),
        length=eqn.params["length"],
        reverse=eqn.params["reverse"],
        unroll=eqn.params["unroll"],
    )
    return [*state, *ys], operands


def _operand(site: Site, inputs: list[Any]) -> jax.Array:
    """What a site's factor is made of. Row numbers that count for nothing become -1."""
    operand = inputs[site.operand]
    if site.kind in ("dot", "conv"):
        return operand
    (dim,) = site.left_dims if site.operand_is_left else site.right_dims
    rows = site.view.base_shape[dim]
    if site.kind == "dynamic_slice":
        return jnp.clip(operand, 0, rows - 1).astype(jnp.int32)
    ids = operand[..., 0]
    if site.params["mode"] == GatherScatterMode.CLIP:
        return jnp.clip(ids, 0, rows - 1).astype(jnp.int32)
    # Outside the table, gather's own gradient drops the row too.
    return jnp.where((ids >= 0) & (ids < rows), ids, -1).astype(jnp.int32)
