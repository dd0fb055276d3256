"""Poisson sampling: every record joins every batch independently, with probability q.

The amplification that the accountant counts on needs exactly this. A shuffled epoch is
not Poisson sampling, and neither is a batch of fixed size.
"""

import math
import numbers
from typing import NamedTuple

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from jaxtyping import Array, Bool, Int32, Key

from dpfa_jax import keys


class PoissonBatch(NamedTuple):
    """Rows of one batch, padded to a static size.

    Attributes:
        indices: int32[batch_size], which records; 0 where padded.
        is_padding_example: bool[batch_size], True where padded.
    """

    indices: Int32[np.ndarray, "b"]
    is_padding_example: Bool[np.ndarray, "b"]


def _is_whole(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= 1


def _check_population(population: int, sampling_probability: float) -> None:
    if not _is_whole(population):
        raise ValueError(f"population={population!r}: allowed is a whole number >= 1.")
    q = sampling_probability
    if not (isinstance(q, numbers.Real) and 0 < q <= 1):
        raise ValueError(f"sampling_probability={q!r}: allowed is 0 < q <= 1.")


def padded_batch_size(population: int, sampling_probability: float, multiple_of: int = 1) -> int:
    """A static batch size that a Poisson batch exceeds with probability below 10⁻⁶.

    Raises:
        ValueError: for a number that is not allowed.

    Example:
        >>> padded_batch_size(1000, 0.1, multiple_of=16)
        160
    """
    _check_population(population, sampling_probability)
    if not isinstance(multiple_of, numbers.Integral) or multiple_of < 1:
        raise ValueError(f"multiple_of={multiple_of!r}: allowed is a whole number >= 1.")
    size = int(scipy.stats.binom.isf(1e-6, population, sampling_probability)) + 1
    size = min(max(size, 1), population)
    return -(-size // multiple_of) * multiple_of


def sampling_event(
    population: int, sampling_probability: float, batch_size: int, noise_multiplier: float
) -> dp_accounting.DpEvent:
    """What :meth:`PoissonSampler.event` says, without a sampler and its key."""
    if batch_size >= population:
        return dp_accounting.PoissonSampledDpEvent(
            sampling_probability, dp_accounting.GaussianDpEvent(noise_multiplier)
        )
    return dp_accounting.TruncatedSubsampledGaussianDpEvent(
        # The larger of two neighbours may have one record more than this population.
        dataset_size=population + 1,
        sampling_probability=sampling_probability,
        truncated_batch_size=batch_size,
        noise_multiplier=noise_multiplier,
    )


@jax.jit
def _words(key: Key[Array, ""], index: Array, like: Array) -> tuple[Array, Array]:
    key = jax.random.fold_in(key, index)
    join, order = jax.random.split(key)
    return jax.random.bits(join, like.shape), jax.random.bits(order, like.shape)


class PoissonSampler:
    """Draws batches of record numbers by Poisson sampling.

    Guarantee. Batch ``i`` is a function of the key and ``i``. Each record is in it
    independently with probability ⌊q·2³²⌋/2³² <= q. If more than ``batch_size`` records
    join, a uniformly random subset of that size stays; :meth:`event` accounts for it
    (A. Ganesh, truncated Poisson sampling, arXiv:2508.15089).

    The size of a batch is private: only the padded size is static and public.

    Args:
        population: number of records, a public constant.
        sampling_probability: q, above 0 and at most 1.
        batch_size: the padded size; see :func:`padded_batch_size`.
        rng: a key for this sampler alone. There is no default.

    Raises:
        ValueError: for a number that is not allowed, or an unsuited key.

    Example:
        >>> from dpfa_jax import SecureKey
        >>> sampler = PoissonSampler(1000, 0.1, 160, SecureKey.generate())
        >>> sampler.sample(0).indices.shape
        (160,)
    """

    def __init__(
        self,
        population: int,
        sampling_probability: float,
        batch_size: int,
        rng: Key[Array, ""] | keys.SecureKey,
    ):
        _check_population(population, sampling_probability)
        if not _is_whole(batch_size):
            raise ValueError(f"batch_size={batch_size!r}: allowed is a whole number >= 1.")
        q = float(sampling_probability)
        self.population = int(population)
        self.sampling_probability = q
        self.batch_size = int(batch_size)
        self._key = keys.take_key(rng)
        self._threshold = math.floor(q * 2**32)
        self._like = jnp.zeros(self.population, jnp.bool_)

    def sample(self, index: int) -> PoissonBatch:
        """Batch number ``index``. The same number gives the same batch."""
        if not isinstance(index, int) or not 0 <= index < 2**32:
            raise ValueError(f"index={index!r}: allowed is a whole number from 0 to 2^32 - 1.")
        join, order = map(np.asarray, _words(self._key, jnp.uint32(index), self._like))
        chosen = np.flatnonzero(join.astype(np.uint64) < self._threshold)
        if chosen.size > self.batch_size:
            ranks = np.argsort(order[chosen], kind="stable")
            chosen = np.sort(chosen[ranks[: self.batch_size]])
        indices = np.zeros(self.batch_size, np.int32)
        indices[: chosen.size] = chosen
        return PoissonBatch(indices, np.arange(self.batch_size) >= chosen.size)

    def event(self, noise_multiplier: float) -> dp_accounting.DpEvent:
        """The cost of one step: Poisson sampling, truncation, one Gaussian release."""
        return sampling_event(
            self.population, self.sampling_probability, self.batch_size, noise_multiplier
        )
