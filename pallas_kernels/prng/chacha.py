"""The ChaCha block function (RFC 8439, section 2.3) on arrays of counters.

Only additions, exclusive-ors and rotations of uint32 are used: the set of operations
that lowers identically on every target, so that a stream is a function of its key and
counters and of nothing else.

A key is eight uint32 words (256 bits). It is never used to make noise directly: it
only derives child keys (:func:`derive_key`), one for each purpose, and the counters of
a child are then free to number rows, heads and blocks.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32

# "expand 32-byte k", four little-endian words (RFC 8439, 2.3).
_CONSTANTS = (0x61707865, 0x3320646E, 0x79622D32, 0x6B206574)

_ROUNDS = (8, 12, 20)

_QUARTERS = (
    (0, 4, 8, 12),
    (1, 5, 9, 13),
    (2, 6, 10, 14),
    (3, 7, 11, 15),
    (0, 5, 10, 15),
    (1, 6, 11, 12),
    (2, 7, 8, 13),
    (3, 4, 9, 14),
)

State = tuple[jax.Array, ...]


def _rotate_left(x: jax.Array, bits: int) -> jax.Array:
    return (x << jnp.uint32(bits)) | (x >> jnp.uint32(32 - bits))


def _double_round(state: State) -> State:
    x = list(state)
    for a, b, c, d in _QUARTERS:
        x[a] = x[a] + x[b]
        x[d] = _rotate_left(x[d] ^ x[a], 16)
        x[c] = x[c] + x[d]
        x[b] = _rotate_left(x[b] ^ x[c], 12)
        x[a] = x[a] + x[b]
        x[d] = _rotate_left(x[d] ^ x[a], 8)
        x[c] = x[c] + x[d]
        x[b] = _rotate_left(x[b] ^ x[c], 7)
    return tuple(x)


def _varying_alike(state: State) -> State:
    """``state`` with all words varying along the mesh axes along which one of them does.

    Inside ``shard_map`` a loop's carry must keep its type, and every word of the state
    soon depends on every other.
    """
    varying = [jax.typeof(x).manual_axis_type.varying for x in state]
    axes = frozenset().union(*varying)
    return tuple(
        jax.lax.pcast(x, tuple(sorted(axes - own)), to="varying") if axes - own else x
        for x, own in zip(state, varying, strict=True)
    )


@functools.partial(jax.jit, static_argnames="rounds")
def chacha_block(
    key_words: UInt32[Array, "*batch 8"],
    counters: tuple[jax.Array, jax.Array, jax.Array, jax.Array],
    *,
    rounds: int = 20,
) -> State:
    """The sixteen output words of ChaCha for every counter.

    Args:
        key_words: uint32, last axis 8; the leading axes broadcast with the counters.
        counters: four uint32 arrays that broadcast together: state words 12 to 15
            (RFC 8439 calls the first one the block counter and the rest the nonce).
        rounds: 8, 12 or 20.

    Returns:
        Sixteen uint32 arrays of the broadcast shape, word 0 first.

    Raises:
        ValueError: for another number of rounds.

    Example:
        The first word of RFC 8439's test vector (section 2.3.2):

        >>> key = jnp.array([0x03020100, 0x07060504, 0x0b0a0908, 0x0f0e0d0c,
        ...                  0x13121110, 0x17161514, 0x1b1a1918, 0x1f1e1d1c], jnp.uint32)
        >>> words = [jnp.uint32(w) for w in (1, 0x09000000, 0x4a000000, 0)]
        >>> hex(int(chacha_block(key, tuple(words))[0]))
        '0xe4e7f110'
    """
    if rounds not in _ROUNDS:
        raise ValueError(f"rounds={rounds!r}: allowed are {_ROUNDS}.")
    shape = jnp.broadcast_shapes(key_words.shape[:-1], *(c.shape for c in counters))
    head = [jnp.full(shape, c, jnp.uint32) for c in _CONSTANTS]
    body = [jnp.broadcast_to(key_words[..., i], shape) for i in range(8)]
    tail = [jnp.broadcast_to(c.astype(jnp.uint32), shape) for c in counters]
    initial = _varying_alike((*head, *body, *tail))
    # A rolled loop: unrolled, the twenty rounds are about a thousand operations, which
    # XLA's CPU compiler takes seconds to fuse.
    mixed = jax.lax.fori_loop(0, rounds // 2, lambda _, x: _double_round(x), initial)
    return tuple(a + b for a, b in zip(mixed, initial, strict=True))


def derive_key(
    key_words: UInt32[Array, "*batch 8"], purpose: int, index: jax.Array | int = 0
) -> UInt32[Array, "*batch 8"]:
    """A child key: the first eight words of one block of the parent.

    A parent is used for nothing else, and every (purpose, index) names another block,
    so children are independent of each other and none reveals its parent, as far as
    ChaCha20 is a pseudo-random function.

    Args:
        key_words: the parent's eight uint32 words.
        purpose: a constant that says what the child is for.
        index: uint32, which child of that purpose.

    Returns:
        The child's eight uint32 words.
    """
    zero = jnp.uint32(0)
    counters = (jnp.asarray(index).astype(jnp.uint32), zero, zero, jnp.uint32(purpose))
    return jnp.stack(chacha_block(key_words, counters)[:8], axis=-1)


def stream_words(
    key_words: UInt32[Array, "8"], blocks: int, nonce: tuple[int, int, int] = (0, 0, 0)
) -> UInt32[Array, "blocks 16"]:
    """The first ``blocks`` blocks of a key's stream, one a row."""
    counter = jnp.arange(blocks, dtype=jnp.uint32)
    first, second, third = (jnp.uint32(n) for n in nonce)
    words = chacha_block(key_words, (counter, first, second, third))
    return jnp.stack(words, axis=-1)
