"""ChaCha, Threefry and Box-Muller once more, in float64: the oracle of the noise.

Written for plain Python integers; NumPy uint64 arrays go through the same lines.
"""

import struct

import numpy as np

LOW = 0xFFFFFFFF


def _rotate(x, bits):
    return ((x << bits) & LOW) | (x >> (32 - bits))


def _quarter_round(a, b, c, d):
    a = (a + b) & LOW
    d = _rotate(d ^ a, 16)
    c = (c + d) & LOW
    b = _rotate(b ^ c, 12)
    a = (a + b) & LOW
    d = _rotate(d ^ a, 8)
    c = (c + d) & LOW
    b = _rotate(b ^ c, 7)
    return a, b, c, d


def words(key, counters, rounds=20):
    """The sixteen words of one block: ``key`` eight numbers, ``counters`` four."""
    if rounds == "threefry":
        first, row, head, batch = counters
        child_key = threefry(key[:2], (batch, head))
        pairs = [threefry(child_key, (row, (8 * first + i) & LOW)) for i in range(8)]
        return [word for pair in pairs for word in pair]
    start = [*struct.unpack("<4I", b"expand 32-byte k"), *key, *counters]
    x = list(start)
    for turn in range(rounds):
        # Even rounds mix the columns of the 4x4 state, odd ones its diagonals.
        for i in range(4):
            slant = turn % 2
            at = [i, 4 + (i + slant) % 4, 8 + (i + 2 * slant) % 4, 12 + (i + 3 * slant) % 4]
            x[at[0]], x[at[1]], x[at[2]], x[at[3]] = _quarter_round(*(x[j] for j in at))
    return [(a + b) & LOW for a, b in zip(x, start, strict=True)]


def threefry(key, counter):
    """Threefry-2x32-20, from the paper: round d turns by R[d mod 8], a key after each 4th."""
    turns = (13, 15, 26, 6, 17, 29, 16, 24)
    extended = (key[0], key[1], key[0] ^ key[1] ^ 0x1BD11BDA)
    x, y = (counter[0] + key[0]) & LOW, (counter[1] + key[1]) & LOW
    for d in range(20):
        x = (x + y) & LOW
        y = _rotate(y, turns[d % 8]) ^ x
        if d % 4 == 3:
            s = d // 4 + 1
            x = (x + extended[s % 3]) & LOW
            y = (y + extended[(s + 1) % 3] + s) & LOW
    return x, y


def block(key, counter, nonce, rounds=20):
    """The block of RFC 8439: 32 bytes of key, a number, 12 bytes of nonce; 64 bytes out."""
    out = words(struct.unpack("<8I", key), (counter, *struct.unpack("<3I", nonce)), rounds)
    return struct.pack("<16I", *out)


def child(key, purpose, index=0):
    """The eight words of a derived key."""
    return words(key, (index, 0, 0, purpose))[:8]


def box_muller(radius_word, angle_word, extra_word=None):
    """Two float64 normals; the words are uint64 arrays that hold 32 bits.

    The high 24 bits of the angle word are the angle. The radius has 32 bits and a fraction:
    the extra word, or the angle word's low 8 bits.
    """
    if extra_word is None:
        fraction = (angle_word % 256 + 0.5) / 256
    else:
        fraction = (extra_word + 0.5) / 2.0**32
    radius = np.sqrt(-2.0 * np.log((radius_word + fraction) / 2.0**32))
    angle = 2.0 * np.pi * (angle_word // 256) / 2.0**24
    return radius * np.cos(angle), radius * np.sin(angle)


def stream(key, size, nonce):
    """``size`` normals, an element at a time: tiles of ten rows of 128, a block a column."""
    out = []
    for i in range(size):
        tile, place = divmod(i, 1280)
        gaussian, column = divmod(place, 128)
        p = gaussian // 2
        block_words = np.array(words(key, (128 * tile + column, *nonce)), np.uint64)
        out.append(box_muller(*block_words[3 * p : 3 * p + 3])[gaussian % 2])
    return np.array(out)


def tile(key, batch, rows, heads, columns, rounds=20):
    """[batch, rows, heads, columns] normals, gathered column by column from the docstring."""
    c = np.arange(columns)
    if columns <= 64:
        block, word = c % 4, c // 4
    else:
        block, word = 8 * (c // 128) + c % 8, (c % 128) // 8
    counters = np.broadcast_arrays(
        block.astype(np.uint64)[None, None, None, :],
        np.asarray(rows, np.uint64)[None, :, None, None],
        np.arange(heads, dtype=np.uint64)[None, None, :, None],
        np.asarray(batch, np.uint64)[:, None, None, None],
    )
    block_words = np.stack(words(key, counters, rounds), axis=-1)
    which = np.broadcast_to(word, counters[0].shape)[..., None]
    pair = which - which % 2
    first, second = box_muller(
        np.take_along_axis(block_words, pair, -1)[..., 0],
        np.take_along_axis(block_words, pair + 1, -1)[..., 0],
    )
    return np.where(which[..., 0] % 2 == 0, first, second)


def attention_noise(key, batch, num_rows, heads, depth, rounds=20):
    """What a call of the attention kernels draws: g [B, T, N, H] and g' [B, T, N]."""
    key = [int(w) for w in key]
    rows = range(num_rows)
    g = tile(child(key, 16), range(batch), rows, heads, depth, rounds)
    return g, row_sums(child(key, 17), range(batch), rows, heads, rounds)


def row_sums(key, batch, rows, heads, rounds=20):
    """[batch, rows, heads] normals, a row at a time: sixteen rows share a block."""
    out = np.zeros((len(batch), len(rows), heads))
    for b, t, n in np.ndindex(out.shape):
        counters = (np.uint64(x) for x in (0, rows[t] // 16, n, batch[b]))
        of_block = np.array(words(key, tuple(counters), rounds), np.uint64)
        pair = (rows[t] % 16) // 2
        out[b, t, n] = box_muller(*of_block[2 * pair : 2 * pair + 2])[rows[t] % 2]
    return out
