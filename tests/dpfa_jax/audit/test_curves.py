"""Claims as (ε, δ) curves, and the lower bound that a family of them gives."""

import functools

import dp_accounting
import numpy as np
import pytest
import scipy.stats

from dpfa_jax.audit import Claim, curves, event_lower_bound, gdp_lower_bound

NORM = scipy.stats.norm


@pytest.mark.parametrize("adjacency", ["add_remove", "replace_one"])
def test_a_gaussian_claim_is_the_gaussian_curve(adjacency):
    """Never above the true curve, and near it."""
    claim = Claim(dp_accounting.GaussianDpEvent(0.8), adjacency)
    alpha = np.linspace(0.001, 0.999, 50)
    exact = NORM.cdf(NORM.isf(alpha) - 1.25)
    found = claim.least_false_negatives(alpha)
    assert np.all(found <= exact + 1e-6)
    assert np.all(found >= exact - 0.004)


def test_nothing_released_allows_only_guessing():
    claim = Claim(dp_accounting.NoOpDpEvent(), "add_remove")
    found = claim.least_false_negatives(np.array([0.0, 0.3, 1.0]))
    np.testing.assert_allclose(found, [1.0, 0.7, 0.0], atol=1e-6)


def test_sampling_leaves_what_never_joined():
    """Without noise a run is seen exactly if its record joined once: β is (1 − q)^T at α = 0."""
    event = dp_accounting.PoissonSampledDpEvent(0.25, dp_accounting.GaussianDpEvent(0.05))
    claim = Claim(dp_accounting.SelfComposedDpEvent(event, 2), "add_remove")
    least = claim.least_false_negatives(np.array([0.0]))[0]
    assert least == pytest.approx(0.75**2, abs=0.01)


def test_it_agrees_with_the_gaussian_bound():
    random = np.random.default_rng(3)
    scores = random.normal(size=50_000), 1.5 + random.normal(size=50_000)
    event_bound = event_lower_bound(*scores, dp_accounting.GaussianDpEvent, "add_remove")
    mu = gdp_lower_bound(*scores).mu
    assert 1 / event_bound.noise_multiplier == pytest.approx(mu, rel=0.03)
    assert event_bound.epsilon(1e-5) < dp_accounting.get_epsilon_gaussian(1 / 1.5, 1e-5)


def test_coverage(monkeypatch):
    """400 tight attacks at 80 %: a bound misses with probability 0.2 at most, so that more than
    125 misses have probability below 10⁻⁷."""
    monkeypatch.setattr(curves, "Claim", functools.cache(Claim))
    random = np.random.default_rng(5)
    misses = 0
    for _ in range(400):
        scores = random.normal(size=200), 1.0 + random.normal(size=200)
        bound = event_lower_bound(
            *scores, dp_accounting.GaussianDpEvent, "add_remove", confidence=0.8
        )
        misses += bound.noise_multiplier < 1.0
    assert scipy.stats.binom.sf(125, 400, 0.2) < 1e-6
    assert misses <= 125


def test_scores_that_tell_nothing_prove_nothing():
    scores = np.random.default_rng(4).normal(size=(2, 1000))
    bound = event_lower_bound(*scores, dp_accounting.GaussianDpEvent, "add_remove")
    assert bound.epsilon(1e-5) == 0.0


@pytest.mark.parametrize("confidence", [0.0, 1.0, 1, "0.9"])
def test_bad_input(confidence):
    scores = np.zeros((2, 100))
    with pytest.raises(ValueError, match="confidence="):
        event_lower_bound(
            *scores, dp_accounting.GaussianDpEvent, "add_remove", confidence=confidence
        )
    with pytest.raises(ValueError, match="negatives has shape"):
        event_lower_bound(scores[0, :19], scores[1], dp_accounting.GaussianDpEvent, "add_remove")
