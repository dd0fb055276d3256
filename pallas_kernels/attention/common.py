"""What every implementation shares: who sees whom, clipping, lanes of noise, the grid."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, Float, Float32, Int32, UInt32

from pallas_kernels import prng
from pallas_kernels.attention.spec import AttentionSpec

# Children of a call's key (see pallas_kernels.prng.derive_key).
NUMERATOR, DENOMINATOR = 16, 17

# Keys that one matrix product sums (record mode).
BLOCK = 128

# Keys that a fused kernel sums in floating point before it goes on in fixed point. On
# Hopper a change costs more, and the matrix units are known better.
CHUNK = 512
HOPPER_CHUNK = 1024


def allowed_columns(
    spec: AttentionSpec,
    rows: jax.Array,
    num_columns: int,
    lengths: jax.Array | None,
    mask: jax.Array | None,
) -> Bool[Array, "b n t s"] | None:
    """Which columns each row sees, broadcastable to [B, N, rows, S]; None means all.

    ``rows`` holds the row numbers of this chunk; ``mask`` is already cut to them.
    """
    row = rows.astype(jnp.int32)[:, None]
    column = jnp.arange(num_columns, dtype=jnp.int32)[None, :]
    parts = []
    if spec.is_causal:
        parts.append((column <= row)[None, None])
    if spec.window is not None:
        left, right = spec.window
        parts.append(((column >= row - left) & (column <= row + right))[None, None])
    if lengths is not None:
        parts.append((column < lengths.astype(jnp.int32)[:, None])[:, None, None, :])
    if mask is not None:
        parts.append(mask)
    if not parts:
        return None
    allowed = parts[0]
    for part in parts[1:]:
        allowed = allowed & part
    return allowed


def row_scales(value: Float[Array, "*b h"], bound: float) -> Float32[Array, "*b"]:
    """The factor min(1, bound/‖v‖) of each row; 0 for a row that is not finite.

    One NaN would replace the whole release, which no noise hides.
    """
    square = jnp.sum(jnp.square(value.astype(jnp.float32)), axis=-1)
    return jnp.where(jnp.isfinite(square), _scale(square, bound), 0.0)


def value_scale(value: Float[Array, "b s k h"], spec: AttentionSpec) -> Float32[Array, "b k s"]:
    """:func:`row_scales`, a line for each head."""
    return row_scales(value, spec.value_clip).swapaxes(1, 2)


def row_dots(
    first: Float[Array, "b t n h"], second: Float[Array, "b t n h"]
) -> Float32[Array, "b n t"]:
    """The products of corresponding rows, in float32."""
    return jnp.einsum(
        "btnh,btnh->bnt", first.astype(jnp.float32), second.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )  # fmt: skip


def clipped(
    value: Float[Array, "b s k h"], scale: Float32[Array, "b k s"] | None
) -> Float[Array, "b s k h"]:
    """c·v in the values' dtype; rows with c = 0 are zero whatever they hold."""
    if scale is None:
        return value
    factor = jnp.swapaxes(scale, 1, 2)[..., None]
    finite = jnp.where(factor > 0.0, value.astype(jnp.float32), 0.0)
    return (finite * factor).astype(value.dtype)


def through_clip(
    d_clipped: Float32[Array, "*b h"],
    value: Float32[Array, "*b h"],
    scale: Float32[Array, "*b 1"],
    bound: float,
) -> Float32[Array, "*b h"]:
    """The gradient of rows v from the gradient g of v̄ = c·v, c = min(1, bound/‖v‖).

    c·(g − v̄ (v̄·g)/bound²) where c < 1: only the direction of a clipped row matters. The
    gradient of a row that is not finite is 0.
    """
    clipped = jnp.where(scale > 0.0, value * scale, 0.0)
    d = jnp.where(scale > 0.0, d_clipped, 0.0)
    along = jnp.sum(clipped * d, axis=-1, keepdims=True) * jnp.float32(1.0 / bound**2)
    return scale * (d - jnp.where(scale < 1.0, clipped * along, 0.0))


def value_gradient(
    d_clipped: Float[Array, "b s k h"],
    value: Float[Array, "b s k h"],
    value_scale: Float32[Array, "b k s"] | None,
    spec: AttentionSpec,
) -> Float[Array, "b s k h"]:
    """:func:`through_clip` for the values of a call, in ``d_clipped``'s dtype; None clips none."""
    if value_scale is None:
        return d_clipped
    scale = value_scale.swapaxes(1, 2)[..., None]
    d, rows = (x.astype(jnp.float32) for x in (d_clipped, value))
    return through_clip(d, rows, scale, spec.value_clip).astype(d_clipped.dtype)


