"""The ChaCha block function (RFC 8439, section 2.3) on arrays of counters.

Only additions, exclusive-ors and rotations of uint32 are used: the set of operations
that lowers identically on every target, so that a stream is a function of its key and
counters and of nothing else. :func:`random_block` is these operations and nothing more,
for the inside of kernels; :func:`chacha_block` is the same, compiled.

A key is eight uint32 words (256 bits). It is never used to make noise directly: it
only derives child keys (:func:`derive_key`), one for each purpose, and the counters of
a child are then free to number rows, heads and blocks.
"""

import functools
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

from pallas_kernels.prng.threefry import threefry_block

# "expand 32-byte k", four little-endian words (RFC 8439, 2.3).
_CONSTANTS = (0x61707865, 0x3320646E, 0x79622D32, 0x6B206574)

Rounds = Literal[8, 12, 20, "threefry"]
ROUNDS: tuple[Rounds, ...] = (8, 12, 20, "threefry")

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
    return (x << np.uint32(bits)) | (x >> np.uint32(32 - bits))


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


def random_block(
    key_words: Sequence[jax.Array] | UInt32[Array, "*batch 8"],
    counters: Sequence[jax.Array],
    *,
    rounds: Rounds = 20,
    unroll: bool = True,
    peel: bool = False,
) -> State:
    """Sixteen random words for every counter, in operations that any kernel can do.

    For the inside of Pallas kernels (Triton, Mosaic GPU, Mosaic TPU and the
    interpreters) and for outside: additions, exclusive-ors and shifts of uint32, and a
    loop unless unrolled. Every back end computes the same words.

    Args:
        key_words: eight uint32 arrays or scalars, or one array whose last axis is 8.
        counters: four uint32 arrays or scalars that broadcast with each other and with
            the key: state words 12 to 15 of ChaCha (RFC 8439 calls the first one the
            block counter and the rest the nonce).
        rounds: of ChaCha, 8, 12 or 20. ``"threefry"``, FOR REPRODUCIBLE TESTS ONLY, is
            Threefry-2x32 with 20 rounds, whose 64-bit key is the first two key words;
            the first counter must then be below 2²⁹. Its words are
            :func:`pallas_kernels.prng.threefry.threefry_block`.
        unroll: whether the rounds are written one after the other. That is fastest in a
            kernel. It is about a thousand operations, though, which XLA's CPU compiler
            takes seconds (in an interpreted kernel minutes) to fuse: roll them there.
        peel: whether the first two of rolled rounds are written out. What only counters take
            part in that stay the same in a loop around, a compiler then takes out of it.

    Returns:
        Sixteen uint32 arrays of the broadcast shape, word 0 first.

    Raises:
        ValueError: for other ``rounds``, or other than eight key words and four counters.

    Example:
        The first word of RFC 8439's test vector (section 2.3.2):

        >>> key = [jnp.uint32(0x03020100 + i * 0x04040404) for i in range(8)]
        >>> words = [jnp.uint32(w) for w in (1, 0x09000000, 0x4a000000, 0)]
        >>> hex(int(random_block(key, words)[0]))
        '0xe4e7f110'
    """
    if not isinstance(rounds, int | str) or rounds not in ROUNDS:
        raise ValueError(f"rounds={rounds!r}: allowed are {ROUNDS}.")
    if isinstance(key_words, jax.Array | np.ndarray):
        last = key_words.ndim - 1
        if last < 0 or key_words.shape[last] != 8:
            raise ValueError(f"key_words has shape {key_words.shape}: a last axis of 8 is needed.")
        # Static slices: an index would be a gather, which kernels do not have.
        key_words = [jax.lax.index_in_dim(key_words, i, last, keepdims=False) for i in range(8)]
    if len(key_words) != 8 or len(counters) != 4:
        raise ValueError(
            f"{len(key_words)} key words and {len(counters)} counters: 8 and 4 are needed."
        )
    if any(x.dtype != jnp.uint32 for x in (*key_words, *counters)):
        raise ValueError("key_words and counters: every array must be uint32.")
    shape = jnp.broadcast_shapes(*(x.shape for x in (*key_words, *counters)))
    constants = [jnp.full(shape, c, jnp.uint32) for c in _CONSTANTS]
    initial = (*constants, *(jnp.broadcast_to(x, shape) for x in (*key_words, *counters)))
    if not unroll:
        initial = _varying_alike(initial)
    if rounds == "threefry":
        return threefry_block((initial[4], initial[5]), initial[12:], unroll=unroll)
    mixed = initial
    if unroll:
        for _ in range(rounds // 2):
            mixed = _double_round(mixed)
    else:
        if peel:
            mixed = _double_round(mixed)
        mixed = jax.lax.fori_loop(int(peel), rounds // 2, lambda _, x: _double_round(x), mixed)
    return tuple(a + b for a, b in zip(mixed, initial, strict=True))


@functools.partial(jax.jit, static_argnames="rounds")
def chacha_block(
    key_words: UInt32[Array, "*batch 8"],
    counters: tuple[jax.Array, jax.Array, jax.Array, jax.Array],
    *,
    rounds: Rounds = 20,
) -> State:
    """:func:`random_block` with rolled rounds, compiled: for everything but kernels.

    Args:
        key_words: uint32, last axis 8; the leading axes broadcast with the counters.
        counters: four uint32 arrays that broadcast together.
        rounds: as in :func:`random_block`; ``"threefry"`` is for reproducible tests only.

    Returns:
        Sixteen uint32 arrays of the broadcast shape, word 0 first.

    Raises:
        ValueError: for another number of rounds.

    Example:
        >>> zero = jnp.uint32(0)
        >>> hex(int(chacha_block(jnp.zeros(8, jnp.uint32), (zero,) * 4)[0]))
        '0xade0b876'
    """
    return random_block(key_words, counters, rounds=rounds, unroll=False)


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
