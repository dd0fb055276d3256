"""Sampling of users: all capped examples of a user join a batch, or none."""

from collections.abc import Sequence
from typing import NamedTuple

import dp_accounting
import numpy as np
from jaxtyping import Array, Bool, Int, Int32, Key

from dpfa_jax import keys
from dpfa_jax.sampling.poisson import PoissonSampler


class UserBatch(NamedTuple):
    """Examples of the sampled users, padded to a static shape.

    Attributes:
        examples: int32[batch_size, max_examples], example numbers; 0 where padded.
        is_padding_example: bool[batch_size], True for a row without a user.
        is_padding_slot: bool[batch_size, max_examples], True where a user (or a padding
            row) has no example.
    """

    examples: Int32[np.ndarray, "b m"]
    is_padding_example: Bool[np.ndarray, "b"]
    is_padding_slot: Bool[np.ndarray, "b m"]


class UserSampler:
    """Poisson sampling with the user as the unit.

    Each user keeps their first ``max_examples_per_user`` examples, before any sampling;
    then users are sampled like records (:class:`PoissonSampler`). One user's gradient is
    that of all their kept examples together, and that is what must be clipped.

    Args:
        user_of_example: integers [n], the user of each example.
        max_examples_per_user: the cap.
        sampling_probability: the probability that a user joins a batch.
        batch_size: the padded number of users; see :func:`padded_batch_size`.
        rng: a key for this sampler alone.

    Raises:
        ValueError: for a number that is not allowed, or an unsuited key.

    Example:
        >>> from dpfa_jax import SecureKey
        >>> sampler = UserSampler([7, 7, 7, 9], max_examples_per_user=2,
        ...                       sampling_probability=1.0, batch_size=2,
        ...                       rng=SecureKey.generate())
        >>> sampler.sample(0).examples.tolist()
        [[0, 1], [3, 0]]
    """

    def __init__(
        self,
        user_of_example: Sequence[int] | Int[np.ndarray, "n"],
        *,
        max_examples_per_user: int,
        sampling_probability: float,
        batch_size: int,
        rng: Key[Array, ""] | keys.SecureKey,
    ):
        cap = max_examples_per_user
        if not isinstance(cap, int) or isinstance(cap, bool) or cap < 1:
            raise ValueError(f"max_examples_per_user={cap!r}: allowed is a whole number >= 1.")
        owner = np.asarray(user_of_example)
        if owner.ndim != 1 or not owner.size or not np.issubdtype(owner.dtype, np.integer):
            raise ValueError(
                f"user_of_example is {owner.dtype}{owner.shape}: integers [n], n >= 1, are needed."
            )
        self.user_ids, row = np.unique(owner, return_inverse=True)
        order = np.argsort(row, kind="stable")
        starts = np.searchsorted(row[order], np.arange(self.user_ids.size))
        rank = np.arange(owner.size) - starts[row[order]]
        kept = rank < cap
        self._table = np.zeros((self.user_ids.size, cap), np.int32)
        self._missing = np.ones((self.user_ids.size, cap), np.bool_)
        self._table[row[order][kept], rank[kept]] = order[kept]
        self._missing[row[order][kept], rank[kept]] = False
        self.users = PoissonSampler(self.user_ids.size, sampling_probability, batch_size, rng)

    @property
    def population(self) -> int:
        """The number of users, a public constant."""
        return self.users.population

    def sample(self, index: int) -> UserBatch:
        """Batch number ``index``."""
        batch = self.users.sample(index)
        padding = batch.is_padding_example
        examples = np.where(padding[:, None], 0, self._table[batch.indices])
        missing = self._missing[batch.indices] | padding[:, None]
        return UserBatch(examples.astype(np.int32), padding, missing)

    def event(self, noise_multiplier: float) -> dp_accounting.DpEvent:
        """The cost of one step, with the user as the record."""
        return self.users.event(noise_multiplier)
