"""One-run audits: against jax_privacy's, by simulation, and on bad input."""

import dp_accounting
import numpy as np
import pytest
import scipy.stats
from jax_privacy import auditing

from dpfa_jax.audit import one_run
from dpfa_jax.audit.one_run import Guesses

CASES = [Guesses(1000, 200, 190), Guesses(500, 100, 80), Guesses(64, 64, 60), Guesses(300, 30, 30)]


@pytest.mark.parametrize("guesses", CASES)
@pytest.mark.parametrize("delta", [1e-5, 1e-3])
def test_both_bounds_agree_with_jax_privacy(guesses, delta):
    m, made, right = guesses
    theirs = auditing._epsilon_one_run(0.0, m, made, right, 0.05, delta)
    assert one_run.one_run_epsilon(guesses, delta) == pytest.approx(theirs, abs=2e-3)
    theirs = auditing._epsilon_one_run_fdp(1e-3, m, made, right, 0.05, delta)
    assert one_run.one_run_gaussian_epsilon(guesses, delta) == pytest.approx(theirs, abs=5e-3)


def test_whole_audits_agree_with_their_auditor():
    """The same scores: all thresholds there, guesses fixed beforehand here."""
    random = np.random.default_rng(7)
    joined = random.random(1000) < 0.5
    scores = random.normal(size=1000) + 3.0 * joined
    ours = one_run.one_run_gaussian_epsilon(one_run.guess(scores, joined), 1e-5)
    auditor = auditing.CanaryScoreAuditor(scores[joined], scores[~joined])
    theirs = auditor.epsilon_one_run_fdp(0.05, 1e-5)
    assert 0.5 < ours / theirs < 2.0
    assert ours < dp_accounting.get_epsilon_gaussian(1 / 3.0, 1e-5)


def test_chance_without_delta_is_the_binomial_tail():
    guesses = Guesses(50, 20, 15)
    for epsilon in (0.0, 0.7, 2.0):
        rate = 1 / (1 + np.exp(-epsilon))
        assert one_run.chance_of(guesses, epsilon, 0.0) == pytest.approx(
            scipy.stats.binom.sf(14, 20, rate)
        )


@pytest.mark.parametrize("method", ["pure", "gaussian"])
def test_coverage(method):
    """400 runs of randomised canaries at 80 %, each as private as is claimed.

    More than 125 misses have probability below 10⁻⁷ if the coverage is 80 %.
    """
    random = np.random.default_rng(11)
    misses = 0
    for _ in range(400):
        joined = random.random(100) < 0.5
        if method == "pure":  # ln 3: the truth with probability 3/4
            scores = np.where(random.random(100) < 0.75, joined, ~joined) + random.random(100) / 9
            g = one_run.guess(scores, joined)
            misses += one_run.one_run_epsilon(g, 1e-9, confidence=0.8) > np.log(3)
        else:
            scores = random.normal(size=100) + joined
            g = one_run.guess(scores, joined)
            inverse = lambda x: scipy.stats.norm.cdf(scipy.stats.norm.ppf(x) - 1.0)  # noqa: E731
            misses += one_run.refutes_curve(g, inverse, confidence=0.8)
    assert misses <= 125


def test_the_accountants_curve_gives_what_the_gaussian_does():
    guesses = CASES[0]
    event = one_run.one_run_event_epsilon(
        guesses, 1e-5, dp_accounting.GaussianDpEvent, "add_remove"
    )
    gaussian = one_run.one_run_gaussian_epsilon(guesses, 1e-5)
    assert 0.9 * gaussian < event <= gaussian * 1.01


def test_chance_results_prove_nothing():
    guesses = Guesses(1000, 200, 104)
    assert one_run.one_run_epsilon(guesses, 1e-5) == 0.0
    assert one_run.one_run_gaussian_epsilon(guesses, 1e-5) == 0.0
    event = dp_accounting.GaussianDpEvent
    assert one_run.one_run_event_epsilon(guesses, 1e-5, event, "add_remove") == 0.0


def test_bad_input():
    with pytest.raises(ValueError, match="allowed is 0 <= right"):
        one_run.one_run_epsilon(Guesses(10, 5, 6), 1e-5)
    with pytest.raises(ValueError, match="confidence=1"):
        one_run.one_run_epsilon(Guesses(10, 5, 5), 1e-5, confidence=1)
    with pytest.raises(ValueError, match="delta"):
        one_run.one_run_epsilon(Guesses(10, 5, 5), 0.0)
    joined = np.zeros(10, bool)
    with pytest.raises(ValueError, match="one axis"):
        one_run.guess(np.zeros(9), joined)
    with pytest.raises(ValueError, match="NaN"):
        one_run.guess(np.full(10, np.nan), joined)
    with pytest.raises(ValueError, match="share=0"):
        one_run.guess(np.zeros(10), joined, 0.0)
