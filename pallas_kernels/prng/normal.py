"""Standard normals from ChaCha words, float32.

Box and Muller's transform turns uniform words into pairs of Gaussians. A pair lies on a
circle whose radius the words decide, so radii must be many: with 32 bits the circles
beyond 5.8 standard deviations are further apart than the grid that released values are
rounded to, and the circle tells the sum under the noise. So the radius has 40 bits (the
angle's 24 and 8 more share a word) in attention tiles, and 64 bits in gradient streams,
where many more pairs are released at a time (docs/privacy.md, section 5).

Two layouts. :func:`normal_stream` fills a flat vector, for gradients.
:func:`normal_tile` numbers attention rows: the block of row ``t`` and column ``c`` has
the counters (8·⌊c/128⌋ + c mod 8, t, head, batch), and its word ⌊(c mod 128)/8⌋ becomes
that column. Rows of at most 64 columns take four blocks: (c mod 4, t, head, batch), word
⌊c/4⌋. This is the order in which a Hopper matrix accumulator holds its columns,
so that a fused kernel can make its noise in place; any other kernel only has to
number its columns the same way.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, UInt32

from pallas_kernels.prng.chacha import Rounds, chacha_block

_LANES = 128
STREAM_TILE = 10 * _LANES
_TWO_PI_OVER_2_24 = 2.0 * 3.14159265358979323846 / 2.0**24


def box_muller(
    radius_word: UInt32[Array, "*s"],
    angle_word: UInt32[Array, "*s"],
    extra_word: UInt32[Array, "*s"] | None = None,
) -> tuple[Float32[Array, "*s"], Float32[Array, "*s"]]:
    """Two independent standard normals from independent uniform words.

    The angle is the high 24 bits of its word. The radius is √(−2 ln((w + f)/2³²)) with w
    its word and f in (0, 1) a fraction: ``extra_word``, or else the angle word's low 8
    bits. Small w are exact in float32, so f counts where the circles are far apart; for
    large w it is lost in the rounding, and not needed.

    Source: G. E. P. Box and M. E. Muller, Ann. Math. Statist. 29 (1958), 610-611.

    Example:
        >>> a, b = box_muller(jnp.uint32(0), jnp.uint32(0))
        >>> f"{a:.2f} {b:.2f}"
        '7.54 0.00'
    """
    if extra_word is None:
        low = (angle_word & jnp.uint32(0xFF)).astype(jnp.float32)
        fraction = (low + 0.5) * jnp.float32(2.0**-8)
    else:
        fraction = (extra_word.astype(jnp.float32) + 0.5) * jnp.float32(2.0**-32)
    uniform = (radius_word.astype(jnp.float32) + fraction) * jnp.float32(2.0**-32)
    radius = jnp.sqrt(-2.0 * jnp.log(uniform))
    angle = (angle_word >> jnp.uint32(8)).astype(jnp.float32) * jnp.float32(_TWO_PI_OVER_2_24)
    return radius * jnp.cos(angle), radius * jnp.sin(angle)


def normal_stream(
    key_words: UInt32[Array, "8"],
    size: int,
    nonce: tuple[int, int, int] = (0, 0, 0),
    first_tile: UInt32[Array, ""] | int = 0,
) -> Float32[Array, "size"]:
    """``size`` standard normals in a row, in tiles of 10 · 128.

    Tile t is made from the blocks 128t to 128t + 127: its element 128k + c is Gaussian k of
    block 128t + c. So neighbours in memory are made by neighbouring lanes of a kernel
    (:func:`block_normals` says which words become which Gaussian).

    Args:
        key_words: uint32[8], a key derived for this purpose alone.
        size: how many, at most 10·2³².
        nonce: three numbers below 2³² that name the stream.
        first_tile: where in the stream to begin.
    """
    tiles = -(-size // STREAM_TILE)
    # A single tile's first row may be all that is needed.
    lanes = min(size, _LANES) if tiles == 1 else _LANES
    blocks = jnp.arange(tiles * lanes, dtype=jnp.uint32)
    if not (isinstance(first_tile, int) and first_tile == 0):
        blocks = blocks + jnp.uint32(_LANES) * jnp.asarray(first_tile, jnp.uint32)
    first, second, third = (jnp.uint32(n) for n in nonce)
    gaussians = block_normals(chacha_block(key_words, (blocks, first, second, third)))
    rows = [g.reshape(tiles, lanes) for g in gaussians]
    return jnp.stack(rows, axis=1).reshape(-1)[:size]


def block_normals(words: Sequence[UInt32[Array, "*s"]]) -> list[Float32[Array, "*s"]]:
    """Ten standard normals from a block's sixteen words.

    Words 3p, 3p + 1 and 3p + 2 (radius, angle, extra radius bits) make the Gaussians 2p and
    2p + 1; word 15 is not used.
    """
    gaussians: list[jax.Array] = []
    for p in range(0, 15, 3):
        gaussians.extend(box_muller(words[p], words[p + 1], words[p + 2]))
    return gaussians


def normal_of_row(
    words: Sequence[UInt32[Array, "*s"]], row: UInt32[Array, "*s"]
) -> Float32[Array, "*s"]:
    """The Gaussian that belongs to a row, from the block that it shares with fifteen others.

    Rows 16i to 16i + 15 have one block, its first counter 0 and its second i; of row r it is
    the Gaussian of word r mod 16, as words become Gaussians in :func:`normal_tile`.

    Args:
        words: the sixteen words of the blocks.
        row: the row counters.

    Example:
        >>> words = [jnp.uint32(w) for w in range(16)]
        >>> odd = normal_of_row(words, jnp.uint32(23))
        >>> bool(odd == box_muller(jnp.uint32(6), jnp.uint32(7))[1])
        True
    """
    pair = (row & jnp.uint32(15)) >> jnp.uint32(1)
    chosen = [words[0], words[1]]
    for p in range(1, 8):
        is_it = pair == jnp.uint32(p)
        chosen = [jnp.where(is_it, words[2 * p + i], x) for i, x in enumerate(chosen)]
    even, odd = box_muller(*chosen)
    return jnp.where((row & jnp.uint32(1)) == jnp.uint32(1), odd, even)


def blocks_of_tile(columns: int) -> int:
    """Blocks that a tile of attention noise takes: of 128 columns, or of 64 where these do.

    Example:
        >>> blocks_of_tile(64), blocks_of_tile(96), blocks_of_tile(256)
        (4, 8, 8)
    """
    return 4 if columns <= 64 else 8


def head_counters(first_head: jax.Array | int, heads: int) -> UInt32[Array, "n"]:
    """The counters of ``heads`` heads from the first one's, which may be traced."""
    return jnp.asarray(first_head).astype(jnp.uint32) + jnp.arange(heads, dtype=jnp.uint32)


