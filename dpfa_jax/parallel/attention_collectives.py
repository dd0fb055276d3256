"""Attention over keys that lie on several devices: what travels, forward and backward.

*Reduce*: every device has all queries and its own keys; the parts of all devices are put
together, a share of the rows on each (a reduce-scatter), and each device finishes its rows.

*Ring*: every device has a share of the rows and of the keys; the keys go around, and with
them, backward, their gradients.

Either way a row is finished, and gets its noise, on exactly one device.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int32, UInt32

from dpfa_jax.parallel import attention_parts as parts
from dpfa_jax.parallel.attention_parts import Gradients, Part, Plan
from pallas_kernels.attention import fused


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attention(
    plan: Plan,
    query: Float[Array, "b t n h"],
    key: Float[Array, "b s k h"],
    value: Float[Array, "b s k h"],
    lengths: Int32[Array, "b"],
    counters: UInt32[Array, "b"],
    words: UInt32[Array, "8"] | None,
) -> Float[Array, "b t n h"]:
    """The call that ``plan`` describes; the rows of the result lie on ``plan.axis``.

    Args:
        plan: static.
        query: T divides by the devices, and by ``plan.block`` with a causal mask.
        key: S divides by the devices, each one's share by ``plan.block``.
        value: like ``key``.
        lengths: how many keys exist.
        counters: the noise counter of each batch element.
        words: the call's noise key, or None (exact).
    """
    return _forward(plan, query, key, value, lengths, counters, words)[0]


def _forward(
    plan: Plan,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    lengths: jax.Array,
    counters: jax.Array,
    words: jax.Array | None,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    where = _Where(plan)
    queries = where.rows if plan.ring else where.everywhere
    run = jax.shard_map(
        functools.partial(_forward_here, plan),
        mesh=plan.mesh,
        in_specs=(queries, where.rows, where.rows, where.batch, where.batch, PartitionSpec()),
        out_specs=(where.rows, where.stat),
        check_vma=False,  # kernels do not say which axes their results vary along
    )
    out, stat = run(query, key, value, lengths, counters, words)
    return out, (query, key, value, lengths, out, stat)


def _backward(
    plan: Plan, residuals: tuple[jax.Array, ...], d_out: jax.Array
) -> tuple[jax.Array | None, ...]:
    where = _Where(plan)
    queries = where.rows if plan.ring else where.everywhere
    run = jax.shard_map(
        lambda *operands: _backward_here(plan, *operands),
        mesh=plan.mesh,
        in_specs=(queries, where.rows, where.rows, where.batch, where.rows, where.stat, where.rows),
        out_specs=(where.rows, where.rows, where.rows),
        check_vma=False,
    )
    dq, dk, dv = run(*residuals, d_out)
    return dq, dk, dv, None, None, None


attention.defvjp(_forward, _backward)


class _Where:
    """Where the axes of arrays lie: [B, T or S, heads, H], the same with all rows, [B, N, T]."""

    def __init__(self, plan: Plan):
        batch, heads = plan.batch_axis, plan.head_axis
        self.rows = PartitionSpec(batch, plan.axis, heads, None)
        self.everywhere = PartitionSpec(batch, None, heads, None)
        self.stat = PartitionSpec(batch, heads, plan.axis)
        self.batch = PartitionSpec(batch)


def _forward_here(
    plan: Plan,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    lengths: jax.Array,
    counters: jax.Array,
    words: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """One device's share of the forward pass."""
    size, index = lax.axis_size(plan.axis), lax.axis_index(plan.axis)
    num_rows = query.shape[1] if plan.ring else query.shape[1] // size
    if plan.ring:
        part = _around(plan, query, (key, value), lengths)
    else:
        own = parts.parts_of(plan, query, (key, value), lengths, jnp.int32(0), index * key.shape[1])
        part = _scatter(plan, own)
    rows = index * num_rows + jnp.arange(num_rows, dtype=jnp.int32)
    return parts.finish(plan, part, words, counters, rows.astype(jnp.uint32), query.dtype)


