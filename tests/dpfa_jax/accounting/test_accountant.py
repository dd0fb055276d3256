"""The accountant against closed forms and numerical integration that share no code with it."""

import itertools
import math

import dp_accounting
import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
import scipy.stats

import dpfa_jax
from dpfa_jax.accounting import Accountant, epsilon_curve

ADJACENCIES = ("add_remove", "replace_one")
Gaussian = dp_accounting.GaussianDpEvent
Poisson = dp_accounting.PoissonSampledDpEvent
Repeated = dp_accounting.SelfComposedDpEvent
Composed = dp_accounting.ComposedDpEvent
Truncated = dp_accounting.TruncatedSubsampledGaussianDpEvent


def gaussian_delta(epsilon, mu):
    """δ(ε) of μ-GDP (J. Dong, A. Roth, W. Su, Gaussian differential privacy, 2022, eq. 2.13)."""
    cdf = scipy.stats.norm.cdf
    return cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * cdf(-mu / 2 - epsilon / mu)


def gaussian_epsilon(mu, delta):
    most = mu**2 / 2 + 10 * mu
    return scipy.optimize.brentq(lambda e: gaussian_delta(e, mu) - delta, 0.0, most, xtol=1e-12)


def hockey_stick(p, q, epsilon, reach):
    """∫ max(p − e^ε q, 0) by quadrature between the sign changes of the integrand."""
    grid = np.linspace(-reach, reach, 200_001)
    f = p(grid) - math.exp(epsilon) * q(grid)
    roots = [
        scipy.optimize.brentq(lambda x: p(x) - math.exp(epsilon) * q(x), grid[i], grid[i + 1])
        for i in np.flatnonzero(np.sign(f[:-1]) * np.sign(f[1:]) < 0)
    ]
    edges = [-reach, *roots, reach]
    total = 0.0
    for a, b in itertools.pairwise(edges):
        if p((a + b) / 2) > math.exp(epsilon) * q((a + b) / 2):
            total += scipy.integrate.quad(
                lambda x: p(x) - math.exp(epsilon) * q(x), a, b, epsabs=1e-14, limit=200
            )[0]
    return total


# --- Gaussian --------------------------------------------------------------------------


@pytest.mark.parametrize("adjacency", ADJACENCIES)
def test_mu_one_is_4_38(adjacency):
    accountant = Accountant(adjacency).compose(Gaussian(1.0))
    assert accountant.epsilon(1e-5) == pytest.approx(4.3772, abs=5e-4)
    assert accountant.epsilon(1e-5) >= gaussian_epsilon(1.0, 1e-5)
    assert accountant.delta(4.3772) == pytest.approx(1e-5, rel=1e-3)


@pytest.mark.parametrize("adjacency", ADJACENCIES)
@pytest.mark.parametrize(("z", "releases"), [(0.5, 1), (3.0, 7), (10.0, 100), (200.0, 10_000)])
def test_compositions_against_the_closed_form(adjacency, z, releases):
    delta = 1e-6
    exact = dp_accounting.get_epsilon_gaussian(z / math.sqrt(releases), delta)
    assert exact == pytest.approx(gaussian_epsilon(math.sqrt(releases) / z, delta), rel=1e-6)
    composed = [
        Accountant(adjacency).compose(Gaussian(z), releases),
        Accountant(adjacency).compose(Repeated(Gaussian(z), releases)),
        Accountant(adjacency).compose(Repeated(Composed([Gaussian(z)]), releases)),
    ]
    for accountant in composed:
        assert exact * (1 - 1e-9) <= accountant.epsilon(delta) <= exact * 1.001 + 1e-4


@pytest.mark.parametrize("adjacency", ADJACENCIES)
def test_different_events_compose_by_the_sum_of_squares(adjacency):
    mu = math.sqrt(1 / 2.0**2 + 3 / 5.0**2)
    exact = gaussian_epsilon(mu, 1e-5)
    one = Accountant(adjacency).compose(Gaussian(2.0)).compose(Gaussian(5.0), 3)
    two = Accountant(adjacency).compose(Composed([Gaussian(2.0), Repeated(Gaussian(5.0), 3)]))
    for accountant in (one, two):
        assert exact <= accountant.epsilon(1e-5) <= exact * 1.001


