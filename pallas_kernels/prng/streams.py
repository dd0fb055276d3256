"""Many streams of Gaussians from one key, made together: the noise of a gradient's leaves.

A Triton kernel on NVIDIA GPUs makes all of them in one launch, in registers, and writes
each number once. Elsewhere each is :func:`~pallas_kernels.prng.normal_stream`. Both are
the same numbers but for the last digits of their cosines and logarithms.
"""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float32, UInt32

from pallas_kernels.devices import wrong_device
from pallas_kernels.manual import result, without_types
from pallas_kernels.prng.chacha import derive_key, random_block
from pallas_kernels.prng.normal import STREAM_TILE, block_normals, normal_stream

Implementation = Literal["triton", "xla"]
Nonce = tuple[int, int, int]
_IMPLEMENTATIONS = ("triton", "xla")
# Blocks of a program, and the numbers that they make: four tiles of a stream.
_BLOCKS = 512
_BLOCKS_OF_TILE = 128
_CHUNK = _BLOCKS // _BLOCKS_OF_TILE * STREAM_TILE
_WARPS = 4
# Chunks of a launch: places are counted in 31 bits.
_MOST_CHUNKS = (2**31 - 1) // _CHUNK


def normal_streams(
    key_words: UInt32[Array, "8"],
    streams: Sequence[tuple[int, Nonce]],
    *,
    first_tiles: Sequence[UInt32[Array, ""] | int] | None = None,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> list[Float32[Array, "size"]]:
    """Of each stream, numbers in a row: ``normal_stream(key_words, size, nonce, first_tile)``.

    Args:
        key_words: uint32[8], a key derived for this purpose alone.
        streams: of each, how many numbers, and three numbers below 2³² that name it.
        first_tiles: of each, the tile of 1280 numbers to begin with; None is the first. It may
            be traced: each device makes its own part of a stream.
        implementation: ``'triton'``, ``'xla'`` or None, which takes the kernel on NVIDIA
            GPUs that can run it.
        interpret: run the kernel in Pallas's interpreter, on any device. Slow; for tests.

    Returns:
        float32 [size] of each.

    Raises:
        ValueError: for two streams of one name, a name of an implementation that there is
            not, or a kernel that cannot run here.

    Example:
        >>> key = jnp.arange(8, dtype=jnp.uint32)
        >>> a, b = normal_streams(key, [(3, (0, 0, 1)), (2, (0, 0, 2))])
        >>> a.shape, b.shape
        ((3,), (2,))
    """
    if len({nonce for _, nonce in streams}) != len(streams):
        raise ValueError(f"streams={streams!r}: two have one name, and would be the same numbers.")
    begin_at = [0] * len(streams) if first_tiles is None else list(first_tiles)
    if not _takes_kernel(implementation, interpret):
        return [
            normal_stream(key_words, size, nonce, tile)
            for (size, nonce), tile in zip(streams, begin_at, strict=True)
        ]
    pieces: list[list[jax.Array]] = [[] for _ in streams]
    for launch in _launches(streams):
        flat = _launch(key_words, launch, [nonce for _, nonce in streams], begin_at, interpret)
        begin = 0
        for stream, _, chunks in launch:
            pieces[stream].append(flat[begin : begin + chunks * _CHUNK])
            begin += chunks * _CHUNK
    whole = [p[0] if len(p) == 1 else jnp.concatenate([jnp.zeros(0), *p]) for p in pieces]
    return [x[:size] for x, (size, _) in zip(whole, streams, strict=True)]


def derive_path(
    key_words: UInt32[Array, "8"],
    path: Sequence[tuple[int, Any]],
    *,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> UInt32[Array, "8"]:
    """A child's child: :func:`~pallas_kernels.prng.derive_key` for each step of the path.

    On NVIDIA GPUs one kernel does all steps; XLA would make a loop of small ones of each.

    Args:
        key_words: the parent's eight words.
        path: of each step, the purpose and the index (uint32).
        implementation: as for :func:`normal_streams`.
        interpret: likewise.

    Raises:
        ValueError: as :func:`normal_streams`.

    Example:
        >>> key = jnp.arange(8, dtype=jnp.uint32)
        >>> derive_path(key, [(1, 7), (18, 0)]).shape
        (8,)
    """
    if not _takes_kernel(implementation, interpret):
        for purpose, index in path:
            key_words = derive_key(key_words, purpose, index)
        return key_words
    indices = jnp.stack([jnp.asarray(index).astype(jnp.uint32) for _, index in path])

    def kernel(key_ref: Any, indices_ref: Any, out_ref: Any) -> None:
        words = [key_ref[i] for i in range(8)]
        zero = jnp.uint32(0)
        for n, (purpose, _) in enumerate(path):
            counters = [indices_ref[n], zero, zero, jnp.uint32(purpose)]
            words = list(random_block(words, counters, unroll=False)[:8])
        for i, word in enumerate(words):
            out_ref[i] = word

    call = pl.pallas_call(
        kernel,
        out_shape=result((8,), jnp.uint32),
        grid=(1,),
        in_specs=[pl.BlockSpec((n,), lambda i: (0,)) for n in (8, len(path))],
        out_specs=pl.BlockSpec((8,), lambda i: (0,)),
        compiler_params=plgpu.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name="derive_path",
    )
    return without_types(call)(key_words, indices)


def _takes_kernel(implementation: str | None, interpret: bool) -> bool:
    if implementation is not None and implementation not in _IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}: allowed are {_IMPLEMENTATIONS}.")
    reason = None if interpret else wrong_device("triton")
    if implementation == "triton" and reason is not None:
        raise ValueError(f"implementation='triton' cannot do this call: {reason}.")
    return implementation != "xla" and (implementation == "triton" or reason is None)


def _launches(streams: Sequence[tuple[int, Nonce]]) -> list[list[tuple[int, int, int]]]:
    """For each launch: number of a stream, its first chunk there, how many chunks."""
    launches: list[list[tuple[int, int, int]]] = [[]]
    room = _MOST_CHUNKS
    for number, (size, _) in enumerate(streams):
        first, left = 0, pl.cdiv(size, _CHUNK)
        while left:
            part = min(left, room)
            launches[-1].append((number, first, part))
            first, left, room = first + part, left - part, room - part
            if not room:
                launches.append([])
                room = _MOST_CHUNKS
    return [launch for launch in launches if launch]


def _launch(
    key_words: jax.Array,
    launch: Sequence[tuple[int, int, int]],
    nonces: Sequence[Nonce],
    first_tiles: Sequence[Any],
    interpret: bool,
) -> jax.Array:
    """All chunks of a launch, one after the other."""
    starts = np.cumsum([0, *(chunks for *_, chunks in launch)])
    chunk = jnp.arange(int(starts[-1]), dtype=jnp.int32)
    # Which stream a chunk belongs to, and which blocks of it.
    ends = jnp.asarray(starts[1:], jnp.int32)
    rows = jnp.searchsorted(ends, chunk, side="right", method="compare_all")
    offset = jnp.asarray([first for _, first, _ in launch] - starts[:-1], jnp.int32)
    block = ((chunk + offset[rows]) * _BLOCKS).astype(jnp.uint32)
    if not all(isinstance(tile, int) and tile == 0 for tile in first_tiles):
        tiles = [jnp.asarray(first_tiles[n], jnp.uint32) for n, *_ in launch]
        block = block + jnp.uint32(_BLOCKS_OF_TILE) * jnp.stack(tiles)[rows]
    names = jnp.asarray(np.array([nonces[n] for n, *_ in launch], np.uint32))
    table = jnp.concatenate([block[:, None], names[rows]], axis=1)
    call = pl.pallas_call(
        _kernel,
        out_shape=result((chunk.size * _CHUNK,), jnp.float32),
        grid=(chunk.size,),
        in_specs=[pl.BlockSpec((8,), lambda i: (0,)), pl.BlockSpec((None, 4), lambda i: (i, 0))],
        out_specs=pl.BlockSpec((_CHUNK,), lambda i: (i,)),
        compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=1),
        interpret=interpret,
        name="normal_streams",
    )
    return without_types(call)(key_words, table)


def _kernel(key_ref: Any, counters_ref: Any, out_ref: Any) -> None:
    key = [key_ref[i] for i in range(8)]
    first, *nonce = (counters_ref[i] for i in range(4))
    lane = jnp.arange(_BLOCKS, dtype=jnp.int32)
    # The rounds as a loop: written out, they are thousands of instructions, which take
    # seconds to compile and run no faster.
    words = random_block(key, [first + lane.astype(jnp.uint32), *nonce], unroll=False)
    start = jax.lax.shift_right_logical(lane, 7) * STREAM_TILE + (lane & 127)
    for k, g in enumerate(block_normals(words)):
        plgpu.store(out_ref.at[start + 128 * k], g)
