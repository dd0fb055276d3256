"""Counter-based cryptographic noise in plain uint32 and float32 arithmetic."""

from pallas_kernels.prng.chacha import (
    ROUNDS,
    Rounds,
    chacha_block,
    derive_key,
    random_block,
    stream_words,
)
from pallas_kernels.prng.normal import (
    blocks_of_tile,
    box_muller,
    head_counters,
    normal_of_row,
    normal_stream,
    normal_tile,
)
from pallas_kernels.prng.sharded import axes_by_dimension, local_normals, normals_like
from pallas_kernels.prng.streams import derive_path, normal_streams

__all__ = [
    "ROUNDS",
    "Rounds",
    "axes_by_dimension",
    "blocks_of_tile",
    "box_muller",
    "chacha_block",
    "derive_key",
    "derive_path",
    "head_counters",
    "local_normals",
    "normal_of_row",
    "normal_stream",
    "normal_streams",
    "normal_tile",
    "normals_like",
    "random_block",
    "stream_words",
]
