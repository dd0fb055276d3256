"""The Hopper kernels through XLA's CUDA compiler and ptxas, for a card that is not there."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.attention import (
    AttentionSpec,
    attention,
    common,
    mosaic_gpu,
    mosaic_gpu_factors,
    mosaic_gpu_forward,
)

RECORD = {
    "value_clip": 1.0,
    "logit_bound": 2.0,
    "numerator_std": 0.5,
    "denominator_std": 0.5,
    "denominator_floor": 0.5,
}
NUMBERS = {"record": RECORD, "sequence": {"value_clip": 1.0, "numerator_std": 0.5}, "exact": {}}

# (B, T, S, N, K, H), mode, options, dtype.
CASES = {
    "record, ChaCha8": ((4, 4096, 4096, 16, 16, 128), "record", {"rounds": 8}, "bfloat16"),
    "record": ((4, 4096, 4096, 16, 16, 128), "record", {}, "bfloat16"),
    "record, no bound, causal": (
        (4, 4096, 4096, 16, 16, 128), "record", {"bound_logits": False, "is_causal": True},
        "bfloat16",
    ),
    "record, causal, ragged, GQA": (
        (2, 1500, 1300, 8, 2, 128), "record", {"is_causal": True, "rounds": 12}, "float16",
    ),
    "record, window, one chunk": ((2, 300, 700, 4, 1, 128), "record", {"window": (100, 30)},
                                  "bfloat16"),
    "record, Threefry": ((2, 512, 512, 4, 4, 128), "record", {"rounds": "threefry"}, "bfloat16"),
    "record, D=64": ((4, 4096, 4096, 32, 32, 64), "record", {"rounds": 8}, "bfloat16"),
    "record, D=64, causal window": (
        (2, 1025, 1025, 4, 4, 64), "record", {"is_causal": True, "window": (400, 0)}, "float16",
    ),
    "record, D=256": ((1, 4096, 4096, 8, 8, 256), "record", {}, "bfloat16"),
    "record, D=256, causal, GQA": (
        (1, 1100, 1100, 8, 2, 256), "record", {"is_causal": True, "rounds": 8}, "float16",
    ),
    "sequence": ((4, 4096, 4096, 16, 16, 128), "sequence", {"rounds": 8}, "bfloat16"),
    "sequence, causal, ragged": (
        (2, 1500, 1300, 8, 2, 128), "sequence", {"is_causal": True}, "bfloat16",
    ),
    "sequence, D=64, window": (
        (2, 300, 700, 4, 1, 64), "sequence", {"window": (100, 30)}, "float16",
    ),
    "sequence, D=256, causal": (
        (1, 1024, 1024, 4, 4, 256), "sequence", {"is_causal": True}, "bfloat16",
    ),
    "exact": ((4, 4096, 4096, 16, 16, 128), "exact", {}, "bfloat16"),
    "exact, causal, GQA": ((2, 1500, 1300, 8, 2, 128), "exact", {"is_causal": True}, "float16"),
    "exact, D=64": ((4, 4096, 4096, 32, 8, 64), "exact", {}, "bfloat16"),
    "exact, D=256, window": (
        (1, 300, 1000, 4, 1, 256), "exact", {"is_causal": True, "window": (99, 0)}, "bfloat16",
    ),
}  # fmt: skip


# Bytes that a thread spills: two addresses, once a job, and with jax 0.12 alone. None elsewhere.
SPILLS = {"sequence, D=256, causal": 8}


def factor_shapes(value):
    return jax.eval_shape(lambda v: mosaic_gpu_factors.value_factors(v, 1.0), padded(value))


def padded(x):
    batch, rows, heads, depth = x.shape
    return jax.ShapeDtypeStruct((batch, -(-rows // 8) * 8, heads, depth), x.dtype)


def make_case(name):
    """The forward pass as a function, and the shapes of its operands."""
    (batch, num_rows, num_keys, heads, kv_heads, depth), mode, options, dtype = CASES[name]
    spec = AttentionSpec(mode=mode, scale=depth**-0.5, **NUMBERS[mode], **options)
    struct = jax.ShapeDtypeStruct
    query = struct((batch, num_rows, heads, depth), dtype)
    key = struct((batch, num_keys, kv_heads, depth), dtype)
    factors = factor_shapes(key) if spec.is_noisy else None
    noise = struct((batch, 11), jnp.uint32) if spec.is_noisy else None
    lengths = struct((batch,), jnp.int32)
    return (
        lambda *operands: mosaic_gpu.forward(*operands, spec),
        (query, key, key, factors, noise, lengths),
    )


@pytest.mark.aot
@pytest.mark.parametrize("name", CASES)
def test_compiles_for_h100_without_spills(name, ptxas):
    forward, operands = make_case(name)
    report = ptxas(forward, *operands)
    assert len(report.registers) == 1  # one kernel
    assert report.spilled <= SPILLS.get(name, 0)
    # ptxas says so where it makes asynchronous matrix products wait for each other.
    assert not report.warnings
    # All warpgroups start with the same registers. What some ask for others must have
    # given back, or they wait for ever.
    after = registers_taken(forward, operands)
    assert sum(after) <= report.registers[0] * len(after)


@pytest.mark.aot
@pytest.mark.parametrize(
    "name", ["record", "record, causal, ragged, GQA", "record, D=64", "record, D=256"]
)
def test_sums_alone_compile_without_spills(name, ptxas):
    _, (query, key, value, factors, _, lengths) = make_case(name)
    spec = AttentionSpec(mode="record", scale=0.1, is_causal="causal" in name, **RECORD)
    units = common.sum_units(spec, 2**20)
    report = ptxas(
        lambda *operands: mosaic_gpu.sums(*operands, spec, units),
        query, key, value, factors, lengths,
    )  # fmt: skip
    assert len(report.registers) == 1
    assert report.spilled == 0
    assert not report.warnings


@pytest.mark.aot
@pytest.mark.parametrize("depth", [64, 128, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_factors_compile_without_spills(depth, dtype, ptxas):
    value = jax.ShapeDtypeStruct((2, 1304, 4, depth), dtype)
    report = ptxas(lambda v: mosaic_gpu_factors.value_factors(v, 1.0).scale, value)
    assert len(report.registers) == 1
    assert report.spilled == 0
    # Five blocks on a multiprocessor: with fewer, too few rows are on their way.
    assert report.registers[0] <= 65536 // (5 * 128)


@pytest.mark.aot
@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.parametrize("mode", NUMBERS)
def test_no_memory_beyond_a_few_numbers_a_row(mode, with_gradients, offline, monkeypatch):
    """Of the public call: nothing as large as an operand, let alone T·S."""
    monkeypatch.setattr("pallas_kernels.attention.api._wrong_device", lambda name: None)
    batch, length, heads, depth = 2, 4096, 8, 128
    spec = AttentionSpec(mode=mode, scale=0.1, is_causal=True, **NUMBERS[mode])
    x = jax.ShapeDtypeStruct((batch, length, heads, depth), jnp.bfloat16)
    words = jnp.arange(8, dtype=jnp.uint32) if spec.is_noisy else None

    def call(q, k, v):
        return attention(q, k, v, spec, key_words=words, implementation="mosaic_gpu")

    def gradients(q, k, v, dout):
        out, pull = jax.vjp(call, q, k, v)
        return out, pull(dout)

    if with_gradients:
        compiled = offline.compile_for("h100", gradients, x, x, x, x)
    else:
        compiled = offline.compile_for("h100", call, x, x, x)
    kept = compiled.memory_analysis().temp_size_in_bytes
    assert kept <= 40 * batch * heads * length + 2**20


@pytest.mark.parametrize("name", CASES)
def test_warpgroups_take_no_more_registers_than_there_are(name):
    """The same before any compiler: a wrong sum shows as a kernel that never ends."""
    after = registers_taken(*make_case(name))
    start = 65536 // (128 * len(after)) // 8 * 8  # of a thread; handed out in eights
    assert sum(after) <= start * len(after)
    assert all(n % 8 == 0 and 24 <= n <= 256 for n in after)
    # The instruction that asks for more must not be given less, and the other way round.
    compute = after[0]
    assert compute >= min(start, 248)
    assert all(n <= start for n in after if n != compute)


@pytest.mark.parametrize(("warpgroups", "noisy"), mosaic_gpu_forward.COMPUTE_REGISTERS)
def test_every_line_of_the_register_table_fits(warpgroups, noisy):
    mode = "record" if noisy else "exact"
    spec = AttentionSpec(mode=mode, scale=0.1, **NUMBERS[mode])
    struct = jax.ShapeDtypeStruct
    x = struct((1, 256, 2, 128), jnp.bfloat16)
    factors = factor_shapes(x) if noisy else None
    noise = struct((1, 11), jnp.uint32) if noisy else None
    blocks = mosaic_gpu.Blocks(warpgroups=warpgroups)
    after = registers_taken(
        lambda *operands: mosaic_gpu.forward(*operands, spec, blocks=blocks),
        (x, x, x, factors, noise, struct((1,), jnp.int32)),
    )
    assert len(after) == warpgroups + 1 + noisy
    assert sum(after) <= 65536 // 128


def registers_taken(fn, operands):
    """Registers of a thread of each warpgroup after set_max_registers, as traced."""
    warpgroups, asked = None, {"increase": [], "decrease": []}
    for equation in _equations(jax.make_jaxpr(fn)(*operands).jaxpr):
        for mesh in equation.params.get("meshes", ()):
            warpgroups = mesh.num_threads
        if equation.primitive.name == "set_max_registers":
            asked[equation.params["action"]].append(equation.params["n"])
    (compute,), others = asked["increase"], asked["decrease"]
    return [compute] * (warpgroups - len(others)) + others


def _equations(jaxpr):
    """All equations, those of nested programs included."""
    for equation in jaxpr.eqns:
        yield equation
        nested = jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")
        )
        for x in nested:
            x = getattr(x, "jaxpr", x)
            if hasattr(x, "eqns"):
                yield from _equations(x)
