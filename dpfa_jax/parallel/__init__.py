"""Several devices and several processes: meshes, shardings, and what they must agree on."""

from dpfa_jax.parallel.attention import dp_sequence_parallel_attention

__all__ = ["dp_sequence_parallel_attention"]
