"""Rényi costs against closed forms and integration; the filter against simulated adversaries."""

import math

import dp_accounting
import numpy as np
import pytest
import scipy.integrate
import scipy.stats
from dp_accounting import rdp

from dpfa_jax import Accountant
from dpfa_jax.accounting.renyi import (
    FIXED_ORDERS,
    Orders,
    RenyiCost,
    fixed_epsilon,
    nothing,
    renyi_cost,
)
from dpfa_jax.accounting.totals import FixedTotal

Gaussian = dp_accounting.GaussianDpEvent
Poisson = dp_accounting.PoissonSampledDpEvent
Truncated = dp_accounting.TruncatedSubsampledGaussianDpEvent
ORDERS = (1.5, 3.0, 8.0, 20.0)


def divergence(p, q, alpha, reach):
    """log ∫ p^α q^(1−α) / (α − 1) by quadrature."""
    log = lambda x: alpha * p(x) + (1 - alpha) * q(x)  # noqa: E731
    grid = np.linspace(-reach, reach, 400_001)
    top = max(log(grid))
    value = scipy.integrate.trapezoid(np.exp(log(grid) - top), grid)
    return (math.log(value) + top) / (alpha - 1)


@pytest.mark.parametrize("adjacency", ["add_remove", "replace_one"])
@pytest.mark.parametrize("z", [0.7, 3.0, 50.0])
def test_gaussian(adjacency, z):
    cost = renyi_cost(Gaussian(z), adjacency, ORDERS)
    assert cost.rho == pytest.approx(np.array(ORDERS) / (2 * z * z), rel=1e-8)
    assert cost.delta == 0


@pytest.mark.parametrize(("q", "z"), [(0.01, 1.0), (0.2, 2.0), (0.9, 4.0)])
def test_sampled_gaussian_under_replace_one(q, z):
    """Only its privacy loss distribution is known here; s = σ/C = 2z."""
    s, norm = 2 * z, scipy.stats.norm.logpdf

    def mixture(sign):
        return lambda x: np.logaddexp(
            math.log1p(-q) + norm(x, 0, s), math.log(q) + norm(x, sign, s)
        )

    cost = renyi_cost(Poisson(q, Gaussian(z)), "replace_one", ORDERS)
    exact = [divergence(mixture(1), mixture(-1), a, 30 * s) for a in ORDERS]
    # Without the tail that counts as δ₀; the rest never below the truth by more than it.
    assert 0 < cost.delta < 1e-12
    for found, true in zip(cost.rho, exact, strict=True):
        assert true * (1 - 1e-4) <= found <= true * 1.02 + 1e-9


@pytest.mark.parametrize(("q", "z"), [(0.05, 1.0), (0.3, 2.0)])
def test_the_distribution_and_the_formula_agree(q, z):
    """Truncated where nothing is truncated, by PLD, is plain Poisson sampling, by formula."""
    orders = (2.0, 3.0, 8.0, 16.0)
    plain = renyi_cost(Poisson(q, Gaussian(z)), "add_remove", orders)
    truncated = renyi_cost(Truncated(100, q, 99, z), "add_remove", orders)
    assert plain.delta == 0 < truncated.delta < 1e-12
    for order, found, true in zip(orders, truncated.rho, plain.rho, strict=True):
        assert found <= 1.001 * true
        # High orders are the tail's, which counts as δ₀ here.
        assert order > 3 or found >= true * (1 - 1e-6)


@pytest.mark.parametrize("q", [1e-6, 1e-3, 0.2, 0.999])
@pytest.mark.parametrize("z", [0.02, 0.3, 1.0, 40.0])
def test_the_fast_sum_is_the_packages(q, z):
    """Where the package's loses digits, near zero, it may be below ours by its rounding."""
    orders = (2.0, 3.0, 12.0, 64.0, 512.0)
    ours = renyi_cost(Poisson(q, Gaussian(z)), "add_remove", orders)
    theirs = rdp.RdpAccountant(list(orders)).compose(Poisson(q, Gaussian(z))).rdp
    assert ours.delta == 0
    np.testing.assert_allclose(ours.rho, theirs, rtol=1e-7, atol=1e-14)