def clip_rows(value: Float[Array, "*b h"], bound: float) -> Float32[Array, "*b h"]:
    """Rows times :func:`row_scales`, in float32; rows that are not finite are zero."""
    value = value.astype(jnp.float32)
    square = jnp.sum(jax.lax.stop_gradient(value * value), axis=-1, keepdims=True)
    value = jnp.where(jnp.isfinite(square), value, 0.0)
    # Summed again: the gradient of the first sum is 0·NaN in a row that is not finite.
    return value * _scale(jnp.sum(value * value, axis=-1, keepdims=True), bound)


def _scale(square: jax.Array, bound: float) -> jax.Array:
    over = square > bound * bound
    # The inner `where` keeps 1/0 out of the branch that is not taken: its gradient is NaN.
    return jnp.where(over, bound * jax.lax.rsqrt(jnp.where(over, square, 1.0)), 1.0)


def fixed_point_unit(bound: float, num_keys: int) -> float:
    """The power of two g whose multiples hold a sum of ``num_keys`` terms of size ``bound``.

    Kernels that add chunks of the keys one after the other round each chunk's sum to a
    multiple of g and add these as int32. Such sums are exact in any order, so that one
    record more or less changes the rounding of its own chunk and nothing else
    (docs/privacy.md, section 1, "Rounding").
    """
    return 2.0 ** (math.ceil(math.log2(bound * num_keys)) - 29)


class Units(NamedTuple):
    """The public units, powers of two, in which N and L are counted as int32."""

    numerator: float
    denominator: float


def sum_units(spec: AttentionSpec, num_keys: int) -> Units:
    """Units in which the sums over ``num_keys`` keys plus their noise fit 31 bits.

    The noise counts with 8 standard deviations, more than it can reach. The sum of one
    chunk of N fits 22 bits and a sign, which Hopper's kernels ask for. The sensitivity
    counts on a unit of at most :func:`largest_unit`.
    """
    noise, row_noise = (
        fixed_point_unit(max(8.0 * std, 1e-30), 1)
        for std in (spec.numerator_std, spec.denominator_std)
    )
    weights = fixed_point_unit(1.0, max(num_keys, HOPPER_CHUNK))
    return Units(max(noise, largest_unit(spec, num_keys)), max(row_noise, weights))


def largest_unit(spec: AttentionSpec, num_keys: int) -> float:
    """The unit that the sum over the keys asks for, whatever the noise."""
    # 2 % above the clip: what rounding may add to a row.
    bound = 1.02 * spec.value_clip
    chunk = 2.0 ** (math.ceil(math.log2(bound * HOPPER_CHUNK)) - 22)
    return max(chunk, fixed_point_unit(spec.value_clip, num_keys))


def bounded_weights(
    logits: Float32[Array, "*s"], bound: float, allowed: Bool[Array, "*#s"] | None
) -> Float32[Array, "*s"]:
    """Weights exp(min(logit, U) − U) in [0, 1]; hidden columns and NaN logits get 0.

    Where the bound clamps, no gradient reaches the logit.
    """
    seen = ~jnp.isnan(logits)
    if allowed is not None:
        seen = seen & allowed
    free = seen & (logits < bound)
    # exp of a number <= 0 may round above 1 on some device: the sensitivity counts on 1.
    weights = jnp.minimum(jnp.exp(jnp.where(free, logits, bound) - bound), 1.0)
    return jnp.where(seen, weights, 0.0)


def _round_to_grid(x: jax.Array, spacing: float) -> jax.Array:
    """``x`` rounded to a multiple of ``spacing``, a power of two; its derivative is 1.

    The gradient is that of the unrounded release: rounding is a step function whose own
    derivative says nothing.
    """
    if spacing == 0.0:
        return x
    return jnp.round(x / spacing) * spacing


round_to_grid = jax.custom_jvp(_round_to_grid, nondiff_argnums=(1,))


