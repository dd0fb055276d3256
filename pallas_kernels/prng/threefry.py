"""Threefry-2x32 with 20 rounds. FOR REPRODUCIBLE TESTS ONLY: its key has 64 bits.

A key of 64 bits can be searched, and Threefry was not designed to hide anything. It is
here because it is short and well known, so that noise can be made again elsewhere.

Source: J. K. Salmon, M. A. Moraes, R. O. Dror and D. E. Shaw, "Parallel random numbers:
as easy as 1, 2, 3", SC 2011. Rotations and the parity constant are the paper's.
"""

from typing import Any

import jax
import numpy as np

# Rounds 0-3, 8-11, ... turn by the first row, rounds 4-7, 12-15, ... by the second.
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
# Keeps a key of zeros from giving an extended key of zeros; it is Skein's constant.
_PARITY = 0x1BD11BDA

Pair = tuple[jax.Array, jax.Array]


def _rotate_left(x: jax.Array, bits: jax.Array | np.uint32) -> jax.Array:
    return (x << bits) | (x >> (np.uint32(32) - bits))


def threefry(key: Pair, counter: Pair, *, unroll: bool = True) -> Pair:
    """The two output words for a key of two uint32 words and a counter of two.

    Plain additions, exclusive-ors and rotations; all four arrays have one shape.
    ``unroll=False`` loops over five groups of four rounds, which compiles faster.
    """

    def four_rounds(group: jax.Array | np.uint32, state: Any) -> Any:
        x, y, (k0, k1, k2), turns, next_turns = state
        for bits in turns:
            x = x + y
            y = _rotate_left(y, bits) ^ x
        return x + k1, y + (k2 + group), (k1, k2, k0), next_turns, turns

    extended = (*key, key[0] ^ key[1] ^ np.uint32(_PARITY))
    turns = tuple(tuple(np.uint32(bits) for bits in row) for row in _ROTATIONS)
    state: Any = (counter[0] + key[0], counter[1] + key[1], extended, *turns)
    if unroll:
        for group in range(1, 6):
            state = four_rounds(np.uint32(group), state)
    else:
        body = lambda group, state: four_rounds(group.astype(np.uint32), state)  # noqa: E731
        state = jax.lax.fori_loop(1, 6, body, state)
    return state[0], state[1]


def threefry_block(
    key: Pair, counters: tuple[jax.Array, ...], *, unroll: bool = True
) -> tuple[jax.Array, ...]:
    """Sixteen words for the four counters (first, row, head, batch) of a ChaCha block.

    (batch, head) makes a child key, and word pair i of the child is that of the counter
    (row, 8·first + i), i = 0 ... 7, so ``first`` must be below 2²⁹.
    """
    first, row, head, batch = counters
    child = threefry(key, (batch, head), unroll=unroll)
    words: list[jax.Array] = []
    for i in range(8):
        number = (first << np.uint32(3)) + np.uint32(i)
        words.extend(threefry(child, (row, number), unroll=unroll))
    return tuple(words)
