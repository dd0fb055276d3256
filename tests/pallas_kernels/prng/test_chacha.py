"""ChaCha: the RFC's vectors, and an independent implementation for the rest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import prng

COUNTING = bytes(range(32))
ZERO = bytes(32)

# (key, block counter, nonce, key stream): RFC 8439, section 2.3.2 and appendix A.1.
VECTORS = {
    "2.3.2": (
        COUNTING,
        1,
        "000000090000004a00000000",
        "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
        "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e",
    ),
    "A.1 #1": (
        ZERO,
        0,
        "000000000000000000000000",
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586",
    ),
    "A.1 #2": (
        ZERO,
        1,
        "000000000000000000000000",
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f",
    ),
    "A.1 #3": (
        ZERO[:31] + b"\x01",
        1,
        "000000000000000000000000",
        "3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a"
        "8eca00bbb4a73bdad192b5c42f73f2fd4e273644c8b36125a64addeb006c13a0",
    ),
    "A.1 #4": (
        b"\x00\xff" + ZERO[:30],
        2,
        "000000000000000000000000",
        "72d54dfbf12ec44b362692df94137f328fea8da73990265ec1bbbea1ae9af0ca"
        "13b25aa26cb4a648cb9b9d1be65b2c0924a66c54d545ec1b7374f4872e99f096",
    ),
    "A.1 #5": (
        ZERO,
        0,
        "000000000000000000000002",
        "c2c64d378cd536374ae204b9ef933fcd1a8b2288b3dfa49672ab765b54ee27c7"
        "8a970e0e955c14f3a88e741b97c286f75f8fc299e8148362fa198a39531bed6d",
    ),
}
# The first 16 bytes for a key, counter and nonce of zeros.
SHORT_ROUNDS = {8: "3e00ef2f895f40d67f5bb8e81f09a5a1", 12: "9bf49a6a0755f953811fce125f2683d5"}


def _block(key, counter, nonce, rounds=20):
    """The library's block as bytes."""
    key_words = jnp.asarray(np.frombuffer(key, "<u4").astype(np.uint32))
    counters = [np.uint32(counter), *np.frombuffer(nonce, "<u4").astype(np.uint32)]
    out = prng.chacha_block(key_words, tuple(jnp.asarray(c) for c in counters), rounds=rounds)
    return np.asarray(jnp.stack(out)).astype("<u4").tobytes()


@pytest.mark.parametrize("name", VECTORS)
def test_rfc_8439_vectors(plain, name):
    key, counter, nonce, stream = VECTORS[name]
    nonce = bytes.fromhex(nonce)
    assert plain.block(key, counter, nonce).hex() == stream
    assert _block(key, counter, nonce).hex() == stream


@pytest.mark.parametrize("rounds", [8, 12, 20])
def test_random_blocks_equal_the_plain_implementation(plain, rounds):
    random = np.random.default_rng(rounds)
    for _ in range(3):
        key, nonce = random.bytes(32), random.bytes(12)
        counter = int(random.integers(2**32))
        assert _block(key, counter, nonce, rounds) == plain.block(key, counter, nonce, rounds)
    if rounds in SHORT_ROUNDS:
        assert _block(ZERO, 0, bytes(12), rounds)[:16].hex() == SHORT_ROUNDS[rounds]


def test_counters_broadcast_with_each_other_and_with_keys(plain):
    key_words = jnp.arange(16, dtype=jnp.uint32).reshape(2, 1, 8)
    first = jnp.asarray([0, 7, 2**32 - 1], jnp.uint32)
    zero = jnp.uint32(0)
    out = np.asarray(jnp.stack(prng.chacha_block(key_words, (first, zero, zero, zero)), axis=-1))
    assert out.shape == (2, 3, 16)
    for k in range(2):
        for i, counter in enumerate((0, 7, 2**32 - 1)):
            expected = plain.words([int(w) for w in key_words[k, 0]], (counter, 0, 0, 0))
            assert out[k, i].tolist() == expected


@pytest.mark.parametrize("rounds", [0, 7, 10, 21, -20])
def test_other_numbers_of_rounds_raise(rounds):
    zero = jnp.uint32(0)
    with pytest.raises(
        ValueError, match=rf"rounds={rounds}: allowed are \(8, 12, 20, 'threefry'\)"
    ):
        prng.chacha_block(jnp.zeros(8, jnp.uint32), (zero,) * 4, rounds=rounds)


def test_a_child_is_the_block_its_purpose_and_index_name(plain):
    parent = jnp.arange(100, 108, dtype=jnp.uint32)
    numbers = [int(w) for w in parent]
    for purpose, index in ((1, 0), (16, 0), (16, 9), (2**32 - 1, 2**32 - 1)):
        got = prng.derive_key(parent, purpose, jnp.uint32(index))
        assert np.asarray(got).tolist() == plain.child(numbers, purpose, index)


def test_children_are_distinct_and_differ_from_their_parent():
    parent = jnp.arange(8, dtype=jnp.uint32)
    index = jnp.arange(64, dtype=jnp.uint32)
    children = [np.asarray(parent)[None]]
    children += [np.asarray(prng.derive_key(parent, p, index)) for p in (1, 2, 3, 16, 17, 18)]
    rows = np.concatenate(children)
    assert len(np.unique(rows, axis=0)) == 1 + 6 * 64
    # Not one word in common at the same place more often than chance allows (2^-32 each).
    assert max(np.unique(column, return_counts=True)[1].max() for column in rows.T) <= 2


def test_stream_words_are_the_blocks_in_order(plain):
    key = jnp.arange(8, dtype=jnp.uint32)
    nonce = (5, 2**32 - 1, 7)
    stream = np.asarray(prng.stream_words(key, 3, nonce))
    for i in range(3):
        assert stream[i].tolist() == plain.words(list(range(8)), (i, *nonce))


def test_every_bit_of_key_and_counter_matters():
    """Flipping any input bit flips about half of the 512 output bits."""
    flips = 8 * 32 + 4 * 32
    inputs = np.tile(np.arange(1, 13, dtype=np.uint32), (flips + 1, 1))
    for bit in range(flips):
        inputs[bit + 1, bit // 32] ^= np.uint32(1) << np.uint32(bit % 32)
    x = jnp.asarray(inputs)
    out = prng.chacha_block(x[:, :8], tuple(x[:, 8 + i] for i in range(4)), rounds=8)
    out = np.asarray(jnp.stack(out, axis=-1))
    changed = np.bitwise_count(out[1:] ^ out[:1]).sum(axis=1)
    # Binomial(512, 1/2): 5.5 standard deviations of 11.3 on either side.
    assert changed.min() > 256 - 62
    assert changed.max() < 256 + 62


def test_jit_and_vmap_do_not_change_a_word():
    keys = jnp.arange(24, dtype=jnp.uint32).reshape(3, 8)
    batched = jax.jit(jax.vmap(lambda k: prng.stream_words(k, 2)))(keys)
    for i in range(3):
        assert bool((batched[i] == prng.stream_words(keys[i], 2)).all())
