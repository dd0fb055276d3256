"""Flax NNX layers with private attention."""

from dpfa_jax.nnx.attention import DPMultiHeadAttention

__all__ = ["DPMultiHeadAttention"]