def test_rdp_is_an_upper_bound():
    for event in (Gaussian(1.0), Poisson(0.1, Gaussian(1.5))):
        tight = Accountant("add_remove").compose(event, 10).epsilon(1e-5)
        renyi = Accountant("add_remove", "rdp").compose(event, 10).epsilon(1e-5)
        assert tight < renyi < 1.5 * tight


def test_nothing_costs_nothing_and_no_noise_costs_everything():
    for adjacency in ADJACENCIES:
        assert Accountant(adjacency).epsilon(1e-5) == 0.0
        assert Accountant(adjacency).compose(dp_accounting.NoOpDpEvent()).epsilon(1e-5) == 0.0
        assert Accountant(adjacency).compose(Gaussian(1.0), 0).epsilon(1e-5) == 0.0
        for event in (dp_accounting.NonPrivateDpEvent(), Gaussian(0.0)):
            assert Accountant(adjacency).compose(event).epsilon(1e-5) == math.inf
            assert Accountant(adjacency).compose(event).delta(1.0) == 1.0


def test_a_wider_interval_never_answers_less():
    for event in (Gaussian(3.0), Poisson(0.1, Gaussian(1.2))):
        fine, coarse = (
            Accountant("add_remove", interval=i).compose(event, 50).epsilon(1e-6)
            for i in (1e-4, 1e-3)
        )
        assert fine <= coarse <= 1.05 * fine


# --- Poisson sampling ------------------------------------------------------------------


@pytest.mark.parametrize(("q", "z"), [(0.01, 0.8), (0.1, 1.0), (0.5, 2.0), (0.9, 0.7), (1.0, 1.5)])
@pytest.mark.parametrize("epsilon", [0.05, 0.5, 2.0])
def test_replace_one_poisson_against_integration(q, z, epsilon):
    """(1−q)N(0, s²) + qN(±1, s²): the record moves the sum from +C to −C, s = σ/C = 2z."""
    s = 2 * z
    pdf = scipy.stats.norm.pdf

    def mixture(sign):
        return lambda x: (1 - q) * pdf(x, 0, s) + q * pdf(x, sign, s)

    exact = hockey_stick(mixture(1), mixture(-1), epsilon, reach=12 * s)
    answer = Accountant("replace_one").compose(Poisson(q, Gaussian(z))).delta(epsilon)
    assert exact - 1e-11 <= answer <= 1.005 * exact + 1e-9


@pytest.mark.parametrize(("q", "z"), [(0.01, 0.8), (0.1, 1.0), (0.5, 2.0), (1.0, 1.5)])
@pytest.mark.parametrize("epsilon", [0.05, 0.5, 2.0])
def test_add_remove_poisson_against_integration(q, z, epsilon):
    pdf = scipy.stats.norm.pdf

    def with_it(x):
        return (1 - q) * pdf(x, 0, z) + q * pdf(x, 1, z)

    def without_it(x):
        return pdf(x, 0, z)

    exact = max(
        hockey_stick(with_it, without_it, epsilon, reach=12 * z + 1),
        hockey_stick(without_it, with_it, epsilon, reach=12 * z + 1),
    )
    answer = Accountant("add_remove").compose(Poisson(q, Gaussian(z))).delta(epsilon)
    assert exact - 1e-11 <= answer <= 1.005 * exact + 1e-9


@pytest.mark.parametrize("adjacency", ADJACENCIES)
def test_sampling_with_probability_one_is_no_sampling(adjacency):
    sampled, plain = (
        Accountant(adjacency).compose(e, 5).epsilon(1e-5)
        for e in (Poisson(1.0, Gaussian(2.0)), Gaussian(2.0))
    )
    assert sampled == pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize("adjacency", ADJACENCIES)
def test_truncation_costs_more_than_plain_poisson_and_less_the_rarer_it_is(adjacency):
    n, q, z = 1000, 0.1, 1.5  # 100 ± 9.5 join
    plain = Accountant(adjacency).compose(Poisson(q, Gaussian(z)), 5).epsilon(1e-6)
    answers = [
        Accountant(adjacency).compose(Truncated(n, q, size, z), 5).epsilon(1e-6)
        for size in (90, 115, 160)
    ]
    assert answers == sorted(answers, reverse=True)
    assert answers[0] > 1.1 * plain
    assert all(a >= plain * (1 - 1e-6) for a in answers)
    assert answers[-1] == pytest.approx(plain, rel=0.01)


