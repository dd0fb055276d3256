"""The lower bound: its coverage, its tightness, and the formulas against other sources."""

import dp_accounting
import numpy as np
import pytest
import scipy.stats

from dpfa_jax.audit import gdp_epsilon, gdp_lower_bound, gdp_mu, judge


@pytest.mark.parametrize("mu", [0.1, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("delta", [1e-7, 1e-5, 1e-2])
def test_epsilon_solves_the_curve_of_balle_and_wang(mu, delta):
    epsilon = gdp_epsilon(mu, delta)
    cdf = scipy.stats.norm.cdf
    if epsilon > 0:
        curve = cdf(mu / 2 - epsilon / mu) - np.exp(epsilon) * cdf(-mu / 2 - epsilon / mu)
        assert curve == pytest.approx(delta, rel=1e-4)
        assert gdp_mu(epsilon, delta) == pytest.approx(mu, rel=1e-5)
    else:
        assert 2 * cdf(mu / 2) - 1 <= delta


def test_coverage():
    """2000 bounds at 80 %: more than 20 % above the true μ would disprove the guarantee.

    The counts of above are binomial with a chance of at most 0.2; 508 or more of 2000 then
    have probability below 1e-8. Samples of 200, where normal approximations would fail.
    """
    random = np.random.default_rng(1)
    for mu in (0.0, 1.0, 4.0):
        above = 0
        for _ in range(2000):
            scores = random.normal(size=(2, 200))
            bound = gdp_lower_bound(scores[0], mu + scores[1], confidence=0.8)
            above += bound.mu > mu
        assert above < 508
    assert scipy.stats.binom.sf(507, 2000, 0.2) < 1e-8


@pytest.mark.parametrize(("samples", "least", "most"), [(10**4, 0.82, 1.0), (10**6, 0.98, 1.0)])
def test_share_of_the_truth(samples, least, most):
    """The share that docs/privacy.md states; five deviations are 0.1 and 0.01."""
    random = np.random.default_rng(samples)
    bound = gdp_lower_bound(random.normal(size=samples), 1.0 + random.normal(size=samples))
    assert least < bound.epsilon(1e-5) / gdp_epsilon(1.0, 1e-5) < most


def test_clopper_pearson_limits():
    """No error in 900 counted trials: the rate is at most 1 − 0.005^(1/900) on each side."""
    bound = gdp_lower_bound(np.zeros(1000), np.ones(1000))
    rate = 1 - 0.005 ** (1 / 900)
    assert (bound.false_positives, bound.false_negatives) == (0, 0)
    assert bound.mu == pytest.approx(2 * scipy.stats.norm.isf(rate))


def test_scores_that_say_nothing_bound_nothing():
    random = np.random.default_rng(2)
    scores = random.normal(size=(2, 5000))
    assert gdp_lower_bound(scores[0], scores[1]).mu < 0.05
    assert gdp_lower_bound(scores[0] + 9, scores[1]).mu == 0.0
    assert gdp_lower_bound(np.zeros(100), np.zeros(100)).epsilon(1e-5) == 0.0


def test_the_threshold_does_not_see_what_is_counted():
    random = np.random.default_rng(3)
    scores = random.normal(size=(2, 1000))
    first = gdp_lower_bound(scores[0], scores[1])
    scores[:, 100:] += 5.0
    assert gdp_lower_bound(scores[0], scores[1]).threshold == first.threshold
    scores[:, :100] += 5.0
    assert gdp_lower_bound(scores[0], scores[1]).threshold == first.threshold + 5.0


def test_bad_input():
    good = np.zeros(100)
    for scores in (np.zeros(19), np.zeros((4, 100)), np.full(100, np.nan)):
        with pytest.raises(ValueError, match="negatives"):
            gdp_lower_bound(scores, good)
        with pytest.raises(ValueError, match="positives"):
            gdp_lower_bound(good, scores)
    for confidence in (0.0, 1.0, 99, float("nan")):
        with pytest.raises(ValueError, match="confidence"):
            gdp_lower_bound(good, good, confidence=confidence)
    for mu in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="mu"):
            gdp_epsilon(mu, 1e-5)
    for delta in (0.0, 1.0, -1.0):
        with pytest.raises(ValueError, match="delta"):
            gdp_epsilon(1.0, delta)
        with pytest.raises(ValueError, match="delta"):
            gdp_mu(1.0, delta)


# --- the verdict ------------------------------------------------------------------------


def _judge(shift, samples=10_000, multiplier=1.0, **options):
    scores = np.random.default_rng(4).normal(size=(2, samples))
    event = dp_accounting.GaussianDpEvent(multiplier)
    return judge("a test", event, "add_remove", scores[0], scores[1] + shift, **options)


def test_verdicts():
    assert _judge(1.0).verdict == "holds"
    assert _judge(1.2).verdict == "broken"
    assert _judge(0.8).verdict == "wasteful"
    assert _judge(0.8, is_tight=False).verdict == "holds"
    assert _judge(0.8, samples=9_999).verdict == "holds"  # too few to call it waste
    assert _judge(0.94, samples=1_000_000).verdict == "wasteful"
    assert _judge(1.0).at(1 - 1e-9).epsilon < _judge(1.0).epsilon
    assert _judge(1.0).claim == pytest.approx(gdp_epsilon(1.0, 1e-5), rel=1e-3)


def test_not_a_number_on_one_side_is_a_finding():
    scores = np.random.default_rng(5).normal(size=1000)
    nothing = np.full(1000, np.nan)
    event = dp_accounting.GaussianDpEvent(1.0)
    for pair in ((scores, nothing), (nothing, scores)):
        assert judge("a test", event, "add_remove", *pair).verdict == "broken"


def test_a_claim_of_nothing_is_refused():
    scores = np.zeros(100)
    with pytest.raises(ValueError, match="claims epsilon=inf"):
        judge("a test", dp_accounting.NonPrivateDpEvent(), "add_remove", scores, scores)
