"""The solved noise multiplier fits, and one that is a percent smaller does not."""

import math

import dp_accounting
import pytest

import dpfa_jax
from dpfa_jax import Accountant, calibrate_noise_multiplier

Gaussian = dp_accounting.GaussianDpEvent


def poisson(q, steps):
    return lambda z: dp_accounting.SelfComposedDpEvent(
        dp_accounting.PoissonSampledDpEvent(q, Gaussian(z)), steps
    )


def truncated(n, q, size, steps):
    return lambda z: dp_accounting.SelfComposedDpEvent(
        dp_accounting.TruncatedSubsampledGaussianDpEvent(n, q, size, z), steps
    )


def repeated(steps):
    return lambda z: dp_accounting.SelfComposedDpEvent(Gaussian(z), steps)


def training_and_evaluation(z):
    return dp_accounting.ComposedDpEvent([poisson(0.05, 100)(z), Gaussian(4 * z)])


def spent(make_event, z, delta, adjacency):
    return Accountant(adjacency).compose(make_event(z)).epsilon(delta)


PLANS = {
    "one Gaussian": (Gaussian, 1.0, 1e-5),
    "loose": (Gaussian, 15.0, 1e-3),
    "tight": (Gaussian, 0.02, 1e-5),
    "R Gaussians": (repeated(4096), 2.0, 1e-6),
    "Poisson": (poisson(0.1, 200), 4.0, 1e-5),
    "Poisson, long": (poisson(0.01, 5000), 1.0, 1e-7),
    # Wide bins overstate ε here 2.5 times: nothing may be decided by them.
    "Poisson, rare": (poisson(0.001, 20_000), 0.2, 1e-8),
    "truncated": (truncated(200, 0.1, 30, 2), 1.0, 1e-4),
    "mixed": (training_and_evaluation, 3.0, 1e-5),
}


@pytest.mark.parametrize("adjacency", ["add_remove", "replace_one"])
@pytest.mark.parametrize("plan", PLANS)
def test_it_fits_and_a_percent_less_does_not(plan, adjacency):
    make_event, epsilon, delta = PLANS[plan]
    z = calibrate_noise_multiplier(make_event, epsilon=epsilon, delta=delta, adjacency=adjacency)
    assert spent(make_event, z, delta, adjacency) <= epsilon
    assert spent(make_event, 0.99 * z, delta, adjacency) > epsilon


@pytest.mark.parametrize("adjacency", ["add_remove", "replace_one"])
def test_against_the_closed_form(adjacency):
    """z = √R/μ with μ solved from dp_accounting's closed form."""
    for releases, epsilon, delta in ((1, 4.3772, 1e-5), (100, 1.0, 1e-6)):
        exact = math.sqrt(releases) * dp_accounting.get_sigma_gaussian(epsilon, delta)
        z = calibrate_noise_multiplier(
            repeated(releases), epsilon=epsilon, delta=delta, adjacency=adjacency
        )
        assert exact * (1 - 1e-6) <= z <= exact * 1.003


@pytest.mark.parametrize("z", [1.0, 16.0, 1024.0])
def test_targets_between_what_wide_and_narrow_bins_answer(z):
    """At a power of four, a search that mixes the two loses the sign of its bracket."""
    wide, narrow = (
        Accountant("add_remove", interval=i).compose(Gaussian(z)).epsilon(1e-5)
        for i in (5e-3, 1e-4)
    )
    for fraction in (0.01, 0.99):
        target = narrow + fraction * (wide - narrow)
        answer = calibrate_noise_multiplier(
            Gaussian, epsilon=target, delta=1e-5, adjacency="add_remove"
        )
        assert spent(Gaussian, answer, 1e-5, "add_remove") <= target
        assert spent(Gaussian, 0.99 * answer, 1e-5, "add_remove") > target


def test_a_plan_that_costs_nothing_gets_next_to_no_noise():
    def free(z):
        return dp_accounting.NoOpDpEvent()

    z = calibrate_noise_multiplier(free, epsilon=1.0, delta=1e-5, adjacency="add_remove")
    assert 0 < z < 1e-5


def test_less_budget_needs_more_noise():
    answers = [
        calibrate_noise_multiplier(poisson(0.2, 20), epsilon=e, delta=1e-5, adjacency="add_remove")
        for e in (1.0, 2.0, 4.0)
    ]
    assert answers == sorted(answers, reverse=True)


def test_rdp_asks_for_more_noise_than_pld():
    pld, rdp = (
        calibrate_noise_multiplier(
            poisson(0.1, 100), epsilon=2.0, delta=1e-5, adjacency="add_remove", method=method
        )
        for method in ("pld", "rdp")
    )
    assert pld < rdp < 1.5 * pld


@pytest.mark.parametrize("epsilon", [0.0, -1.0, float("nan"), float("inf"), "8", None])
def test_epsilons_that_are_not_allowed(epsilon):
    with pytest.raises(ValueError, match="epsilon="):
        calibrate_noise_multiplier(Gaussian, epsilon=epsilon, delta=1e-5, adjacency="add_remove")


@pytest.mark.parametrize("delta", [0.0, 1.0, -1.0, float("nan"), None])
def test_deltas_that_are_not_allowed(delta):
    with pytest.raises(ValueError, match="delta="):
        calibrate_noise_multiplier(Gaussian, epsilon=1.0, delta=delta, adjacency="add_remove")


def test_words_that_are_not_allowed():
    with pytest.raises(ValueError, match="adjacency="):
        calibrate_noise_multiplier(Gaussian, epsilon=1.0, delta=1e-5, adjacency="bounded")
    with pytest.raises(ValueError, match="method="):
        calibrate_noise_multiplier(
            Gaussian, epsilon=1.0, delta=1e-5, adjacency="add_remove", method="zcdp"
        )


def test_a_plan_that_no_noise_fits():
    def leaky(z):
        return dp_accounting.ComposedDpEvent([Gaussian(z), Gaussian(0.5)])

    with pytest.raises(ValueError, match="no multiplier below 1e9 fits"):
        calibrate_noise_multiplier(leaky, epsilon=1.0, delta=1e-5, adjacency="add_remove")
    with pytest.raises(ValueError, match="no multiplier below 1e9 fits"):
        calibrate_noise_multiplier(
            lambda z: dp_accounting.NonPrivateDpEvent(),
            epsilon=1.0,
            delta=1e-5,
            adjacency="add_remove",
        )


def test_an_unsupported_plan_raises():
    with pytest.raises(dp_accounting.UnsupportedEventError):
        calibrate_noise_multiplier(
            lambda z: dp_accounting.SampledWithoutReplacementDpEvent(100, 10, Gaussian(z)),
            epsilon=1.0,
            delta=1e-5,
            adjacency="add_remove",
        )


def test_the_public_name():
    assert dpfa_jax.calibrate_noise_multiplier is calibrate_noise_multiplier