def _scatter(plan: Plan, own: Part) -> Part:
    """The devices' parts put together, a share of the rows on each."""
    if plan.is_record:
        return Part(
            lax.psum_scatter(own.rows, plan.axis, scatter_dimension=1, tiled=True),
            lax.psum_scatter(own.stat, plan.axis, scatter_dimension=2, tiled=True),
        )
    top = lax.pmax(own.stat, plan.axis)
    weight = jnp.exp(own.stat - top)
    total = lax.psum_scatter(weight, plan.axis, scatter_dimension=2, tiled=True)
    rows = lax.psum_scatter(
        own.rows * weight.swapaxes(1, 2)[..., None], plan.axis, scatter_dimension=1, tiled=True
    )
    mine = total.shape[2]
    top = lax.dynamic_slice_in_dim(top, lax.axis_index(plan.axis) * mine, mine, 2)
    return Part(rows / total.swapaxes(1, 2)[..., None], top + jnp.log(total))


def _around(plan: Plan, query: jax.Array, keys: Any, lengths: jax.Array) -> Part:
    """The part of all keys for this device's rows; the keys come by one after the other."""
    size, index = lax.axis_size(plan.axis), lax.axis_index(plan.axis)
    num_keys = keys[0].shape[1]

    def add(part: Part, step: jax.Array, keys: Any) -> Part:
        owner = lax.rem(index - step + size, size)
        more = parts.parts_of(plan, query, keys, lengths, index * query.shape[1], owner * num_keys)
        return parts.add_parts(plan, part, more)

    def visit(step: jax.Array, carry: tuple[Any, Part]) -> tuple[Any, Part]:
        keys, part = carry
        # They do not depend on each other: the next keys come while these are worked on.
        return _pass_on(plan, keys), add(part, step, keys)

    keys, part = lax.fori_loop(0, size - 1, visit, (keys, parts.no_part(plan, query)))
    return add(part, jnp.int32(size - 1), keys)


def _pass_on(plan: Plan, x: Any) -> Any:
    size = lax.axis_size(plan.axis)
    return lax.ppermute(x, plan.axis, [(i, (i + 1) % size) for i in range(size)])


def _backward_here(
    plan: Plan,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    lengths: jax.Array,
    out: jax.Array,
    stat: jax.Array,
    d_out: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One device's share of the backward pass."""
    size, index = lax.axis_size(plan.axis), lax.axis_index(plan.axis)
    dots = plan.backend.row_dots(d_out, out)
    rows = (*fused.gradient_statistics(plan.spec, stat, dots), d_out)
    num_keys = key.shape[1]
    if not plan.ring:
        axes = (2, 2, 1)
        rows = tuple(
            lax.all_gather(x, plan.axis, axis=a, tiled=True)
            for x, a in zip(rows, axes, strict=True)
        )
        grads = parts.gradients(
            plan, query, (key, value), lengths, rows, jnp.int32(0), index * num_keys
        )
        dq = lax.psum_scatter(grads.query, plan.axis, scatter_dimension=1, tiled=True)
        grads = grads._replace(query=dq)
    else:

        def visit(step: jax.Array, carry: tuple[Any, Any, jax.Array]) -> Any:
            keys, key_grads, dq = carry
            owner = lax.rem(index - step + size, size)
            more = parts.gradients(
                plan, query, keys, lengths, rows, index * query.shape[1], owner * num_keys
            )
            key_grads = key_grads[0] + more.key, key_grads[1] + more.value
            return _pass_on(plan, keys), _pass_on(plan, key_grads), dq + more.query

        zeros = [jnp.zeros(x.shape, jnp.float32) for x in (key, value, query)]
        _, key_grads, dq = lax.fori_loop(
            0, size, visit, ((key, value), (zeros[0], zeros[1]), zeros[2])
        )
        grads = Gradients(dq, *key_grads)
    dtypes = (query.dtype, key.dtype, value.dtype)
    dq, dk, dv = (x.astype(t) for x, t in zip(grads, dtypes, strict=True))
    return dq, dk, dv
