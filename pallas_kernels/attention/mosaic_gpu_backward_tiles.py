"""What the two Hopper backward kernels share: which tiles, which masks, the ring of slots."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention import mosaic_gpu_ops as ops
from pallas_kernels.attention.spec import AttentionSpec

TILE = plgpu.Layout.WGMMA
LINE = (TILE.reduce(1), TILE.reduce(0))  # one value a row, one value a column
LOG2E = math.log2(math.e)
# lse of a row that does not exist and number of a key that does not: exp2(x − NEVER) is 0
# for every logit x, and no row sees so late a key.
NEVER = 1e30
MOST = 2**24  # rows and keys are numbered in float32


@dataclasses.dataclass(frozen=True)
class Plan:
    """The tiles that a block walks over: ``edges`` of them masked, then ``inner`` whole ones."""

    begin: jax.Array
    gap: jax.Array  # the number of edge tiles before the inner ones
    inner: jax.Array
    edges: jax.Array

    @classmethod
    def of(cls, seen: tuple[Any, Any], whole: tuple[Any, Any], size: int) -> "Plan":
        """From the ranges [low, high) that some pair sees and that all pairs see."""

        def up(x: Any) -> jax.Array:
            return lax.div(x + (size - 1), jnp.int32(size))

        begin = lax.div(seen[0], jnp.int32(size))
        end = jnp.maximum(begin, up(seen[1]))
        first = jnp.clip(up(whole[0]), begin, end)
        last = jnp.clip(lax.div(whole[1], jnp.int32(size)), first, end)
        return cls(begin, first - begin, last - first, end - begin - (last - first))

    def edge(self, i: jax.Array) -> jax.Array:
        """The i-th tile that needs a mask."""
        return self.begin + i + jnp.where(i < self.gap, 0, self.inner)

    def whole(self, i: jax.Array) -> jax.Array:
        """The i-th tile that needs none."""
        return self.begin + self.gap + i


def _window(spec: AttentionSpec) -> tuple[int, int]:
    """The window, cut to what int32 sums can bear."""
    left, right = spec.window or (MOST, MOST)
    return min(left, MOST), min(right, MOST)


def keys_plan(
    spec: AttentionSpec, row: jax.Array, rows: int, limits: tuple[jax.Array, jax.Array], size: int
) -> Plan:
    """Tiles of keys for the query rows row, ..., row + rows - 1; ``limits`` as in _lines."""
    low, high = jnp.int32(0), limits[0]
    whole_low, whole_high = jnp.int32(0), limits[1]
    if spec.is_causal:
        high = jnp.minimum(high, row + rows)
        whole_high = jnp.minimum(whole_high, row + 1)
    if spec.window is not None:
        left, right = _window(spec)
        low = jnp.maximum(low, row - left)
        high = jnp.minimum(high, row + rows + right)
        whole_low = jnp.maximum(whole_low, row + rows - 1 - left)
        whole_high = jnp.minimum(whole_high, row + 1 + right)
    return Plan.of((low, high), (whole_low, whole_high), size)


def rows_plan(
    spec: AttentionSpec, key: jax.Array, keys: int, num_rows: int, length: jax.Array, size: int
) -> Plan:
    """Tiles of query rows for the keys key, ..., key + keys - 1."""
    # Rows past the last one weigh nothing (NEVER): no mask in the last tile because of them.
    num_rows = pl.cdiv(num_rows, size) * size
    low, high = jnp.int32(0), jnp.int32(num_rows)
    whole_low, whole_high = low, high
    if spec.is_causal:
        low = key
        whole_low = key + keys - 1
    if spec.window is not None:
        left, right = _window(spec)
        low = jnp.maximum(low, key - right)
        high = jnp.minimum(high, key + keys + left)
        whole_low = jnp.maximum(whole_low, key + keys - 1 - right)
        whole_high = jnp.minimum(whole_high, jnp.maximum(key + 1 + left, 0))
    high = jnp.where(key < length, high, 0)
    whole_high = jnp.where(key + keys <= length, whole_high, 0)
    return Plan.of((low, high), (whole_low, whole_high), size)


def spread(line: jax.Array, shape: tuple[int, int], axis: int) -> jax.Array:
    """One value a row (axis 0) or a column (axis 1) to a whole tile."""
    return plgpu.layout_cast(lax.broadcast_in_dim(line, shape, [axis]), TILE)


def hide(spec: AttentionSpec, logits: jax.Array, row: jax.Array, key: jax.Array) -> jax.Array:
    """Sets the logits that a row does not see to −inf.

    The float32 numbers of rows and keys come with the tiles. Column numbers that are computed
    are moved out of the loop by the compiler, and take registers that accumulators need.
    """
    hidden = key > row if spec.is_causal else key >= NEVER
    if spec.window is not None:
        left, right = _window(spec)
        hidden |= (key < row - left) | (key > row + right)
    return jnp.where(hidden, -jnp.inf, logits)


def weights(
    spec: AttentionSpec, products: jax.Array, minus_lse2: jax.Array, *, only_free: bool
) -> tuple[jax.Array, jax.Array]:
    """exp(x - lse) from products q·k, and the same where a gradient reaches the logit.

    ``only_free`` says that the caller does not use the first of the two.
    """
    if spec.scale > 0.0:
        factor, bound = spec.scale * LOG2E, spec.logit_bound / spec.scale
    else:
        products, factor, bound = products * spec.scale, LOG2E, spec.logit_bound
    if spec.mode == "exact" or (spec.mode == "record" and not spec.bound_logits):
        weights = jnp.exp2(ops.fma(products, factor, minus_lse2))
        return weights, weights
    if spec.mode == "sequence":
        bound, only_free = NEVER, True
    free = products < bound  # false for NaN
    clamped = jnp.where(free, products, -jnp.inf if only_free else bound)
    weights = jnp.exp2(ops.fma(clamped, factor, minus_lse2))
    return weights, weights if only_free else jnp.where(free, weights, 0.0)


def _after(slot: jax.Array, stages: int) -> jax.Array:
    # Counted, not divided: a remainder takes more instructions and registers.
    return jnp.where(slot == stages - 1, 0, slot + 1)


def stream(plan: Plan, repeats: int, stages: int, load: Callable[..., None], free: Any) -> None:
    """The loading warpgroup: fills slots in the order in which the others empty them."""

    def fill(
        tile: Callable[[jax.Array], jax.Array], repeat: Any, i: jax.Array, state: Any
    ) -> tuple[jax.Array, jax.Array]:
        n, slot = state

        # A slot is handed back one step late, so that products still run on it meanwhile;
        # the first step hands back the last slot, which was never filled.
        @pl.when(n >= stages - 1)
        def _() -> None:
            plgpu.barrier_wait(free.at[slot])

        load(tile(i), repeat, slot)
        return n + 1, _after(slot, stages)

    state = (jnp.int32(0), jnp.int32(0))
    for tile, count in ((plan.edge, plan.edges), (plan.whole, plan.inner)):
        if repeats == 1:
            state = lax.fori_loop(0, count, functools.partial(fill, tile, 0), state)
        else:

            def again(repeat: jax.Array, state: Any, tile: Any = tile, count: Any = count) -> Any:
                return lax.fori_loop(0, count, functools.partial(fill, tile, repeat), state)

            state = lax.fori_loop(0, repeats, again, state)


def walk(
    plan: Plan, repeats: int, stages: int, step: Callable[..., None], free: Any, ready: Any = None
) -> None:
    """A compute warpgroup: ``step(slot, masked, release)`` for every filled slot.

    ``release()`` hands back the slot of the step before, whose products have ended by then.

    With barriers ``ready``, one a slot, every slot's has been awaited when its step begins, and
    ``step`` gets one more function, to be called once, that awaits the next step's.
    """
    edges, end = plan.edges * repeats, (plan.edges + plan.inner) * repeats

    def visit(masked: bool, i: jax.Array, slots: tuple[jax.Array, jax.Array]) -> Any:
        last, slot = slots
        following = _after(slot, stages)

        def release() -> None:
            plgpu.barrier_arrive(free.at[last])

        def ahead() -> None:
            @pl.when(i + 1 < end)
            def _() -> None:
                plgpu.barrier_wait(ready.at[following])

        step(slot, masked, release, *([] if ready is None else [ahead]))
        return slot, following

    if ready is not None:

        @pl.when(end > 0)
        def _() -> None:
            plgpu.barrier_wait(ready.at[0])

    slots = (jnp.int32(stages - 1), jnp.int32(0))
    slots = lax.fori_loop(0, edges, functools.partial(visit, True), slots)
    lax.fori_loop(edges, end, functools.partial(visit, False), slots)
