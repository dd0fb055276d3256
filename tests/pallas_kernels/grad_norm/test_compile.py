"""The kernels through the compilers of devices that are not there."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.grad_norm import grad_norm_squared, mosaic_gpu, mosaic_tpu, triton

pytestmark = pytest.mark.aot

# (B, T, P, Q): GPT-2's layers, ragged sizes, a long sequence, low rank, and next to nothing.
SHAPES = {
    "T=256": (64, 256, 768, 3072),
    "T=1024": (16, 1024, 768, 3072),
    "ragged": (3, 300, 200, 1000),
    "odd": (2, 77, 33, 13),
    "long": (1, 8192, 2048, 2048),
    "rank 16": (16, 1024, 768, 16),
    "tiny": (1, 1, 1, 1),
}
TPUS = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")


def operands(name, dtype, sharding=None):
    batch, length, rows, columns = SHAPES[name]
    return [
        jax.ShapeDtypeStruct((batch, length, n), dtype, sharding=sharding) for n in (rows, columns)
    ]


@pytest.mark.parametrize("form", ["gram", "direct"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["T=1024", "odd", "rank 16"])
@pytest.mark.parametrize("card", ["a100", "h100", "rtx4090"])
def test_triton(offline, card, name, dtype, form):
    run = functools.partial(triton.grad_norm_squared, form=form)
    compiled = offline.compile_for(card, run, *operands(name, dtype), allow_spills=False)
    assert compiled.as_text().count("__gpu$xla.gpu.triton") == 1
    check_memory(compiled, name, form)


@pytest.mark.parametrize("form", ["gram", "direct", "rows"])
@pytest.mark.parametrize("name", SHAPES)
def test_mosaic_gpu_without_spills(ptxas, name, form):
    dtype = jnp.float16 if name == "ragged" else jnp.bfloat16
    run = functools.partial(mosaic_gpu.grad_norm_squared, form=form)
    run = mosaic_gpu.gram_with_rows if form == "rows" else run
    report = ptxas(run, *operands(name, dtype))
    assert len(report.registers) == 1  # one kernel
    assert report.spilled == 0
    # ptxas says so where it makes asynchronous matrix products wait for each other.
    assert not report.warnings
    # What compute threads ask for, the fetching warpgroup must have given back.
    more, less = mosaic_gpu.REGISTERS
    assert 2 * more + less <= 3 * report.registers[0]


def test_mosaic_gpu_with_leaves_that_share_a_launch(ptxas):
    shared = [*operands("T=256", jnp.bfloat16), *operands("T=256", jnp.bfloat16)[::-1]]
    report = ptxas(mosaic_gpu.gram_with_rows, *shared * (mosaic_gpu.MOST_LEAVES // 2))
    assert len(report.registers) == 1
    assert report.spilled == 0
    assert not report.warnings


@pytest.mark.parametrize("form", ["gram", "direct"])
@pytest.mark.parametrize("name", ["T=256", "long"])
def test_mosaic_gpu_keeps_no_tiles_in_memory(offline, monkeypatch, name, form):
    """Of the public call."""
    monkeypatch.setattr("pallas_kernels.grad_norm.api._wrong_device", lambda name: None)
    run = functools.partial(grad_norm_squared, form=form)
    check_memory(offline.compile_for("h100", run, *operands(name, jnp.bfloat16)), name, form)


@pytest.mark.usefixtures("no_cache")
@pytest.mark.parametrize("form", ["gram", "direct"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["T=1024", "odd"])
@pytest.mark.parametrize("chip", TPUS)
def test_mosaic_tpu(offline, chip, name, dtype, form):
    sharding = jax.sharding.SingleDeviceSharding(offline.tpu(chip))
    run = jax.jit(functools.partial(mosaic_tpu.grad_norm_squared, form=form))
    traced = run.trace(*operands(name, dtype, sharding))
    compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 1


def check_memory(compiled, name, form):
    """A number for each row of a tile of 128 x 128, and nothing more."""
    batch, length, rows, columns = SHAPES[name]
    across = [-(-n // 128) for n in (length, rows, columns)]
    tiles = across[1] * across[2]
    if form == "gram":
        tiles = across[0] * (across[0] + 1) // 2
    assert compiled.memory_analysis().temp_size_in_bytes <= 1024 + 4 * 130 * batch * tiles
