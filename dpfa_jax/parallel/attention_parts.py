"""Attention put together from parts of the keys: what a part is, and how two become one.

Record mode's parts are the sums N and L as integers, which add exactly in any order. Exact
attention's are an average and its log-sum-exp, of which the larger one is the common
reference (the online softmax of M. Milakov and N. Gimelshein, 2018).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32, UInt32

from pallas_kernels.attention import AttentionSpec, common, fused, tile

# Log-sum-exp of no keys: finite, so that differences are numbers.
_NOTHING = tile.LEAST

# (query, key, value, lengths of these keys, options) → what is summed over the keys.
Call = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known when a call is compiled, all of it public.

    Attributes:
        spec: the kernels' options.
        backend: a module of kernels, see :class:`pallas_kernels.attention.fused.Backend`.
        mesh: the devices.
        axis: the mesh axis over which the keys are split.
        batch_axis: the mesh axis of the batch, or None.
        head_axis: the mesh axis of the heads, or None.
        ring: whether keys travel and queries stay; else queries are everywhere and sums travel.
        num_keys: of the whole call, padding left out: the integers' units follow from it.
        block: with a causal mask, rows and keys of one kernel call; without, keys of one, or 0
            for all that a device has. It does not depend on the number of devices, so that
            they make the same integers.
        interpret: run kernels in Pallas's interpreter.
    """

    spec: AttentionSpec
    backend: Any
    mesh: Any
    axis: str
    batch_axis: str | None
    head_axis: str | None
    ring: bool
    num_keys: int
    block: int
    interpret: bool = False

    @property
    def is_record(self) -> bool:
        """Whether sums get noise; else the call is exact."""
        return self.spec.mode == "record"

    @property
    def units(self) -> common.Units:
        """Of the sums."""
        return common.sum_units(self.spec, self.num_keys)


class Part(NamedTuple):
    """What some of the keys give: N and L, or an average and its log-sum-exp.

    Attributes:
        rows: int32 or float32 [B, T, N, H].
        stat: int32 or float32 [B, N, T].
    """

    rows: jax.Array
    stat: jax.Array


def no_part(plan: Plan, query: Float[Array, "b t n h"]) -> Part:
    """The part of no keys."""
    batch, num_rows, heads, _ = query.shape
    dtype = jnp.int32 if plan.is_record else jnp.float32
    stat = jnp.full((batch, heads, num_rows), 0 if plan.is_record else _NOTHING, dtype)
    return Part(jnp.zeros(query.shape, dtype), stat)


def add_parts(plan: Plan, first: Part, second: Part) -> Part:
    """The part of the keys of both."""
    if plan.is_record:
        return Part(first.rows + second.rows, first.stat + second.stat)
    top = jnp.maximum(first.stat, second.stat)
    weights = [jnp.exp(part.stat - top) for part in (first, second)]
    total = weights[0] + weights[1]
    rows = sum(
        part.rows * (w / total).swapaxes(1, 2)[..., None]
        for part, w in zip((first, second), weights, strict=True)
    )
    assert isinstance(rows, jax.Array)
    return Part(rows, top + jnp.log(total))


def one_part(
    plan: Plan, spec: AttentionSpec, query: jax.Array, keys: Any, lengths: jax.Array
) -> Part:
    """The part of some keys by one call of the kernels; ``keys`` is (key, value)."""
    key, value = keys
    options: dict[str, Any] = {"interpret": plan.interpret}
    if plan.is_record:
        scale = plan.backend.value_scale(value, spec)
        return Part(
            *plan.backend.sums(query, key, value, scale, lengths, spec, plan.units, **options)
        )
    out, lse, _ = plan.backend.forward(
        query, key, value, None, None, lengths, spec, keep_clean=False, **options
    )
    return Part(out.astype(jnp.float32), jnp.where(lse == fused.NOTHING_SEEN, _NOTHING, lse))


def parts_of(
    plan: Plan, query: jax.Array, keys: Any, lengths: jax.Array, row: jax.Array, column: jax.Array
) -> Part:
    """The part of a device's keys for some rows.

    Args:
        plan: the call.
        query: [B, T, N, H].
        keys: key and value, [B, S, K, H].
        lengths: int32 [B], in all.
        row: number of the first row.
        column: number of the first key.
    """
    if not plan.spec.is_causal:
        row_block, key_block = query.shape[1], plan.block or keys[0].shape[1]
    else:
        row_block = key_block = plan.block

    def add(part: Part, q: jax.Array, i: jax.Array, j: jax.Array) -> Part:
        chosen = tuple(lax.dynamic_slice_in_dim(x, j * key_block, key_block, 1) for x in keys)
        start = column + j * key_block
        own = jnp.clip(lengths - start, 0, key_block)

        def run(spec: AttentionSpec) -> Part:
            return add_parts(plan, part, one_part(plan, spec, q, chosen, own))

        return by_order(plan, row + i * row_block, start, run, lambda: part)

    def some_rows(i: jax.Array, q: jax.Array) -> Part:
        return lax.fori_loop(
            0, keys[0].shape[1] // key_block, lambda j, part: add(part, q, i, j), no_part(plan, q)
        )

    if row_block == query.shape[1]:
        return some_rows(jnp.int32(0), query)
    blocks = query.shape[1] // row_block
    chunks = jnp.moveaxis(query.reshape(query.shape[0], blocks, row_block, *query.shape[2:]), 1, 0)
    part = lax.map(lambda x: some_rows(*x), (jnp.arange(blocks, dtype=jnp.int32), chunks))
    stat = jnp.moveaxis(part.stat, 0, 2)
    return Part(
        jnp.moveaxis(part.rows, 0, 1).reshape(query.shape),
        stat.reshape(*stat.shape[:2], query.shape[1]),
    )


