"""The block generator for kernels: published vectors, one stream wherever it runs."""

import functools
import struct

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import prng
from pallas_kernels.prng.threefry import threefry

ROUNDS = [8, 12, 20, "threefry"]
# RFC 8439, section 2.3.2: key 00 01 ... 1f, counter 1, nonce 000000090000004a00000000.
RFC_KEY = struct.unpack("<8I", bytes(range(32)))
RFC_COUNTERS = (1, 0x09000000, 0x4A000000, 0)
RFC_STREAM = (
    "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
    "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e"
)
# Random123's published known answers for threefry2x32, 20 rounds: counter, key, result.
KNOWN_ANSWERS = [
    ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
    ((2**32 - 1,) * 2, (2**32 - 1,) * 2, (0x1CB996FC, 0xBB002BE7)),
    ((0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xC4923A9C, 0x483DF7A0)),
]
KEY = tuple(int(w) for w in np.random.default_rng(5).integers(2**32, size=8))


def _words(numbers):
    return [jnp.uint32(n) for n in numbers]


def _numbers(block):
    return np.stack([np.asarray(x) for x in block], axis=-1)


@pytest.mark.parametrize("unroll", [True, False])
def test_rfc_8439_vector(unroll):
    block = prng.random_block(_words(RFC_KEY), _words(RFC_COUNTERS), rounds=20, unroll=unroll)
    assert struct.pack("<16I", *(int(x) for x in block)).hex() == RFC_STREAM


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
@pytest.mark.parametrize("unroll", [True, False])
def test_threefry_known_answers(plain, counter, key, expected, unroll):
    got = threefry(tuple(_words(key)), tuple(_words(counter)), unroll=unroll)
    assert tuple(int(x) for x in got) == expected
    assert plain.threefry(key, counter) == expected


def test_threefry_is_that_of_jax():
    random = np.random.default_rng(0).integers(2**32, size=(4, 64), dtype=np.uint32)
    k0, k1, x, y = map(jnp.asarray, random)
    for i in range(64):
        expected = jax.extend.random.threefry_2x32(
            jnp.stack([k0[i], k1[i]]), jnp.stack([x[i], y[i]])
        )
        got = threefry((k0[i], k1[i]), (x[i], y[i]))
        assert [int(w) for w in got] == expected.tolist()


@pytest.mark.parametrize("rounds", ROUNDS)
def test_unrolled_rolled_compiled_and_plain_are_one(plain, rounds):
    random = np.random.default_rng(1).integers(2**32, size=(4, 3, 5), dtype=np.uint32)
    random[0] >>= 4  # Threefry counts eight to a block
    counters = [jnp.asarray(c) for c in random]
    expected = plain.words(KEY, list(random.astype(np.uint64)), rounds)
    expected = np.stack(expected, axis=-1).astype(np.uint32)
    key = jnp.asarray(KEY, jnp.uint32)
    for words in (_words(KEY), key):
        for how in ({}, {"unroll": False}, {"unroll": False, "peel": True}):
            block = prng.random_block(words, counters, rounds=rounds, **how)
            assert (_numbers(block) == expected).all()
    assert (_numbers(prng.chacha_block(key, tuple(counters), rounds=rounds)) == expected).all()


@pytest.mark.parametrize("rounds", ROUNDS)
@pytest.mark.parametrize("unroll", [True, False])
def test_keys_and_counters_broadcast(plain, rounds, unroll):
    keys = jnp.arange(16, dtype=jnp.uint32).reshape(2, 1, 8)
    first, row = jnp.arange(3, dtype=jnp.uint32), jnp.uint32(7)
    head = jnp.arange(4, dtype=jnp.uint32)[:, None, None]
    counters = (first, row, head, jnp.uint32(9))
    block = prng.random_block(keys, counters, rounds=rounds, unroll=unroll)
    assert all(x.shape == (4, 2, 3) and x.dtype == jnp.uint32 for x in block)
    got = _numbers(block)
    for n in range(4):
        for k in range(2):
            for i in range(3):
                expected = plain.words([int(w) for w in keys[k, 0]], (i, 7, n, 9), rounds)
                assert got[n, k, i].tolist() == [int(w) for w in expected]


@pytest.mark.parametrize("rounds", ROUNDS)
def test_every_counter_and_key_word_that_should_matter_does(rounds):
    """A flipped low bit changes every output word, apart from chance (2⁻³² each)."""
    inputs = np.tile(np.arange(1, 13, dtype=np.uint32), (13, 1))
    for i in range(12):
        inputs[i + 1, i] ^= 1
    x = jnp.asarray(inputs)
    out = _numbers(prng.random_block(x[:, :8], [x[:, 8 + i] for i in range(4)], rounds=rounds))
    same = (out[1:] == out[:1]).all(axis=1)
    ignored = range(2, 8) if rounds == "threefry" else []
    assert same.tolist() == [i in ignored for i in range(12)]
    assert not (out[1:] == out[:1])[~same].any()