# --- refusals --------------------------------------------------------------------------


class UnknownEvent(dp_accounting.DpEvent):
    """Somebody else's mechanism."""


UNKNOWN = [
    UnknownEvent(),
    dp_accounting.UnsupportedDpEvent(),
    dp_accounting.SampledWithoutReplacementDpEvent(1000, 10, Gaussian(1.0)),
    dp_accounting.SampledWithReplacementDpEvent(1000, 10, Gaussian(1.0)),
    Poisson(0.1, UnknownEvent()),
    Repeated(UnknownEvent(), 3),
    Composed([Gaussian(1.0), UnknownEvent()]),
]


@pytest.mark.parametrize("adjacency", ADJACENCIES)
@pytest.mark.parametrize("event", UNKNOWN, ids=repr)
def test_unknown_events_raise_and_leave_the_accountant_as_it_was(adjacency, event):
    accountant = Accountant(adjacency).compose(Gaussian(2.0))
    before = accountant.epsilon(1e-5)
    with pytest.raises(dp_accounting.UnsupportedEventError):
        accountant.compose(event)
    assert accountant.epsilon(1e-5) == before


@pytest.mark.parametrize(
    "event", [dp_accounting.LaplaceDpEvent(1.0), Poisson(0.1, dp_accounting.LaplaceDpEvent(1.0))]
)
def test_laplace_is_not_translated_to_replace_one(event):
    with pytest.raises(dp_accounting.UnsupportedEventError):
        Accountant("replace_one").compose(event)


def test_rdp_refuses_truncation_rather_than_approximating():
    with pytest.raises(dp_accounting.UnsupportedEventError):
        Accountant("add_remove", "rdp").compose(Truncated(1000, 0.1, 120, 1.0))


def test_words_that_are_not_allowed():
    with pytest.raises(ValueError, match="adjacency='zero_out'"):
        Accountant("zero_out")
    with pytest.raises(ValueError, match=r"method='moments': .*'pld', 'rdp'"):
        Accountant("add_remove", "moments")
    with pytest.raises(ValueError, match=r"method='rdp': .*add_remove"):
        Accountant("replace_one", "rdp")


@pytest.mark.parametrize("event", [1.0, None, "GaussianDpEvent(1.0)", Gaussian])
def test_something_that_is_no_event(event):
    with pytest.raises(ValueError, match="a DpEvent is needed"):
        Accountant("add_remove").compose(event)


@pytest.mark.parametrize("count", [-1, 1.0, True, None])
def test_counts_that_are_not_allowed(count):
    with pytest.raises(ValueError, match="count="):
        Accountant("add_remove").compose(Gaussian(1.0), count)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, 2.0, float("nan"), "1e-5", None])
def test_deltas_that_are_not_allowed(delta):
    with pytest.raises(ValueError, match="delta="):
        Accountant("add_remove").compose(Gaussian(1.0)).epsilon(delta)


@pytest.mark.parametrize("epsilon", [0.0, -1.0, float("nan"), float("inf"), None])
def test_epsilons_that_are_not_allowed(epsilon):
    with pytest.raises(ValueError, match="epsilon="):
        Accountant("add_remove").compose(Gaussian(1.0)).delta(epsilon)


# --- what reports use ------------------------------------------------------------------


@pytest.mark.parametrize("adjacency", ADJACENCIES)
def test_the_curve_is_increasing_and_is_the_accountants(adjacency):
    event, steps = Poisson(0.05, Gaussian(1.1)), [0, 1, 2, 5, 40]
    curve = epsilon_curve(event, steps, delta=1e-5, adjacency=adjacency)
    assert curve[0] == 0.0
    assert all(a < b for a, b in itertools.pairwise(curve))
    for n, epsilon in zip(steps[1:], curve[1:], strict=True):
        assert epsilon == Accountant(adjacency).compose(event, n).epsilon(1e-5)


def test_names():
    assert "privacy loss distributions" in Accountant("add_remove").name
    assert "Rényi" in Accountant("add_remove", "rdp").name
    assert dpfa_jax.Accountant is Accountant
