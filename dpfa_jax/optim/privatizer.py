"""Noise from another library's privatizer, such as jax_privacy's, in ``add_noise``'s place."""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Key, PyTree

from dpfa_jax import keys
from dpfa_jax.optim.noise import grid_spacing, inflated_sum_std, noise_std
from dpfa_jax.parallel.axes import AxisNames, whole_sum


class MakePrivatizer(Protocol):
    """Makes a transformation that adds noise to a clipped sum."""

    def __call__(self, *, stddev: float, prng_key: Any, dtype: Any) -> optax.GradientTransformation:
        """``stddev``: of the noise that the privatizer correlates; ``dtype``: of the noise."""
        ...


def privatizer_noise(
    make_privatizer: MakePrivatizer | Callable[..., optax.GradientTransformation],
    l2_clip_norm: float,
    noise_multiplier: float,
    expected_batch_size: float,
    rng: Key[Array, ""] | keys.SecureKey,
    *,
    adjacency: str = "add_remove",
    axis_name: AxisNames | None = None,
) -> optax.GradientTransformation:
    """Optax: a clipped **sum** in, a private mean out, with a privatizer's noise between.

    Made for ``jax_privacy.noise_addition.matrix_factorization_privatizer``, which correlates
    the noise of steps by a matrix: ``functools.partial`` of it with that matrix is what
    ``make_privatizer`` may be. The key is mandatory and of 256 bits, the noise is float32,
    the sum is rounded to a public grid afterwards and divided by a public constant, as
    by :func:`dpfa_jax.add_noise`.

    Guarantee. That of the privatizer for sums whose terms have norm ``l2_clip_norm`` and noise of
    standard deviation z C k, k = 1 for ``'add_remove'`` and 2 for ``'replace_one'``. For a noising
    matrix D = C⁻¹, all steps together are one ``GaussianDpEvent(z / s)``, s the sensitivity of
    C for the participations that the data order allows (``jax_privacy.matrix_factorization``
    computes it). This function cannot see D, and states no event.

    Args:
        make_privatizer: called once, with ``stddev``, ``prng_key`` and ``dtype`` as keywords.
        l2_clip_norm: as for ``add_noise``, like all others.
        noise_multiplier: z, above 0.
        expected_batch_size: the public divisor.
        rng: a key for this transformation alone.
        adjacency: ``'add_remove'`` or ``'replace_one'``.
        axis_name: inside ``shard_map`` and ``pmap``, over which axes each device's sums are
            still to be added up, as for ``add_noise``.

    Raises:
        ValueError: for a missing or unsuited key, a number that is not allowed, or what is not
            an ``optax.GradientTransformation``; in the update for a sum of one device alone.

    Example:
        >>> from dpfa_jax import SecureKey
        >>> def white(*, stddev, prng_key, dtype):
        ...     def update(x, state, params=None):
        ...         key = jax.random.fold_in(prng_key, state)
        ...         return x + stddev * jax.random.normal(key, x.shape, dtype), state + 1
        ...     return optax.GradientTransformation(lambda _: jnp.int32(0), update)
        >>> tx = privatizer_noise(white, 1.0, 1.1, 256, SecureKey.generate())
        >>> mean, state = tx.update(jnp.ones(3), tx.init(jnp.zeros(3)))
        >>> mean.shape, int(state)
        ((3,), 1)
    """
    std = noise_std(l2_clip_norm, noise_multiplier, expected_batch_size, adjacency)
    if not std:
        raise ValueError("noise_multiplier=0: a privatizer without noise; allowed is above 0.")
    sum_std = inflated_sum_std(std, expected_batch_size)
    key = keys.take_key(rng)
    inner = make_privatizer(stddev=sum_std, prng_key=key, dtype=jnp.float32)
    if not isinstance(inner, optax.GradientTransformation):
        raise ValueError(
            f"make_privatizer returned a {type(inner).__name__}: an "
            "optax.GradientTransformation is needed."
        )
    spacing = grid_spacing(sum_std)

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, Any]:
        whole = jax.tree.map(lambda x: x.astype(jnp.float32), updates)
        whole = whole_sum(whole, key, axis_name, None)
        noisy, state = inner.update(whole, state, params)

        def mean(x: jax.Array, like: jax.Array) -> jax.Array:
            rounded = jnp.round(x / spacing) * spacing
            return (rounded / jnp.float32(expected_batch_size)).astype(like.dtype)

        return jax.tree.map(mean, noisy, updates), state

    return optax.GradientTransformation(inner.init, update)
