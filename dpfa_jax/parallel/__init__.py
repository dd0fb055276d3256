"""One program on any number of devices."""

from dpfa_jax.parallel.attention import dp_sequence_parallel_attention

__all__ = ["dp_sequence_parallel_attention"]