def test_the_fast_sum_keeps_its_digits_where_little_is_spent():
    """A − 1 is about q²(e^(1/z²) − 1) = q²/z² at order 2, far below the rounding of A itself."""
    cost = renyi_cost(Poisson(1e-7, Gaussian(100.0)), "add_remove", (2.0, 3.0))
    assert cost.rho[0] == pytest.approx(1e-14 * math.expm1(1e-4), rel=1e-8, abs=0)


@pytest.mark.parametrize("adjacency", ["add_remove", "replace_one"])
def test_no_noise_costs_everything(adjacency):
    for event in (Gaussian(0.0), dp_accounting.NonPrivateDpEvent()):
        cost = renyi_cost(event, adjacency, ORDERS)
        assert np.isinf(cost.rho).all()
        orders = Orders.for_budget(1.0, 1e-5)
        all_of_it = renyi_cost(event, adjacency, orders.alphas)
        assert orders.epsilon(all_of_it, 1e-5) == math.inf


def test_an_event_that_nobody_has():
    with pytest.raises(dp_accounting.UnsupportedEventError):
        renyi_cost(dp_accounting.UnsupportedDpEvent(), "add_remove", ORDERS)


@pytest.mark.parametrize("adjacency", ["add_remove", "replace_one"])
def test_the_bound_for_fixed_events_is_a_bound(adjacency):
    for event, count in (
        (Gaussian(3.0), 4),
        (Poisson(0.02, Gaussian(1.0)), 300),
        (Truncated(500, 0.1, 80, 2.0), 40),
    ):
        tight = Accountant(adjacency).compose(event, count).epsilon(1e-6)
        cost = nothing(FIXED_ORDERS).plus(renyi_cost(event, adjacency, FIXED_ORDERS), count)
        assert tight <= fixed_epsilon(cost, 1e-6) <= 1.5 * tight + 0.05


def test_delta_that_is_used_up():
    orders = Orders.for_budget(1.0, 1e-5)
    assert orders.epsilon(RenyiCost(np.zeros(5), 2e-5), 1e-5) == math.inf
    assert fixed_epsilon(RenyiCost(np.zeros(len(FIXED_ORDERS)), 2e-5), 1e-5) == math.inf


def test_deltas_add_up():
    """Of 40 releases that each fail with probability 10⁻⁷, together and one by one."""
    one = RenyiCost(np.ones(5), 1e-7)
    assert nothing(tuple(range(2, 7))).plus(one, 40).delta == pytest.approx(4e-6)
    assert one.plus(one).plus(one, 3).delta == pytest.approx(5e-7)
    # Truncated sampling is such an event: four times the batches, four times the δ.
    orders = FIXED_ORDERS
    deltas = [
        nothing(orders)
        .plus(renyi_cost(Truncated(500, 0.1, 80, 2.0), "add_remove", orders), n)
        .delta
        for n in (10, 40)
    ]
    assert deltas[0] > 0
    assert deltas[1] == pytest.approx(4 * deltas[0])


@pytest.mark.parametrize("epsilon", [0.5, 2.0, 8.0])
def test_orders_are_the_best_for_gaussians(epsilon):
    delta = 1e-6
    orders = Orders.for_budget(epsilon, delta)
    assert sum(orders.shares) == pytest.approx(1)

    def may_spend(alpha):
        cost = RenyiCost(np.full(5, 1e-12), 0.0)
        offset = Orders((alpha,) * 5, (0.5, 1e-9, 1e-9, 1e-9, 1e-9)).epsilon(cost, delta)
        return (epsilon - offset) / alpha

    best = max(may_spend(a) for a in np.linspace(1.02, 300, 3000))
    assert may_spend(orders.alphas[0]) == pytest.approx(best, rel=0.02)  # rounded