@pytest.mark.parametrize("rounds", ROUNDS)
@pytest.mark.parametrize("unroll", [True, False])
@pytest.mark.parametrize("backend", ["plain", "mosaic_tpu", "mosaic_gpu"])
def test_the_stream_inside_a_kernel(rounds, unroll, backend):
    rows, columns = (64, 8) if backend == "mosaic_gpu" else (16, 128)

    def kernel(key_ref, out_ref):
        key = [key_ref[i] for i in range(8)]
        row = jax.lax.broadcasted_iota(jnp.uint32, (rows, columns), 0)
        column = jax.lax.broadcasted_iota(jnp.uint32, (rows, columns), 1)
        counters = (column, row + jnp.uint32(40), jnp.uint32(3), jnp.uint32(5))
        block = prng.random_block(key, counters, rounds=rounds, unroll=unroll)
        for i, word in enumerate(block):
            out_ref[i] = word

    out = jax.ShapeDtypeStruct((16, rows, columns), jnp.uint32)
    key = jnp.asarray(KEY, jnp.uint32)
    if backend == "mosaic_gpu":
        run = plgpu.kernel(kernel, out_type=out, interpret=plgpu.InterpretGPUParams())
    elif backend == "mosaic_tpu":
        spec = pl.BlockSpec(memory_space=pltpu.SMEM)
        run = pl.pallas_call(kernel, out, in_specs=[spec], interpret=pltpu.InterpretParams())
    else:
        run = pl.pallas_call(kernel, out, interpret=True)
    counters = (
        jnp.arange(columns, dtype=jnp.uint32)[None, :],
        jnp.arange(40, 40 + rows, dtype=jnp.uint32)[:, None],
        jnp.uint32(3),
        jnp.uint32(5),
    )
    expected = prng.chacha_block(key, counters, rounds=rounds)
    # XLA's CPU compiler takes minutes to fuse the unrolled rounds of an interpreted kernel.
    compiled = jax.jit(run, compiler_options={"xla_disable_hlo_passes": "fusion"})
    assert (np.asarray(compiled(key)) == np.stack(expected)).all()


@pytest.mark.parametrize("rounds", ROUNDS)
@pytest.mark.parametrize("unroll", [True, False])
def test_nothing_but_additions_xors_and_shifts(rounds, unroll):
    """What every kernel language has; in particular no gather, no stack and no jit."""
    block = functools.partial(prng.random_block, rounds=rounds, unroll=unroll)
    counters = [jax.ShapeDtypeStruct((8, 8), jnp.uint32)] * 4
    scalars = [jax.ShapeDtypeStruct((), jnp.uint32)] * 8
    seen = set()

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            seen.add(equation.primitive.name)
            for value in equation.params.values():
                if isinstance(value, jax.extend.core.ClosedJaxpr):
                    walk(value.jaxpr)

    walk(jax.make_jaxpr(block)(scalars, counters).jaxpr)
    allowed = {"add", "xor", "or", "shift_left", "shift_right_logical", "broadcast_in_dim"}
    if not unroll:  # the loop, its index and (Threefry) its number of bits to turn
        allowed |= {"scan", "convert_element_type", "sub"}
    assert {"add", "xor", "or"} <= seen <= allowed


@pytest.mark.parametrize("rounds", [0, 7, 10, 21, -20, 8.0, True, None, "ThreeFry", "chacha"])
def test_other_rounds_raise(rounds):
    with pytest.raises(ValueError, match=r"rounds=.*: allowed are \(8, 12, 20, 'threefry'\)"):
        prng.random_block(_words(KEY), _words(RFC_COUNTERS), rounds=rounds)


def test_wrong_words_raise():
    counters = _words(RFC_COUNTERS)
    with pytest.raises(ValueError, match="7 key words and 4 counters: 8 and 4 are needed"):
        prng.random_block(_words(KEY[:7]), counters)
    with pytest.raises(ValueError, match="8 key words and 3 counters"):
        prng.random_block(_words(KEY), counters[:3])
    with pytest.raises(ValueError, match=r"key_words has shape \(4, 7\)"):
        prng.random_block(jnp.zeros((4, 7), jnp.uint32), counters)
    with pytest.raises(ValueError, match=r"key_words has shape \(\)"):
        prng.random_block(jnp.uint32(0), counters)
    with pytest.raises(ValueError, match="every array must be uint32"):
        prng.random_block(_words(KEY), [jnp.int32(0), *counters[1:]])


def test_normal_tiles_take_every_generator(plain):
    batch, rows = np.arange(2, dtype=np.uint32), np.arange(3, 6, dtype=np.uint32)
    make = jax.jit(prng.normal_tile, static_argnums=(3, 4), static_argnames="rounds")
    tiles = {}
    for rounds in ROUNDS:
        tile = make(jnp.asarray(KEY, jnp.uint32), batch, rows, 2, 130, rounds=rounds)
        expected = plain.tile(KEY, batch, rows, 2, 130, rounds)
        np.testing.assert_allclose(tile, expected, atol=2e-5)
        tiles[rounds] = np.asarray(tile)
    assert len({x.tobytes() for x in tiles.values()}) == len(ROUNDS)
