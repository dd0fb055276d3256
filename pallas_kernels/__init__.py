"""Kernels for private attention: arrays in, arrays out.

This package knows nothing of budgets, Flax or Optax; it imports JAX only. Noise comes
in as key words and public standard deviations, and leaves as part of the output. What
these numbers must be for a privacy guarantee is the business of :mod:`dpfa_jax`.

* :mod:`pallas_kernels.attention`: exact, record-level and sequence-level attention
  behind one function with several implementations.
* :mod:`pallas_kernels.grad_norm`: norms of per-example weight gradients, which are never
  formed.
* :mod:`pallas_kernels.weighted_sum`: sums of per-example gradients, each times its factor.
* :mod:`pallas_kernels.prng`: the ChaCha block function and Gaussians made from it.
"""
