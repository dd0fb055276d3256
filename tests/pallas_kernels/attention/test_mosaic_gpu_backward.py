"""The Hopper backward kernels: which tiles they visit, how they compile, what they compute."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import AttentionSpec, tuning
from pallas_kernels.attention import mosaic_gpu_backward as kernels
from pallas_kernels.attention import mosaic_gpu_backward_tiles as tiles

struct = jax.ShapeDtypeStruct


def make_spec(mode="record", depth=128, **options):
    bound = 1.0 if mode == "record" else float("inf")
    return AttentionSpec(mode=mode, scale=depth**-0.5, logit_bound=bound, **options)


def visible(spec, num_rows, num_keys, length):
    """bool[T, S]"""
    row, key = np.arange(num_rows)[:, None], np.arange(num_keys)[None, :]
    seen = np.broadcast_to(key < length, (num_rows, num_keys)).copy()
    if spec.is_causal:
        seen &= key <= row
    if spec.window is not None:
        seen &= (key >= row - spec.window[0]) & (key <= row + spec.window[1])
    return seen


MASKS = {
    "none": {},
    "causal": {"is_causal": True},
    "window": {"window": (70, 9)},
    "causal window": {"window": (300, 0), "is_causal": True},
    "narrow window": {"window": (0, 0)},
    "huge window": {"window": (2**31 - 1, 2**31 - 1)},
}


@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("shape", [(512, 512, 512), (300, 700, 650), (700, 300, 0), (65, 1, 1)])
@pytest.mark.parametrize("side", ["keys", "rows"])
def test_plan_visits_what_is_seen_and_masks_what_is_not(side, shape, options):
    num_rows, num_keys, length = shape
    spec, size, own = make_spec(**options), 64, 128
    count = num_rows if side == "keys" else num_keys
    for first in range(0, count, own):
        if side == "keys":
            limits = (jnp.int32(length), jnp.int32(length))
            plan = tiles.keys_plan(spec, jnp.int32(first), own, limits, size)
            others = num_keys
        else:
            plan = tiles.rows_plan(spec, jnp.int32(first), own, num_rows, jnp.int32(length), size)
            others = num_rows
        masked = [int(plan.edge(jnp.int32(i))) for i in range(int(plan.edges))]
        whole = [int(plan.whole(jnp.int32(i))) for i in range(int(plan.inner))]
        visited = masked + whole
        assert len(set(visited)) == len(visited)
        for tile in range(-(-others // size)):
            mine, theirs = slice(first, first + own), slice(tile * size, (tile + 1) * size)
            # As wide as the tiles are; past the last row or key nobody sees anything.
            seen = visible(spec, num_rows + own, num_keys + own, length)
            seen = seen[mine, theirs] if side == "keys" else seen[theirs, mine]
            assert tile in visited or not seen.any()
            assert tile not in whole or seen.all()


def test_plan_skips_blocks():
    causal = make_spec(is_causal=True)
    limits = (jnp.int32(4096), jnp.int32(4096))
    plan = tiles.keys_plan(causal, jnp.int32(1024), 128, limits, 64)
    assert (int(plan.inner), int(plan.edges)) == (16, 2)
    plan = tiles.rows_plan(causal, jnp.int32(1024), 128, 4096, jnp.int32(4096), 64)
    assert (int(plan.inner), int(plan.edges)) == (46, 2)
    window = make_spec(window=(256, 0), is_causal=True)
    plan = tiles.keys_plan(window, jnp.int32(1024), 128, limits, 64)
    assert int(plan.inner) + int(plan.edges) == 6


@pytest.mark.parametrize(
    ("query", "key", "has_mask", "reason"),
    [
        (struct((1, 8, 1, 64), jnp.bfloat16), struct((1, 8, 1, 64), jnp.bfloat16), False, None),
        (struct((1, 8, 1, 128), jnp.float16), struct((1, 8, 1, 128), jnp.float16), False, None),
        (struct((1, 8, 1, 64), jnp.float32), struct((1, 8, 1, 64), jnp.float32), False, "float32"),
        (struct((1, 8, 1, 256), jnp.float16), struct((1, 8, 1, 256), jnp.float16), False, "256"),
        (struct((1, 8, 1, 64), jnp.float16), struct((1, 8, 1, 64), jnp.float16), True, "mask"),
        (struct((1, 8, 1, 64), jnp.float16), struct((1, 2**25, 1, 64), jnp.float16), False, "keys"),
    ],
)
def test_unsupported(query, key, has_mask, reason):
    got = kernels.unsupported(make_spec(), query, key, has_mask=has_mask)
    assert got is None if reason is None else reason in got


def operands(shape, dtype, mode):
    batch, num_rows, num_keys, heads, kv_heads, depth = shape
    query = struct((batch, num_rows, heads, depth), dtype)
    key = struct((batch, num_keys, kv_heads, depth), dtype)
    scale = struct((batch, kv_heads, num_keys), jnp.float32) if mode != "exact" else None
    stat = struct((batch, heads, num_rows), jnp.float32)
    return query, key, key, scale, struct((batch,), jnp.int32), stat, stat, query


def test_interpreting_is_refused():
    arguments = [None if s is None else jnp.zeros(s.shape, s.dtype)
                 for s in operands((1, 8, 8, 1, 1, 64), jnp.bfloat16, "record")]  # fmt: skip
    with pytest.raises(ValueError, match="interpret=True"):
        kernels.backward(*arguments, make_spec(), interpret=True)


# (B, T, S, N, K, H), mode, options.
COMPILED = {
    "record": ((4, 4096, 4096, 16, 16, 128), "record", {}),
    "record, causal": ((4, 4096, 4096, 16, 16, 128), "record", {"is_causal": True}),
    "record, causal, GQA": ((4, 4096, 4096, 16, 4, 128), "record", {"is_causal": True}),
    "record, window, cross": ((2, 1000, 2000, 4, 4, 128), "record", {"window": (100, 20)}),
    "sequence, causal window": (
        (2, 1024, 1024, 4, 2, 128), "sequence", {"is_causal": True, "window": (100, 20)},
    ),
    "exact, causal": ((4, 4096, 4096, 16, 16, 128), "exact", {"is_causal": True}),
    "record, D=64, causal": ((4, 4096, 4096, 32, 32, 64), "record", {"is_causal": True}),
    "sequence, D=64, causal": ((4, 4096, 4096, 32, 32, 64), "sequence", {"is_causal": True}),
    "exact, D=64": ((4, 4096, 4096, 32, 8, 64), "exact", {}),
    "record, D=64, short, causal": ((4, 256, 256, 32, 32, 64), "record", {"is_causal": True}),
}  # fmt: skip


@pytest.mark.aot
@pytest.mark.parametrize(("shape", "mode", "options"), COMPILED.values(), ids=COMPILED)
def test_compiles_for_h100_without_spills(shape, mode, options, ptxas):
    spec = make_spec(mode, shape[-1], **options)
    sizes = tuning.lookup(
        "mosaic_gpu", "backward", device_kind="NVIDIA H100", head_dim=shape[-1],
        is_causal=spec.is_causal, num_keys=shape[2], dtype=jnp.bfloat16, with_cache=False,
    )  # fmt: skip
    blocks = kernels.Blocks(**(sizes or {}))
    report = ptxas(
        lambda *args: kernels.backward(*args, spec, blocks=blocks),
        *operands(shape, jnp.bfloat16, mode),
    )
    # A block's 384 (or 512) threads share 65536 registers, 168 (or 128) each, which setmaxnreg
    # then hands around.
    wide = blocks.dkv_warpgroups == 3
    assert wide == (shape[-1] == 64 and shape[2] >= tuning.LONG)
    assert sorted(report.registers) == sorted((168, 128 if wide else 168))
    assert report.spilled == 0
    assert not report.warnings


# (B, T, S, N, K, H), mode, options, dtype, block sizes.
RUN = {
    "record": ((2, 256, 256, 2, 2, 128), "record", {}, "bfloat16", {}),
    "record, causal, ragged, GQA": (
        (2, 333, 333, 4, 2, 128), "record", {"is_causal": True}, "bfloat16", {},
    ),
    "record, window, cross, MQA": (
        (2, 200, 331, 4, 1, 128), "record", {"window": (50, 20)}, "bfloat16", {},
    ),
    "record, D=64, large tiles": (
        (1, 500, 500, 4, 4, 64), "record", {"is_causal": True}, "float16",
        {"dq_keys": 128, "dkv_rows": 128, "dq_stages": 2, "dkv_stages": 2},
    ),
    "record, D=64, the table's sizes": (
        (2, 333, 700, 4, 2, 64), "record", {"is_causal": True}, "bfloat16",
        {"dq_keys": 128, "dq_stages": 3, "dkv_warpgroups": 3},
    ),
    "sequence, D=64, causal, the table's sizes": (
        (1, 500, 500, 2, 2, 64), "sequence", {"is_causal": True}, "float16",
        {"dq_keys": 128, "dq_stages": 3, "dkv_warpgroups": 3},
    ),
    "sequence, D=64, causal": (
        (2, 257, 257, 4, 4, 64), "sequence", {"is_causal": True}, "float16", {},
    ),
    "exact, causal window, cross": (
        (2, 300, 460, 2, 2, 128), "exact", {"is_causal": True, "window": (90, 7)}, "bfloat16",
        {"dq_stages": 3, "dkv_stages": 3},
    ),
    "exact, D=64, three warpgroups": (
        (1, 300, 500, 2, 2, 64), "exact", {}, "bfloat16", {"dq_warpgroups": 3, "dkv_warpgroups": 3},
    ),
    "exact, one warpgroup": (
        (1, 100, 129, 2, 1, 128), "exact", {"is_causal": True}, "bfloat16",
        {"dq_warpgroups": 1, "dkv_warpgroups": 1},
    ),
}  # fmt: skip


def expected(spec, q, k, v, scale, lengths, lse, delta, d_out):
    """float64 NumPy, one batch element and head at a time, from the formulas."""
    as64 = [np.asarray(x).astype(np.float64) for x in (q, k, v, d_out, lse, delta)]
    q, k, v, d_out, lse, delta = as64
    if scale is not None:
        weight = np.asarray(scale, np.float64).transpose(0, 2, 1)[..., None]
        v = np.where(np.isfinite(v), v, 0.0) * weight
    groups = q.shape[2] // k.shape[2]
    dq, dk, dv = (np.zeros_like(x) for x in (q, k, v))
    for b in range(q.shape[0]):
        seen = visible(spec, q.shape[1], k.shape[1], int(lengths[b]))
        for n in range(q.shape[2]):
            j = n // groups
            x = spec.scale * q[b, :, n] @ k[b, :, j].T
            p = np.exp(np.minimum(x, spec.logit_bound) - lse[b, n][:, None]) * seen
            ds = p * (d_out[b, :, n] @ v[b, :, j].T - delta[b, n][:, None])
            ds *= x < spec.logit_bound
            dq[b, :, n] = spec.scale * ds @ k[b, :, j]
            dk[b, :, j] += spec.scale * ds.T @ q[b, :, n]
            dv[b, :, j] += p.T @ d_out[b, :, n]
    if scale is not None:
        along = (v * dv).sum(-1, keepdims=True) / spec.value_clip**2
        dv = weight * (dv - np.where(weight < 1, v * along, 0))
    return dq, dk, dv


def make_inputs(shape, dtype, spec, seed=0):
    batch, num_rows, num_keys, heads, kv_heads, depth = shape
    rng = np.random.default_rng(seed)

    def normal(*size):
        return jnp.asarray(rng.standard_normal(size), dtype)

    q, d_out = (normal(batch, num_rows, heads, depth) for _ in range(2))
    k, v = (normal(batch, num_keys, kv_heads, depth) for _ in range(2))
    lengths = np.array([num_keys, num_keys - num_keys // 3][:batch], np.int32)
    scale = None
    if spec.is_noisy:
        scale = rng.uniform(0.2, 1.0, (batch, kv_heads, num_keys)).astype(np.float32)
        scale[:, :, ::5] = 1.0  # rows that are not clipped
        scale[0, :, ::7] = 0.0  # rows that are not finite
        v = v.at[0, ::7, :, 3].set(jnp.nan).at[0, ::14, :, 5].set(-jnp.inf)
    # Any lse and delta will do; a row that sees nothing has this lse.
    lse = rng.uniform(3.0, 4.0, (batch, heads, num_rows)).astype(np.float32)
    lse[:, :, 5] = 1e30
    delta = (0.3 * rng.standard_normal(lse.shape)).astype(np.float32)
    return q, k, v, scale, lengths, lse, delta, d_out


@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "mode", "options", "dtype", "blocks"), RUN.values(), ids=RUN)
def test_gradients(shape, mode, options, dtype, blocks):
    spec = make_spec(mode, shape[-1], **options)
    inputs = make_inputs(shape, dtype, spec)
    blocks = kernels.Blocks(**blocks)
    got = jax.jit(lambda *args: kernels.backward(*args, spec, blocks=blocks))(*inputs)
    for name, ours, theirs in zip("qkv", got, expected(spec, *inputs), strict=True):
        ours = np.asarray(ours).astype(np.float64)
        assert ours.shape == theirs.shape
        size = np.max(np.abs(theirs))
        assert np.max(np.abs(ours - theirs)) < 1e-2 * size, f"d{name}"
        assert np.linalg.norm(ours - theirs) < 5e-3 * np.linalg.norm(theirs), f"d{name}"
    # The weights of a row that sees nothing are exactly 0.
    assert not np.any(np.asarray(got[0][:, 5]))