def normal_tile(
    key_words: UInt32[Array, "*kb 8"],
    batch: UInt32[Array, "b"],
    rows: UInt32[Array, "t"],
    heads: int,
    columns: int,
    *,
    rounds: Rounds = 20,
    first_head: jax.Array | int = 0,
) -> Float32[Array, "b t n c"]:
    """Standard normals for attention rows, in the layout of the module's docstring.

    Args:
        key_words: uint32[8], a key derived for this purpose alone.
        batch: the batch counter of each batch element.
        rows: the row counter of each row (a chunk may start anywhere).
        heads: number of query heads; counters ``first_head`` to first_head + heads - 1.
        columns: columns of a row.
        rounds: of ChaCha, 8, 12 or 20; ``"threefry"`` for reproducible tests only.
        first_head: counter of the first head, for a call on some of the heads.

    Returns:
        float32 of shape [batch, rows, heads, columns].
    """
    tiles, blocks = -(-columns // 128), blocks_of_tile(columns)
    # A tile that is not full uses the low words of its blocks only.
    used = 16 if tiles > 1 else -(-columns // (2 * blocks)) * 2
    counters = (
        jnp.arange(blocks * tiles, dtype=jnp.uint32)[None, None, None, :],
        rows[None, :, None, None],
        head_counters(first_head, heads)[None, None, :, None],
        batch[:, None, None, None],
    )
    block = chacha_block(key_words, counters, rounds=rounds)
    gaussians: list[jax.Array] = []
    for p in range(0, used, 2):
        gaussians.extend(box_muller(block[p], block[p + 1]))
    # [b, t, n, tiles·blocks] words → [b, t, n, tiles, word, block] → columns in order.
    tile = jnp.stack([g.reshape(*g.shape[:-1], tiles, blocks) for g in gaussians], axis=-2)
    return tile.reshape(*tile.shape[:3], -1)[..., :columns]
