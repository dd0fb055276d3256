"""Clipped per-example gradients of any JAX loss."""

from dpfa_jax.clipping.api import ClippedGrad, clipped_grad

__all__ = ["ClippedGrad", "clipped_grad"]