def test_an_adaptive_adversary_never_passes_the_filter():
    """Gaussian releases on the worst pair, each multiplier chosen by looking at the losses.

    The adversary raises the stakes while the privacy loss is high and saves while it is low, until
    the filter stops it. The mean of max(0, 1 − exp(ε − loss)) must be at most δ. With δ = 0.01 and
    20,000 paths of values in [0, 1] it passes 0.014 with probability below 1e-6 if it is δ
    (Chernoff: exp(−20,000·KL(0.014, 0.01))). Seeded.
    """
    rng, delta, epsilon, paths = np.random.default_rng(7), 0.01, 2.0, 20_000
    orders = Orders.for_budget(epsilon, delta)
    alphas = np.array(orders.alphas)
    # What the filter adds to each order, asked of itself with next to no cost.
    tiny = [RenyiCost(np.where(np.arange(5) == i, 1e-12, 1e9), 0.0) for i in range(5)]
    offsets = np.array([orders.epsilon(cost, delta) for cost in tiny])
    assert (offsets > 0).all()
    loss, rho, going = np.zeros(paths), np.zeros((paths, 5)), np.ones(paths, bool)
    for _ in range(60):
        mu = np.where(loss > 1.0, 0.5, 0.25)  # 1/z
        new = rho + alphas * mu[:, None] ** 2 / 2
        limit = (new + offsets).min(axis=1)
        going &= limit <= epsilon
        step = mu**2 / 2 + mu * rng.normal(size=paths)
        loss = np.where(going, loss + step, loss)
        rho = np.where(going[:, None], new, rho)
    assert not going.any()  # everybody was stopped
    assert np.maximum(0, 1 - np.exp(epsilon - loss)).mean() < 0.014
    # And it has teeth: a claim of half of ε would be seen through.
    assert np.maximum(0, 1 - np.exp(0.5 * epsilon - loss)).mean() > 0.014


# --- totals ----------------------------------------------------------------------------


def test_totals_decide_as_the_accountant():
    events = [(Gaussian(6.0), 3), (Poisson(0.1, Gaussian(2.0)), 20), (Gaussian(9.0), 1)]
    total, accountant = FixedTotal("add_remove", 1e-6), Accountant("add_remove")
    for event, count in events:
        after = accountant.compose(event, count).epsilon(1e-6)
        assert not total.fits([(event, count)], 0.999 * after)
        assert total.fits([(event, count)], 1.001 * after)
        total.add([(event, count)])
        assert total.epsilon() <= total.epsilon(fine=False)
        assert total.epsilon() == pytest.approx(after, rel=1e-9)


def test_a_certificate_holds_for_its_limit_only():
    total = FixedTotal("add_remove", 1e-6)
    assert total.fits([(Gaussian(2.0), 1)], 2.4)
    assert not total.fits([(Gaussian(2.0), 1)], 2.0)


def test_too_many_kinds_fall_back_to_an_upper_bound():
    events = [(Poisson(0.01, Gaussian(1.0 + i / 100)), 1) for i in range(80)]
    total, accountant = FixedTotal("add_remove", 1e-6), Accountant("add_remove", interval=1e-3)
    total.add(events)
    for event, count in events:
        accountant.compose(event, count)
    tight = accountant.epsilon(1e-6)
    assert tight <= total.epsilon() <= 2 * tight + 0.2
    assert not total.fits([(Gaussian(1.0), 1)], tight)


def test_auto_uses_renyi_where_pld_lacks_the_event():
    zcdp = dp_accounting.ZCDpEvent(0.02)
    with pytest.raises(dp_accounting.UnsupportedEventError):
        Accountant("add_remove", "pld").compose(zcdp)
    mixed = Accountant("add_remove").compose(Gaussian(9.0)).compose(zcdp)
    assert (mixed.method, "Rényi" in mixed.name) == ("rdp", True)
    # ρ-zCDP has the Rényi curve of a Gaussian with 1/z² = 2ρ.
    same = Accountant("add_remove", "rdp").compose(Gaussian(9.0)).compose(Gaussian(5.0))
    assert mixed.epsilon(1e-5) == pytest.approx(same.epsilon(1e-5), rel=1e-6)
    # An event that only PLD has, with one that it lacks.
    before = mixed.epsilon(1e-5)
    mixed.compose(Truncated(100, 0.1, 99, 2.0))
    same.compose(Poisson(0.1, Gaussian(2.0)))
    assert before < mixed.epsilon(1e-5) == pytest.approx(same.epsilon(1e-5), rel=0.02)
    assert same.delta(1.0) * 0.99 <= mixed.delta(1.0) <= 1.2 * same.delta(1.0)
    with pytest.raises(dp_accounting.UnsupportedEventError):
        Accountant("replace_one").compose(zcdp)
