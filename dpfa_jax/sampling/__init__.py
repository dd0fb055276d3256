"""Poisson sampling of examples or users, padded to a static batch."""

from dpfa_jax.sampling.poisson import PoissonBatch, PoissonSampler, padded_batch_size
from dpfa_jax.sampling.shares import deal, share
from dpfa_jax.sampling.user import UserBatch, UserSampler

__all__ = [
    "PoissonBatch",
    "PoissonSampler",
    "UserBatch",
    "UserSampler",
    "deal",
    "padded_batch_size",
    "share",
]
