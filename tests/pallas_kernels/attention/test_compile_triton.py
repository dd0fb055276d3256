"""The Triton kernels through XLA's CUDA compiler and ptxas, for cards that are not there."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.attention import AttentionSpec, common, triton

pytestmark = pytest.mark.aot

# (B, T, S, N, K, H), dtype, mode, options.
CASES = {
    "record, D=64, causal": ((2, 512, 512, 4, 4, 64), "bfloat16", "record", {"is_causal": True}),
    "record, D=128, GQA, ragged": ((2, 300, 700, 4, 2, 128), "bfloat16", "record", {}),
    "record, D=256, MQA, causal": (
        (1, 512, 512, 4, 1, 256), "bfloat16", "record", {"is_causal": True, "rounds": 8},
    ),
    "record, D=64, float32": ((1, 300, 300, 2, 2, 64), "float32", "record", {"is_causal": True}),
    "record, D=256, float32": ((1, 300, 300, 2, 2, 256), "float32", "record", {}),
    "record, threefry": ((1, 300, 300, 2, 2, 128), "bfloat16", "record", {"rounds": "threefry"}),
    "sequence, D=128, window": (
        (1, 300, 300, 2, 2, 128), "float16", "sequence", {"is_causal": True, "window": (99, 0)},
    ),
    "sequence, D=256": ((1, 512, 512, 4, 2, 256), "bfloat16", "sequence", {}),
    "exact, D=64, causal": ((2, 512, 512, 4, 2, 64), "bfloat16", "exact", {"is_causal": True}),
    "exact, D=128": ((2, 300, 512, 4, 4, 128), "bfloat16", "exact", {}),
    "exact, D=256": ((1, 512, 512, 4, 2, 256), "float16", "exact", {}),
    "exact, D=128, float32": ((1, 300, 300, 2, 2, 128), "float32", "exact", {}),
}  # fmt: skip


def make_spec(mode, depth, **options):
    noisy = {"value_clip": 1.0, "numerator_std": 0.5} if mode != "exact" else {}
    if mode == "record":
        noisy |= {"logit_bound": 2.0, "denominator_std": 0.5, "denominator_floor": 0.5}
    return AttentionSpec(mode=mode, scale=depth**-0.5, **noisy, **options)


def shapes_of(shape, dtype, mode):
    batch, num_rows, num_keys, heads, kv_heads, depth = shape
    struct = jax.ShapeDtypeStruct
    query = struct((batch, num_rows, heads, depth), dtype)
    key = struct((batch, num_keys, kv_heads, depth), dtype)
    scale = struct((batch, kv_heads, num_keys), jnp.float32)
    noise = struct((batch, 11), jnp.uint32)
    lengths = struct((batch,), jnp.int32)
    stat = struct((batch, heads, num_rows), jnp.float32)
    if mode == "exact":
        scale = noise = None
    return query, key, scale, noise, lengths, stat


# All for one card. The others differ in shared memory, which the widest and the float32 ones
# need most; on Hopper these are also what the Triton kernels are taken for.
COMPILED = [
    (name, card)
    for name in CASES
    for card in ("a100", "h100", "rtx4090")
    if card == "a100" or "D=256" in name or "float32" in name
]


@pytest.mark.parametrize(("name", "card"), COMPILED)
def test_compiles(offline, name, card):
    shape, dtype, mode, options = CASES[name]
    spec = make_spec(mode, shape[-1], **options)
    query, key, scale, noise, lengths, stat = shapes_of(shape, dtype, mode)

    def forward(*operands):
        return triton.forward(*operands, spec)

    def backward(*operands):
        return triton.backward(*operands, spec)

    passes = {
        forward: (query, key, key, scale, noise, lengths),
        backward: (query, key, key, scale, lengths, stat, stat, query),
    }
    if mode == "record":
        units = common.sum_units(spec, 2**20)
        passes[lambda *operands: triton.sums(*operands, spec, units)] = (
            query, key, key, scale, lengths,
        )  # fmt: skip
    for one_pass, operands in passes.items():
        compiled = offline.compile_for(card, one_pass, *operands)
        assert "__gpu$xla.gpu.triton" in compiled.as_text()
        # Pointers to the outputs, and nothing that grows with the input.
        assert compiled.memory_analysis().temp_size_in_bytes < 256
