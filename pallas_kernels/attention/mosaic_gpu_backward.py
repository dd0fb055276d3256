"""Backward pass of attention on Hopper GPUs (Pallas Mosaic GPU): two kernels, no temporaries.

One kernel makes dq, the other dk and dv. Each recomputes the weights from the logits and
``lse``, so seven matrix products instead of the five of a single kernel; in return nothing
of the size of the inputs is kept in device memory (a single kernel adds dq up in float32
there), and the result does not depend on the order in which blocks run.

Both kernels look alike. A block owns 64 rows of queries (dq) or keys (dk, dv) per compute
warpgroup and accumulates their gradients in registers, while one more warpgroup streams
tiles of the other side through a ring of shared-memory slots. In the dk/dv kernel all tiles
are transposed (rows are keys), so that the weights leave the first product in the layout
that the second one takes from registers.

The tiles that need a mask come first, the others follow in a loop of their own that knows
neither row nor column numbers.
"""

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

from pallas_kernels.attention import mosaic_gpu_backward_tiles as tiles
from pallas_kernels.attention import mosaic_gpu_ops as ops
from pallas_kernels.attention import mosaic_gpu_products as products
from pallas_kernels.attention.spec import AttentionSpec

_ROWS = 64  # of a tile: the M of one WGMMA instruction, one warpgroup


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Block sizes; the defaults fit every shape that the kernels support.

    Attributes:
        dq_keys: keys of one tile of the dq kernel, 64 or 128.
        dq_stages: slots of its ring.
        dq_warpgroups: its compute warpgroups, 1 to 3, each with 64 rows of its own.
        dkv_rows: query rows of one tile of the dk/dv kernel, 64 or 128.
        dkv_stages: slots of its ring.
        dkv_warpgroups: its compute warpgroups, 1 to 3, each with 64 keys of its own.
    """

    dq_keys: int = 64
    dq_stages: int = 4
    dq_warpgroups: int = 2
    dkv_rows: int = 64
    dkv_stages: int = 4
    dkv_warpgroups: int = 2


# Registers a thread, of the compute warpgroups and of the loading one, by the number of the
# former. A block starts with the same for all, and what some take others must give back.
_REGISTERS = {1: (240, 40), 2: (240, 24), 3: (160, 24)}


def unsupported(spec: AttentionSpec, query: Any, key: Any, *, has_mask: bool) -> str | None:
    """Why these kernels cannot take a call, whatever the device; None if they can."""
    del spec
    if has_mask:
        return "a mask"
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"{query.dtype} operands; the matrix units take bfloat16 and float16"
    if query.shape[-1] not in (64, 128):
        # dk and dv of 64 keys and 256 columns alone would take all 256 registers of a thread.
        return f"head dimension {query.shape[-1]} in the backward pass; 64 and 128 fit"
    if max(query.shape[1], key.shape[1]) > tiles.MOST:
        return f"more than {tiles.MOST} rows or keys, which float32 does not number exactly"
    return None


def _dq_kernel(
    spec: AttentionSpec, blocks: Blocks, grid: tuple[int, int, int], groups: int, *refs: Any
) -> None:
    """The gradient of the queries: 64 rows a compute warpgroup."""
    q_ref, k_ref, v_ref, do_ref, row_ref, key_ref, limit_ref, dq_ref = refs[:8]
    q_smem, do_smem, k_smem, v_smem, key_smem, own_bar, k_bar, v_bar, free, done, _ = refs[8:]
    wgs, keys, stages = blocks.dq_warpgroups, blocks.dq_keys, blocks.dq_stages
    dtype, shape = q_ref.dtype, (_ROWS, keys)
    wg = lax.axis_index("wg")

    # Each warpgroup finds it for itself: what all of them shared would be spilled.
    def place() -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, tiles.Plan]:
        tile, head, batch = _position(grid)
        if spec.is_causal:
            tile = grid[0] - 1 - tile  # the longest rows first
        kv_head = lax.div(head, jnp.int32(groups))
        limits = (limit_ref[batch, kv_head, 0], limit_ref[batch, kv_head, 1])
        rows = wgs * _ROWS
        return tile, head, kv_head, batch, tiles.keys_plan(spec, tile * rows, rows, limits, keys)

    @pl.when(wg < wgs)
    def _compute() -> None:
        plgpu.set_max_registers(_REGISTERS[wgs][0], action="increase")
        tile, head, _, batch, plan = place()
        own = pl.ds((tile * wgs + wg) * _ROWS, _ROWS)
        q = q_smem.at[wg]
        minus_lse, minus_delta, rows = (
            plgpu.load(row_ref.at[batch, head, i, own], layout=tiles.LINE[0], optimized=False)
            for i in range(3)
        )
        plgpu.barrier_wait(own_bar.at[wg])
        lefts: list[Any] = [(q_smem, wg), (do_smem, wg)]
        if spec.is_noisy and wgs <= 2 and (q.shape[1], keys) == (128, 64):
            # A product with both operands in shared memory reads all that this can give, and the
            # factors lie there too. (Without these nothing is gained; other sizes lack registers.)
            lefts = [plgpu.load(x.at[i], layout=tiles.TILE) for x, i in lefts]

        def accumulate(dq: Any) -> jax.Array:
            def step(
                slot: jax.Array,
                masked: bool,
                release: Callable[[], None],
                ahead: Callable[[], None],
            ) -> None:
                s = products.start(lefts[0], k_smem, slot)
                plgpu.barrier_wait(v_bar.at[slot])
                d = products.start(lefts[1], v_smem, slot)
                s = products.wait(s, 1)
                release()
                if masked:
                    columns = plgpu.load(key_smem.at[slot, 1], layout=tiles.LINE[1])
                    s = tiles.hide(
                        spec, s, tiles.spread(rows, shape, 0), tiles.spread(columns, shape, 1)
                    )
                p, _ = tiles.weights(spec, s, tiles.spread(minus_lse, shape, 0), only_free=True)
                if spec.is_noisy:
                    c = tiles.spread(
                        plgpu.load(key_smem.at[slot, 0], layout=tiles.LINE[1]), shape, 1
                    )
                # This wait also is a branch, and ptxas moves nothing across one. Without it the
                # exponentials sink below the next line, and do not run beside the product d.
                ahead()
                d = products.wait(d, 0)
                offset = tiles.spread(minus_delta, shape, 0)
                if spec.is_noisy:
                    if masked:  # v may be NaN where c is 0
                        d = jnp.where(c > 0.0, d, 0.0)
                    d = ops.fma(d, c, offset)
                else:
                    d = d + offset
                ds = (p * d).astype(dtype)
                plgpu.wgmma(dq, ds, k_smem.at[slot])  # awaited with the next tile's products

            tiles.walk(plan, 1, stages, step, free, k_bar)
            return dq[...]

        dq = pl.run_scoped(accumulate, plgpu.WGMMAAccumulatorRef(q.shape, jnp.float32))
        q[...] = (dq * spec.scale).astype(dtype)
        plgpu.commit_smem()
        plgpu.barrier_arrive(done)

    @pl.when(wg == wgs)
    def _load() -> None:
        plgpu.set_max_registers(_REGISTERS[wgs][1], action="decrease")
        tile, head, kv_head, batch, plan = place()
        own = [(batch, pl.ds((tile * wgs + i) * _ROWS, _ROWS), head) for i in range(wgs)]
        for i in range(wgs):
            plgpu.copy_gmem_to_smem(q_ref.at[own[i]], q_smem.at[i], own_bar.at[i])
            plgpu.copy_gmem_to_smem(do_ref.at[own[i]], do_smem.at[i], own_bar.at[i])

        def load(tile: jax.Array, _: jax.Array, slot: jax.Array) -> None:
            cut = pl.ds(tile * keys, keys)
            at = (batch, cut, kv_head)
            plgpu.copy_gmem_to_smem(k_ref.at[at], k_smem.at[slot], k_bar.at[slot])
            plgpu.copy_gmem_to_smem(
                key_ref.at[batch, kv_head, :, cut], key_smem.at[slot], k_bar.at[slot]
            )
            plgpu.copy_gmem_to_smem(v_ref.at[at], v_smem.at[slot], v_bar.at[slot])

        tiles.stream(plan, 1, stages, load, free)
        plgpu.barrier_wait(done)
        for i in range(wgs):
            plgpu.copy_smem_to_gmem(q_smem.at[i], dq_ref.at[own[i]])
        plgpu.wait_smem_to_gmem(0)


def _dkv_kernel(
    spec: AttentionSpec,
    blocks: Blocks,
    grid: tuple[int, int, int],
    groups: int,
    num_rows: int,
    *refs: Any,
) -> None:
    """The gradients of keys and values: 64 keys a compute warpgroup; tile rows are keys."""
    q_ref, k_ref, v_ref, do_ref, row_ref, key_ref, limit_ref, dk_ref, dv_ref = refs[:9]
    k_smem, v_smem, q_smem, do_smem, row_smem, own_bar, q_bar, do_bar, free, done, c_smem = refs[9:]
    wgs, rows, stages = blocks.dkv_warpgroups, blocks.dkv_rows, blocks.dkv_stages
    dtype, shape = q_ref.dtype, (_ROWS, rows)
    wg = lax.axis_index("wg")

    # As in the other kernel.
    def place() -> tuple[jax.Array, jax.Array, jax.Array, tiles.Plan]:
        tile, kv_head, batch = _position(grid)
        keys, length = wgs * _ROWS, limit_ref[batch, kv_head, 0]
        plan = tiles.rows_plan(spec, tile * keys, keys, num_rows, length, rows)
        return tile, kv_head, batch, plan

    @pl.when(wg < wgs)
    def _compute() -> None:
        plgpu.set_max_registers(_REGISTERS[wgs][0], action="increase")
        tile, kv_head, batch, plan = place()
        own = pl.ds((tile * wgs + wg) * _ROWS, _ROWS)
        keys = plgpu.load(key_ref.at[batch, kv_head, 1, own], layout=tiles.LINE[0], optimized=False)
        k, v = k_smem.at[wg], v_smem.at[wg]
        plgpu.barrier_wait(own_bar.at[wg])
        if spec.is_noisy:
            c = tiles.spread(plgpu.load(c_smem.at[wg], layout=tiles.LINE[0]), v.shape, 0)
            # v may be NaN where c is 0.
            clipped = jnp.where(
                c > 0.0, plgpu.load(v, layout=tiles.TILE).astype(jnp.float32) * c, 0.0
            )
            v[...] = clipped.astype(dtype)
            plgpu.commit_smem()

        def accumulate(dk: Any, dv: Any) -> tuple[jax.Array, jax.Array]:
            def step(slot: jax.Array, masked: bool, release: Callable[[], None]) -> None:
                q, do = q_smem.at[slot], do_smem.at[slot]

                plgpu.barrier_wait(q_bar.at[slot])
                s = products.wait(products.start((k_smem, wg), q_smem, slot), 0)
                if masked:
                    columns = plgpu.load(row_smem.at[slot, 2], layout=tiles.LINE[1])
                    s = tiles.hide(
                        spec, s, tiles.spread(columns, shape, 1), tiles.spread(keys, shape, 0)
                    )
                minus_lse = tiles.spread(
                    plgpu.load(row_smem.at[slot, 0], layout=tiles.LINE[1]), shape, 1
                )
                p, p_free = tiles.weights(spec, s, minus_lse, only_free=False)
                p = p.astype(dtype)
                plgpu.barrier_wait(do_bar.at[slot])
                minus_delta = tiles.spread(
                    plgpu.load(row_smem.at[slot, 1], layout=tiles.LINE[1]), shape, 1
                )

                def logit_gradients(dp: Any) -> None:
                    plgpu.wgmma(dp, v, do.transpose((1, 0)))
                    plgpu.wgmma(dv, p, do)
                    dp[...] = p_free * plgpu.wgmma_accumulator_load(dp, wait_n=1)

                release()
                # The product dp starts at -delta: no subtraction, no registers for delta.
                ds = pl.run_state(logit_gradients)(
                    plgpu.WGMMAAccumulatorRef.init(minus_delta)
                ).astype(dtype)
                plgpu.wgmma(dk, ds, q)  # awaited with the next tile's product

            tiles.walk(plan, groups, stages, step, free)
            return dk[...], dv[...]

        acc = plgpu.WGMMAAccumulatorRef(k.shape, jnp.float32)
        dk, dv = pl.run_scoped(accumulate, acc, acc)
        k[...] = (dk * spec.scale).astype(dtype)
        if spec.is_noisy:
            # The factors once more: kept, they would take registers from the loop.
            c = tiles.spread(plgpu.load(c_smem.at[wg], layout=tiles.LINE[0]), v.shape, 0)
            dv = _through_clip(dv, plgpu.load(v, layout=tiles.TILE), c, spec.value_clip)
        v[...] = dv.astype(dtype)
        plgpu.commit_smem()
        plgpu.barrier_arrive(done)

    @pl.when(wg == wgs)
    def _load() -> None:
        plgpu.set_max_registers(_REGISTERS[wgs][1], action="decrease")
        tile, kv_head, batch, plan = place()
        own = [(batch, pl.ds((tile * wgs + i) * _ROWS, _ROWS), kv_head) for i in range(wgs)]
        for i in range(wgs):
            plgpu.copy_gmem_to_smem(k_ref.at[own[i]], k_smem.at[i], own_bar.at[i])
            plgpu.copy_gmem_to_smem(v_ref.at[own[i]], v_smem.at[i], own_bar.at[i])
            if spec.is_noisy:
                source = key_ref.at[batch, kv_head, 0, own[i][1]]
                plgpu.copy_gmem_to_smem(source, c_smem.at[i], own_bar.at[i])

        def load(tile: jax.Array, group: jax.Array, slot: jax.Array) -> None:
            head = kv_head * groups + group
            cut = pl.ds(tile * rows, rows)
            plgpu.copy_gmem_to_smem(q_ref.at[batch, cut, head], q_smem.at[slot], q_bar.at[slot])
            plgpu.copy_gmem_to_smem(
                row_ref.at[batch, head, :, cut], row_smem.at[slot], q_bar.at[slot]
            )
            plgpu.copy_gmem_to_smem(do_ref.at[batch, cut, head], do_smem.at[slot], do_bar.at[slot])

        tiles.stream(plan, groups, stages, load, free)
        plgpu.barrier_wait(done)
        for i in range(wgs):
            plgpu.copy_smem_to_gmem(k_smem.at[i], dk_ref.at[own[i]])
            plgpu.copy_smem_to_gmem(v_smem.at[i], dv_ref.at[own[i]])
        plgpu.wait_smem_to_gmem(0)


def _through_clip(
    d_clipped: jax.Array, clipped: jax.Array, scale: jax.Array, bound: float
) -> jax.Array:
    """``common.through_clip`` for one tile of clipped rows."""
    v = clipped.astype(jnp.float32)
    along = jnp.sum(v * d_clipped, axis=1) * (1.0 / bound**2)
    turned = v * tiles.spread(along, (_ROWS, v.shape[1]), 0)
    turned = jnp.where(scale < 1.0, turned, 0.0)
    # A row that is not finite has the factor 0, and finite sums.
    return scale * (d_clipped - turned)


def _position(grid: tuple[int, int, int]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tile, head and batch element of this block; tiles of one head run side by side (L2)."""
    block = lax.axis_index("block")
    rest = lax.div(block, jnp.int32(grid[0]))
    return (
        lax.rem(block, jnp.int32(grid[0])),
        lax.rem(rest, jnp.int32(grid[1])),
        lax.div(rest, jnp.int32(grid[1])),
    )


