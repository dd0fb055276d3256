"""The TPU kernels through libtpu's own compiler, for chips that are not there.

It checks what the interpreter cannot: that every operation has an implementation, that
blocks are aligned, and that the default block sizes fit into each chip's memory.
"""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.attention import AttentionSpec, common, mosaic_tpu

pytestmark = [pytest.mark.aot, pytest.mark.usefixtures("no_cache")]

CHIPS = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")

# (B, T, S, N, K, H), dtype, mode and other options.
CASES = {
    "record, D=64": ((2, 1024, 1024, 4, 4, 64), "bfloat16", {"mode": "record"}),
    "record, D=128, causal": (
        (1, 4096, 4096, 2, 2, 128),
        "bfloat16",
        {"mode": "record", "is_causal": True},
    ),
    "record, D=256, GQA, ragged": ((2, 1000, 1300, 4, 1, 256), "bfloat16", {"mode": "record"}),
    "record, float32, window": (
        (1, 700, 1300, 2, 1, 128),
        "float32",
        {"mode": "record", "window": (300, 40)},
    ),
    "record, few rows": ((1, 5, 60, 2, 1, 64), "float32", {"mode": "record", "rounds": 8}),
    "sequence, float32, D=256": (
        (1, 1024, 1024, 2, 1, 256),
        "float32",
        {"mode": "sequence", "is_causal": True},
    ),
    "sequence, D=128, Threefry": (
        (1, 1024, 1024, 2, 1, 128),
        "bfloat16",
        {"mode": "sequence", "rounds": "threefry"},
    ),
    "exact, D=128, causal, GQA": (
        (1, 1024, 1024, 4, 2, 128),
        "bfloat16",
        {"mode": "exact", "is_causal": True},
    ),
    "exact, float32, D=64": ((1, 1024, 1024, 2, 2, 64), "float32", {"mode": "exact"}),
}


def make_spec(depth, mode, **options):
    noisy = {
        "exact": {},
        "record": {
            "value_clip": 1.0,
            "logit_bound": 3.0,
            "numerator_std": 0.7,
            "denominator_std": 0.7,
            "denominator_floor": 1.0,
        },
        "sequence": {"value_clip": 1.0, "numerator_std": 0.7},
    }
    return AttentionSpec(mode=mode, scale=depth**-0.5, **noisy[mode], **options)


def compile_for(offline, chip, case, direction, blocks=None):
    """The compiled program of one pass."""
    (batch, num_rows, num_keys, heads, kv_heads, depth), dtype, options = case
    spec = make_spec(depth, **options)
    sharding = jax.sharding.SingleDeviceSharding(offline.tpu(chip))

    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    rows = array((batch, num_rows, heads, depth), dtype)
    keys = array((batch, num_keys, kv_heads, depth), dtype)
    lengths = array((batch,), jnp.int32)
    scale = array((batch, kv_heads, num_keys), jnp.float32) if spec.is_noisy else None
    noise = array((batch, 11), jnp.uint32) if spec.is_noisy else None
    statistic = array((batch, heads, num_rows), jnp.float32)
    if direction == "forward":
        kernel, operands = mosaic_tpu.forward, (rows, keys, keys, scale, noise, lengths)
    elif direction == "sums":
        kernel = functools.partial(mosaic_tpu.sums, units=common.sum_units(spec, 2**20))
        operands = (rows, keys, keys, scale, lengths)
    else:
        kernel = mosaic_tpu.backward
        operands = (rows, keys, keys, scale, lengths, statistic, statistic, rows)
    run = jax.jit(functools.partial(kernel, spec=spec, blocks=blocks))
    return run.trace(*operands).lower(lowering_platforms=("tpu",)).compile()


# Every chip takes what is large or unaligned; the oldest small one and the newest all of it.
SMALL = ("record, few rows", "sequence, D=128, Threefry", "exact, float32, D=64")
COMPILED = [
    (chip, name)
    for chip in CHIPS
    for name in CASES
    if name not in SMALL or chip in ("v5e:2x2", "tpu7x:2x2x1")
]


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(("chip", "name"), COMPILED)
def test_compiles(offline, chip, name, direction):
    compiled = compile_for(offline, chip, CASES[name], direction)
    kernels = compiled.as_text().count('custom_call_target="tpu_custom_call"')
    assert kernels == (1 if direction == "forward" else 2)


RECORD = [name for name in CASES if "record" in name]


# Every chip, and every case: they end where the kernels above go on.
@pytest.mark.parametrize(
    ("chip", "name"), [(c, RECORD[0]) for c in CHIPS] + [(CHIPS[1], n) for n in RECORD[1:]]
)
def test_sums_alone_compile(offline, chip, name):
    assert "tpu_custom_call" in compile_for(offline, chip, CASES[name], "sums").as_text()


def test_blocks_that_do_not_fit_are_refused(offline):
    """So the compiler does look at the chip's memory."""
    case = ((1, 4096, 512, 1, 1, 256), "float32", {"mode": "exact"})
    with pytest.raises(jax.errors.JaxRuntimeError, match="vmem"):
        compile_for(offline, "v5e:2x2", case, "forward", mosaic_tpu.Blocks(query=2048))
