"""Clipped per-example gradients of any JAX loss."""

from dpfa_jax.clipping.adaptive import Adapted, AdaptiveClippedGrad, adaptive_clipped_grad
from dpfa_jax.clipping.api import ClippedGrad, clipped_grad
from dpfa_jax.clipping.explain import Explanation

__all__ = [
    "Adapted",
    "AdaptiveClippedGrad",
    "ClippedGrad",
    "Explanation",
    "adaptive_clipped_grad",
    "clipped_grad",
]