def by_order(
    plan: Plan,
    row: jax.Array,
    column: jax.Array,
    run: Callable[[AttentionSpec], Any],
    skip: Callable[[], Any],
) -> Any:
    """``run`` with the mask that a block of rows has for a block of keys as long, or ``skip``.

    Causal: rows after the keys see all of them, rows before them none, and the blocks on the
    diagonal have the usual mask.
    """
    if not plan.spec.is_causal:
        return run(plan.spec)
    whole = dataclasses.replace(plan.spec, is_causal=False)
    branches = [skip, lambda: run(plan.spec), lambda: run(whole)]
    return lax.switch(jnp.sign(row - column) + 1, branches)


def finish(
    plan: Plan,
    part: Part,
    words: UInt32[Array, "8"] | None,
    counters: UInt32[Array, "b"],
    rows: UInt32[Array, "t"],
    dtype: Any,
) -> tuple[Float[Array, "b t n h"], Float32[Array, "b n t"]]:
    """The release (or the exact output) from the part of all keys, and the rows' statistic.

    The only place where noise is added: each row's, on the one device that finishes it.
    """
    if not plan.is_record:
        return part.rows.astype(dtype), jnp.where(
            part.stat <= _NOTHING / 2, fused.NOTHING_SEEN, part.stat
        )
    heads = part.rows.shape[2]
    first_head = lax.axis_index(plan.head_axis) * heads if plan.head_axis else 0
    assert words is not None
    noise = common.Noise(words, counters, first_head)
    out, denominator = common.release_sums(
        plan.spec, plan.units, part.rows, part.stat.swapaxes(1, 2), noise, rows
    )
    return out.astype(dtype), denominator.swapaxes(1, 2)


class Gradients(NamedTuple):
    """float32, like query, key and value."""

    query: jax.Array
    key: jax.Array
    value: jax.Array


def gradients(
    plan: Plan,
    query: jax.Array,
    keys: Any,
    lengths: Int32[Array, "b"],
    rows: tuple[jax.Array, jax.Array, jax.Array],
    row: jax.Array,
    column: jax.Array,
) -> Gradients:
    """What some rows and a device's keys give each other; arguments as :func:`parts_of`.

    ``rows`` is (lse, delta, d_out) of these rows.
    """

    def run(spec: AttentionSpec, q: jax.Array, chosen: Any, own: jax.Array, mine: Any) -> Gradients:
        key, value = chosen
        scale = plan.backend.value_scale(value, spec) if plan.is_record else None
        grads = plan.backend.backward(
            q, key, value, scale, own, *mine, spec, interpret=plan.interpret
        )
        return Gradients(*(x.astype(jnp.float32) for x in grads))

    num_rows, num_keys = query.shape[1], keys[0].shape[1]
    if not plan.spec.is_causal:
        own = jnp.clip(lengths - column, 0, num_keys)
        return run(plan.spec, query, keys, own, rows)
    block = plan.block
    zeros = Gradients(*(jnp.zeros(x.shape, jnp.float32) for x in (query, *keys)))

    def one_pair(n: jax.Array, total: Gradients) -> Gradients:
        i, j = jnp.divmod(n, num_keys // block)

        def cut(x: jax.Array, number: jax.Array, axis: int) -> jax.Array:
            return lax.dynamic_slice_in_dim(x, number * block, block, axis)

        def pair(spec: AttentionSpec) -> Gradients:
            start = column + j * block
            lse, delta, d_out = rows
            mine = cut(lse, i, 2), cut(delta, i, 2), cut(d_out, i, 1)
            chosen = tuple(cut(x, j, 1) for x in keys)
            own = jnp.clip(lengths - start, 0, block)
            part = run(spec, cut(query, i, 1), chosen, own, mine)
            return Gradients(
                *(
                    lax.dynamic_update_slice_in_dim(t, cut(t, at, 1) + g, at * block, 1)
                    for t, g, at in zip(total, part, (i, j, j), strict=True)
                )
            )

        return by_order(plan, row + i * block, column + j * block, pair, lambda: total)

    pairs = (num_rows // block) * (num_keys // block)
    return lax.fori_loop(0, pairs, one_pair, zeros)
