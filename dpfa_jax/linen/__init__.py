"""Flax Linen layers with private attention."""

from dpfa_jax.linen.attention import DPMultiHeadDotProductAttention

__all__ = ["DPMultiHeadDotProductAttention"]
