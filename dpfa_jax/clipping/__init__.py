"""Clipped per-example gradients of any JAX loss."""

from dpfa_jax.clipping.api import ClippedGrad, clipped_grad
from dpfa_jax.clipping.explain import Explanation

__all__ = ["ClippedGrad", "Explanation", "clipped_grad"]
