"""Noise that cancels a part of the step before: what is released, and what it costs."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpfa_jax import add_noise
from dpfa_jax.accounting import Accountant, correlated_noise_event
from dpfa_jax.keys import allow_reuse_for_tests, reproducible_key
from dpfa_jax.mechanisms import correlated_sensitivity
from dpfa_jax.optim import privatizer_noise

ZEROS = {"a": jnp.zeros((30, 40)), "b": jnp.zeros(5)}


def releases(correlation, steps, seed=7):
    """What is released of zeros: the noise itself, a row for each step."""
    with allow_reuse_for_tests():
        tx = add_noise(1.0, 1.0, 1.0, reproducible_key(seed), correlation=correlation)
    state, rows = tx.init(ZEROS), []
    update = jax.jit(tx.update)
    for _ in range(steps):
        mean, state = update(ZEROS, state)
        rows.append(np.concatenate([np.ravel(x) for x in jax.tree.leaves(mean)]))
    return np.array(rows, np.float64)


def test_it_is_the_noise_of_this_step_less_a_part_of_the_last():
    white, tied = releases(0.0, 4), releases(0.75, 4)
    expected = white - 0.75 * np.concatenate([np.zeros_like(white[:1]), white[:-1]])
    np.testing.assert_allclose(tied, expected, atol=4 * 2.0**-10)
    # So the noise of a sum over steps stays: (1 - λ) of the white noise's, and the last step's.
    assert np.std(tied.sum(axis=0)) < 0.75 * np.std(white.sum(axis=0))


@pytest.mark.parametrize("correlation", [0.0, 0.3, 0.9])
@pytest.mark.parametrize(("count", "apart"), [(1, 1), (2, 1), (2, 3), (3, 2), (7, 1)])
def test_sensitivity_is_the_worst_over_all_participations(correlation, count, apart):
    """Every set of steps that is allowed, and gradients of either sign in each."""
    steps = 7
    matrix = np.array(
        [[correlation ** (i - j) if i >= j else 0.0 for j in range(steps)] for i in range(steps)]
    )
    worst = 0.0
    for chosen in itertools.product([0, 1, -1], repeat=steps):
        places = np.flatnonzero(chosen)
        if len(places) <= count and (np.diff(places) >= apart).all():
            worst = max(worst, float(np.linalg.norm(matrix @ np.array(chosen))))
    found = correlated_sensitivity(correlation, steps, participations=count, min_separation=apart)
    assert found == pytest.approx(worst, rel=1e-12)


def test_events():
    one = correlated_noise_event(1.0, 0.9, 10**4, participations=1)
    assert one.noise_multiplier == pytest.approx(math.sqrt(1 - 0.81))
    # Without correlation it is what the steps compose to.
    plain = Accountant("add_remove")
    plain.compose(correlated_noise_event(8.0, 0.0, 64))
    assert plain.epsilon(1e-5) == pytest.approx(4.38, abs=0.02)
    for options in (
        {"steps": 0},
        {"steps": 5, "participations": 0},
        {"steps": 5, "min_separation": True},
    ):
        with pytest.raises(ValueError, match="allowed is a whole number >= 1"):
            correlated_noise_event(1.0, 0.5, **options)
    for bad in (-0.1, 1.0, float("nan"), True, "0.5"):
        with pytest.raises(ValueError, match="correlation="):
            correlated_noise_event(1.0, bad, 5)
        with pytest.raises(ValueError, match="correlation="):
            add_noise(1.0, 1.0, 1.0, reproducible_key(0), correlation=bad)


class TestPrivatizer:
    """A matrix-factorisation privatizer of jax_privacy in add_noise's place."""

    def make(self, matrix, seed):
        from jax_privacy import noise_addition

        make = functools.partial(noise_addition.matrix_factorization_privatizer, matrix)
        return privatizer_noise(make, 1.0, 1.0, 4.0, reproducible_key(seed))

    @pytest.mark.parametrize("kind", ["dense", "streaming"])
    def test_noise_is_correlated_as_the_matrix_says(self, kind):
        """Each coordinate's release is D g: its covariance is D Dᵀ, to six deviations."""
        from jax_privacy.matrix_factorization import toeplitz

        inverse = np.eye(3) - 0.5 * np.eye(3, k=-1)
        matrix = jnp.asarray(inverse, jnp.float32)
        zeros = jnp.zeros(40_000)
        with jax.numpy_dtype_promotion("standard"):
            if kind == "streaming":
                matrix = toeplitz.inverse_as_streaming_matrix(jnp.asarray([1.0, 0.5, 0.25]))
            tx = self.make(matrix, 3 + len(kind))
            state, rows = tx.init(zeros), []
            for _ in range(3):
                mean, state = tx.update(zeros, state)
                rows.append(np.asarray(mean, np.float64) * 4.0)
        expected = inverse @ inverse.T
        found = np.cov(np.array(rows))
        assert np.abs(found - expected).max() < 6 * 2.0 / math.sqrt(zeros.size)
        cells = np.array(rows) * 2**10
        np.testing.assert_array_equal(cells, np.round(cells))

    def test_refusals(self):
        with pytest.raises(ValueError, match="rng"):
            privatizer_noise(lambda **_: None, 1.0, 1.0, 4.0, None)
        with pytest.raises(ValueError, match="returned a NoneType"):
            privatizer_noise(lambda **_: None, 1.0, 1.0, 4.0, reproducible_key(0))
        with pytest.raises(ValueError, match="noise_multiplier=0"):
            privatizer_noise(lambda **_: None, 1.0, 0, 4.0, reproducible_key(0))