@round_to_grid.defjvp
def _round_to_grid_jvp(
    spacing: float, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    return round_to_grid(primals[0], spacing), tangents[0]


@custom_vmap
def _lane(lane: jax.Array, key_words: jax.Array, probes: Sequence[jax.Array]) -> jax.Array:
    return lane


@_lane.def_vmap
def _lane_vmap(
    axis_size: int,
    in_batched: tuple[bool, bool, Sequence[bool]],
    lane: jax.Array,
    key_words: jax.Array,
    probes: Sequence[jax.Array],
) -> tuple[jax.Array, bool]:
    lane_batched, key_batched, probes_batched = in_batched
    if key_batched or not any(probes_batched):
        # Every lane has its own key, or no data differs between the lanes.
        return _lane(lane, key_words, probes), lane_batched
    own = jnp.arange(axis_size, dtype=jnp.uint32)
    if lane_batched:
        own = own.reshape(-1, *[1] * (lane.ndim - 1))
        return _lane(lane * jnp.uint32(axis_size) + own, key_words, probes), True
    numbered = lane[None] * jnp.uint32(axis_size) + own.reshape(-1, *[1] * lane.ndim)
    return _lane(numbered, key_words, probes), True


def batch_counters(
    key_words: UInt32[Array, "8"],
    batch: int,
    operands: Sequence[jax.Array],
    *,
    first: jax.Array | int = 0,
    in_all: int | None = None,
) -> UInt32[Array, "b"]:
    """The batch counter of each batch element, distinct also across ``jax.vmap`` lanes.

    Under ``vmap`` a key that is not mapped would give every lane the same noise. The
    lanes are numbered here instead, as if the mapped axes were part of the batch.

    Args:
        key_words: the call's key.
        batch: batch elements here.
        operands: the call's arrays.
        first: number of the first one here, which may be traced.
        in_all: batch elements of all devices; None if these are all.
    """
    probes = tuple(jax.lax.stop_gradient(x)[(slice(0, 1),) * x.ndim] for x in operands if x.size)
    lane = _lane(jnp.uint32(0), key_words, probes) * jnp.uint32(in_all or batch)
    return lane + jnp.asarray(first).astype(jnp.uint32) + jnp.arange(batch, dtype=jnp.uint32)


def with_child_keys(noise: UInt32[Array, "b 11"]) -> UInt32[Array, "b 19"]:
    """A call's noise (:func:`fused.pack_noise`) with the two child keys for its own.

    For kernels that do not derive them. The rounds are a loop: written out, they take the
    compilers of GPUs half a minute.
    """
    # Not an array of two numbers: constants are no part of what can be run on several devices.
    assert DENOMINATOR == NUMERATOR + 1
    zero, purpose = jnp.uint32(0), NUMERATOR + jnp.arange(2, dtype=jnp.uint32)
    words = prng.random_block(noise[:, None, :8], (zero, zero, zero, purpose), unroll=False)
    keys = jnp.stack(words[:8], axis=-1).reshape(-1, 16)
    return jnp.concatenate([keys, noise[:, 8:]], axis=1)


class Noise(NamedTuple):
    """What makes the noise of a call: key, batch counters, counter of the first head."""

    key_words: UInt32[Array, "8"]
    batch: UInt32[Array, "b"]
    first_head: jax.Array | int = 0


def numerator_noise(
    key_words: jax.Array,
    batch: jax.Array,
    rows: jax.Array,
    heads: int,
    depth: int,
    rounds: prng.Rounds,
    first_head: jax.Array | int = 0,
) -> Float32[Array, "b t n h"]:
    """Standard normals for the numerator (or the output row)."""
    child = prng.derive_key(key_words, NUMERATOR)
    return prng.normal_tile(child, batch, rows, heads, depth, rounds=rounds, first_head=first_head)


def denominator_noise(
    key_words: jax.Array,
    batch: jax.Array,
    rows: jax.Array,
    heads: int,
    rounds: prng.Rounds,
    first_head: jax.Array | int = 0,
) -> Float32[Array, "b t n"]:
    """Standard normals for the sum of weights: :func:`prng.normal_of_row`, of its own key."""
    child = prng.derive_key(key_words, DENOMINATOR)
    row = rows[None, :, None]
    counters = (
        jnp.uint32(0),
        row >> jnp.uint32(4),
        prng.head_counters(first_head, heads)[None, None, :],
        batch[:, None, None],
    )
    words = prng.chacha_block(child, counters, rounds=rounds)
    return prng.normal_of_row(words, row)


def _times(noise: jax.Array, std: float) -> jax.Array:
    """σg, rounded to float32 before anything is added.

    One program may fuse the product with the addition and another not, and then a sum lies
    now and then in another cell of the grid: the release on several devices shall be that on one.
    For the same reason sums are multiplied by 1/L̃: some programs divide, others do that.
    """
    return jax.lax.optimization_barrier(jnp.float32(std) * noise)


def release_record(
    spec: AttentionSpec,
    numerator: Float32[Array, "b t n h"],
    denominator: Float32[Array, "b t n"],
    key_words: UInt32[Array, "8"],
    batch: UInt32[Array, "b"],
    rows: UInt32[Array, "t"],
    first_head: jax.Array | int = 0,
) -> Float32[Array, "b t n h"]:
    """Noise, grid and division: (N + σ_N g) / max(L + σ_L g', floor)."""
    heads, depth = numerator.shape[-2:]
    g = numerator_noise(key_words, batch, rows, heads, depth, spec.rounds, first_head)
    g_l = denominator_noise(key_words, batch, rows, heads, spec.rounds, first_head)
    noisy_n = numerator + _times(g, spec.numerator_std)
    noisy_l = denominator + _times(g_l, spec.denominator_std)
    noisy_n = round_to_grid(noisy_n, spec.spacing(spec.numerator_std))
    noisy_l = round_to_grid(noisy_l, spec.spacing(spec.denominator_std))
    # Not jnp.maximum: at the floor the denominator passes no gradient at all.
    floor = jnp.float32(spec.denominator_floor)
    return noisy_n * (1.0 / jnp.where(noisy_l > floor, noisy_l, floor))[..., None]


def release_sums(
    spec: AttentionSpec,
    units: Units,
    numerator: Int32[Array, "b t n h"],
    denominator: Int32[Array, "b t n"],
    noise: "Noise",
    rows: UInt32[Array, "t"],
) -> tuple[Float32[Array, "b t n h"], Float32[Array, "b t n"]]:
    """:func:`release_record` of sums that are counted in ``units``, and max(L̃, floor).

    The noise is rounded to the units too and added to the integers, which is exact, and
    the grid is reached in integers: what is released is a function of N + σ_N g, where a
    float that holds N would have rounded N by itself first.
    """
    heads, depth = numerator.shape[-2:]
    where = (noise.batch, rows, heads)
    g = numerator_noise(noise.key_words, *where, depth, spec.rounds, noise.first_head)
    g_l = denominator_noise(noise.key_words, *where, spec.rounds, noise.first_head)

    def noisy(total: jax.Array, g: jax.Array, std: float, unit: float) -> jax.Array:
        total = total + jnp.round(g * jnp.float32(std / unit)).astype(jnp.int32)
        step = max(round(spec.spacing(std) / unit), 1)
        total = (total + jnp.int32(step // 2)) & jnp.int32(-step)
        return total.astype(jnp.float32) * jnp.float32(unit)

    noisy_n = noisy(numerator, g, spec.numerator_std, units.numerator)
    noisy_l = noisy(denominator, g_l, spec.denominator_std, units.denominator)
    noisy_l = jnp.maximum(noisy_l, jnp.float32(spec.denominator_floor))
    return noisy_n * (1.0 / noisy_l)[..., None], noisy_l


def release_sequence(
    spec: AttentionSpec,
    output: Float32[Array, "b t n h"],
    key_words: UInt32[Array, "8"],
    batch: UInt32[Array, "b"],
    rows: UInt32[Array, "t"],
    first_head: jax.Array | int = 0,
) -> Float32[Array, "b t n h"]:
    """Noise and grid on each output row."""
    heads, depth = output.shape[-2:]
    g = numerator_noise(key_words, batch, rows, heads, depth, spec.rounds, first_head)
    noisy = output + _times(g, spec.numerator_std)
    return round_to_grid(noisy, spec.spacing(spec.numerator_std))


def sum_over_keys(
    weights: Float32[Array, "b k g t s"], value: Float[Array, "b s k h"]
) -> tuple[Float32[Array, "b k g t h"], Float32[Array, "b k g t"]]:
    """N = Σ w v and L = Σ w: blocks of 128 keys, then a binary tree over the blocks.

    The shape is fixed, so that one record more or less changes the rounding of one block
    and of the nodes above it and nothing else. The sensitivity's rounding term counts on
    that (docs/privacy.md, section 1, "Rounding").

    The sum of weights keeps their float32 values, N takes them in the values' dtype: the
    two sums may be rounded differently, each of them is bounded by itself.
    """
    num_keys = value.shape[1]
    blocks = -(-num_keys // BLOCK)
    padding = blocks * BLOCK - num_keys
    w = jnp.pad(weights, [(0, 0)] * 4 + [(0, padding)])
    w = w.reshape(*w.shape[:-1], blocks, BLOCK)
    v = jnp.pad(value, ((0, 0), (0, padding), (0, 0), (0, 0)))
    v = v.reshape(v.shape[0], blocks, BLOCK, *v.shape[2:])
    numerators = jnp.einsum(
        "bkgtjs,bjskh->jbkgth",
        w.astype(v.dtype),
        v,
        # Short formats are multiplied exactly anyway; float32 must not be shortened.
        precision=jax.lax.Precision.HIGHEST if v.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    denominators = jnp.moveaxis(sum_by_halves(w), -1, 0)
    return _tree_sum(numerators), _tree_sum(denominators)


def sum_by_halves(x: Float32[Array, "*b s"]) -> Float32[Array, "*b"]:
    """Sum over the last axis, in an order that no compiler changes.

    A reduction may be ordered otherwise in another program: on several devices, say.
    """
    while x.shape[-1] > 1:
        if x.shape[-1] % 2:
            x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 1)])
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x[..., 0]


def _tree_sum(x: jax.Array) -> jax.Array:
    """Sum over the first axis, pairwise."""
    while x.shape[0] > 1:
        if x.shape[0] % 2:
            x = jnp.concatenate([x, jnp.zeros_like(x[:1])])
        x = x[0::2] + x[1::2]
    return x[0]