def _pad(x: jax.Array, axis: int, multiple: int, value: float = 0.0) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths, constant_values=value) if widths[axis][1] else x


def _lines(
    query: jax.Array,
    key: jax.Array,
    value_scale: jax.Array | None,
    lengths: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    blocks: Blocks,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What belongs to single rows and keys and travels with their tiles.

    Returns:
        float32 [B, N, 3, T']: −lse in bits, −delta and the row number.
        float32 [B, K, 2, S']: value scale and key number.
        int32 [B, K, 2]: keys that exist; and the number of those at the beginning that need
        no mask even in their last tile, 0 where a value may be NaN.
    """
    numbers = jnp.arange(query.shape[1], dtype=jnp.float32)
    multiple = math.lcm(blocks.dq_warpgroups * _ROWS, blocks.dkv_rows)
    # A row that does not exist weighs nothing.
    parts = [(lse * -tiles.LOG2E, -tiles.NEVER), (-delta, 0.0)]
    parts.append((jnp.broadcast_to(numbers, lse.shape), tiles.NEVER))
    rows = jnp.stack([_pad(x, 2, multiple, value) for x, value in parts], axis=2)
    shape = (key.shape[0], key.shape[2], key.shape[1])
    lengths = jnp.minimum(lengths.astype(jnp.int32), key.shape[1])[:, None]
    numbers = jnp.arange(key.shape[1], dtype=jnp.int32)
    numbers = jnp.where(
        numbers < lengths[..., None], numbers.astype(jnp.float32), jnp.float32(tiles.NEVER)
    )
    scale = jnp.ones(shape, jnp.float32) if value_scale is None else value_scale
    keys = jnp.stack([scale, jnp.broadcast_to(numbers, shape)], axis=2)
    whole = jnp.where(jnp.any(scale == 0.0, axis=-1), 0, lengths)
    return (
        rows,
        _pad(keys, 3, math.lcm(blocks.dkv_warpgroups * _ROWS, blocks.dq_keys), tiles.NEVER),
        jnp.stack([jnp.broadcast_to(lengths, whole.shape), whole], axis=-1),
    )


def backward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    value_scale: jax.Array | None,
    lengths: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    d_out: jax.Array,
    spec: AttentionSpec,
    *,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of the attention of the kind ``spec``.

    With p_ij = exp(min(x_ij, U) − lse_i), x = scale·q·k, v̄_j = c_j·v_j: dv̄ = pᵀ·d_out,
    ds = p∘(d_out·v̄ᵀ − delta) where x < U and 0 elsewhere, dq = scale·ds·k, dk = scale·dsᵀ·q.
    (U is infinite but in record mode.)

    Device memory beyond arguments and results: O(B·N·T + B·K·S) float32; where T or S is no
    multiple of 8, which the copy engine asks for, padded copies of the operands too.

    Args:
        query: [B, T, N, H], bfloat16 or float16, H 64 or 128.
        key: [B, S, K, H], N a multiple of K.
        value: [B, S, K, H].
        value_scale: c, float32 [B, K, S], 0 where a value is not finite; None in exact mode.
        lengths: int32 [B]; batch element b has the keys 0, ..., lengths[b] − 1.
        lse: float32 [B, N, T], 1e30 for rows that see nothing.
        delta: float32 [B, N, T].
        d_out: [B, T, N, H].
        spec: the static options.
        blocks: block sizes.
        interpret: not possible here: the interpreter has no products from registers.

    Returns:
        dq, dk and dv, in the operands' dtype; dv from dv̄ as in ``common.through_clip``.

    Raises:
        ValueError: ``interpret`` is set.
    """
    if interpret:
        raise ValueError("interpret=True: these kernels cannot be interpreted, only compiled")
    blocks = blocks or Blocks()
    num_rows, num_keys = query.shape[1], key.shape[1]
    lines = _lines(query, key, value_scale, lengths, lse, delta, blocks)
    query, key, value, d_out = (_pad(x, 1, 8) for x in (query, key, value, d_out))
    operands = (query, key, value, d_out, *lines)
    dq = _dq(spec, blocks, *operands)
    dk, dv = _dkv(spec, blocks, *operands)
    return dq[:, :num_rows], dk[:, :num_keys], dv[:, :num_keys]


def _dq(spec: AttentionSpec, blocks: Blocks, *operands: jax.Array) -> jax.Array:
    query, key = operands[:2]
    batch, num_rows, num_heads, _ = query.shape
    wgs = blocks.dq_warpgroups
    grid = (pl.cdiv(num_rows, wgs * _ROWS), num_heads, batch)
    body = functools.partial(_dq_kernel, spec, blocks, grid, num_heads // key.shape[2])
    out = jax.ShapeDtypeStruct(query.shape, query.dtype)
    slots = (blocks.dq_stages, blocks.dq_keys, 2)
    return _launch(body, "attention_backward_query", grid, wgs, slots, 2, [out], operands)[0]


def _dkv(spec: AttentionSpec, blocks: Blocks, *operands: jax.Array) -> list[jax.Array]:
    query, key = operands[:2]
    batch, num_keys, kv_heads, _ = key.shape
    wgs = blocks.dkv_warpgroups
    grid = (pl.cdiv(num_keys, wgs * _ROWS), kv_heads, batch)
    body = functools.partial(
        _dkv_kernel, spec, blocks, grid, query.shape[2] // kv_heads, query.shape[1]
    )
    out = jax.ShapeDtypeStruct(key.shape, key.dtype)
    slots = (blocks.dkv_stages, blocks.dkv_rows, 3)
    # Keys, values, and factors of these.
    arrivals = 3 if spec.is_noisy else 2
    name = "attention_backward_key_value"
    return _launch(body, name, grid, wgs, slots, arrivals, [out] * 2, operands)


def _launch(
    body: Callable[..., None],
    name: str,
    grid: tuple[int, int, int],
    wgs: int,
    slots: tuple[int, int, int],
    arrivals: int,
    out: list[jax.ShapeDtypeStruct],
    operands: tuple[jax.Array, ...],
) -> list[jax.Array]:
    """Runs a kernel.

    ``wgs``: warpgroups that compute. ``slots``: how many, how many rows each, how many lines
    come along. ``arrivals``: how many copies bring what belongs to a warpgroup.
    """
    head_dim, (stages, rows, lines) = out[0].shape[-1], slots

    def ring(count: int, rows: int) -> Any:
        # How WGMMA reads its operands from shared memory.
        tiling: Any = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # type: ignore[abstract]
        return plgpu.SMEM((count, rows, head_dim), out[0].dtype, transforms=tiling)

    return plgpu.kernel(
        body,
        out_type=out,
        scratch_types=[
            ring(wgs, _ROWS),
            ring(wgs, _ROWS),
            ring(stages, rows),
            ring(stages, rows),
            plgpu.SMEM((stages, lines, rows), jnp.float32),
            plgpu.Barrier(num_arrivals=arrivals, num_barriers=wgs),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_arrivals=wgs, num_barriers=stages),
            plgpu.Barrier(num_arrivals=wgs),
            plgpu.SMEM((wgs, _ROWS), jnp.float32),
        ],
        grid=(math.prod(grid),),
        grid_names=("block",),
        num_threads=wgs + 1,
        thread_name="wg",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*operands)
