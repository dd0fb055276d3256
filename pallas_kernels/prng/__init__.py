"""Counter-based cryptographic noise in plain uint32 and float32 arithmetic."""

from pallas_kernels.prng.chacha import chacha_block, derive_key, stream_words
from pallas_kernels.prng.normal import box_muller, normal_stream, normal_tile

__all__ = [
    "box_muller",
    "chacha_block",
    "derive_key",
    "normal_stream",
    "normal_tile",
    "stream_words",
]
