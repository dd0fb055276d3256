"""Optax transformations: private aggregation, noise, and Adam that knows the noise."""

from dpfa_jax.optim.adam import dp_adamw, scale_by_dp_adam
from dpfa_jax.optim.noise import (
    DPNoiseState,
    add_noise,
    dp_aggregate,
    noise_std,
    with_fresh_key,
    without_keys,
)
from dpfa_jax.optim.privatizer import privatizer_noise

__all__ = [
    "DPNoiseState",
    "add_noise",
    "dp_adamw",
    "dp_aggregate",
    "noise_std",
    "privatizer_noise",
    "scale_by_dp_adam",
    "with_fresh_key",
    "without_keys",
]
