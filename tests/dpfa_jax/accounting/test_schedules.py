"""Both kinds of schedule end within the total."""

import math

import dp_accounting
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpfa_jax import Accountant, Ledger
from dpfa_jax.accounting.renyi import Orders
from dpfa_jax.accounting.schedules import AdaptiveSchedule, planned_multipliers

Gaussian = dp_accounting.GaussianDpEvent
TOTAL = {"epsilon": 2.0, "delta": 1e-6, "adjacency": "add_remove"}


def constant(alpha):
    """log of the largest (1 − e^(−x))·e^(−(α−1)x) over x > 0, by search."""
    x = np.linspace(1e-6, 20, 2_000_001)
    return float(np.max(np.log1p(-np.exp(-x)) - (alpha - 1) * x))


def step(z):
    return dp_accounting.PoissonSampledDpEvent(0.1, Gaussian(z))


def test_a_planned_schedule_meets_the_total():
    factors = [1.25] * 20 + [0.75] * 10
    multipliers = planned_multipliers(step, factors, **TOTAL)
    accountant = Accountant("add_remove")
    for z in multipliers:
        accountant.compose(step(z))
    assert 0.99 * 2.0 < accountant.epsilon(1e-6) <= 2.0
    assert [z / multipliers[0] * 1.25 for z in multipliers] == pytest.approx(factors)


@settings(max_examples=40, deadline=None)
@given(
    statistics=st.lists(st.one_of(st.none(), st.floats(0, 1)), min_size=80, max_size=80),
    ladder=st.lists(st.floats(2.0, 30.0), min_size=1, max_size=5, unique=True),
)
def test_whatever_the_statistic_says_the_filter_holds(statistics, ladder):
    ladder = sorted(ladder, reverse=True)
    schedule = AdaptiveSchedule(Gaussian, ladder, threshold=0.5, **TOTAL)
    taken = []
    for statistic in statistics:
        z = schedule.next(statistic)
        if z is None:
            break
        assert z in ladder
        taken.append(z)
    # Recomputed from the definition: ρ = α/(2z²) each.
    orders = Orders.for_budget(2.0, 1e-6)
    if taken:
        rho = sum(1 / (2 * z * z) for z in taken)
        total = min(
            a * rho + (math.log(1 / (share * 1e-6)) + constant(a)) / (a - 1)
            for a, share in zip(orders.alphas, orders.shares, strict=True)
        )
        assert schedule.epsilon == pytest.approx(total, rel=1e-4)
        assert total <= 2.0
        fixed = Accountant("add_remove")
        for z in taken:
            fixed.compose(Gaussian(z))
        assert fixed.epsilon(1e-6) <= 2.0
    assert len(taken) == 80 or schedule.next(None) is None


def test_it_goes_down_and_gives_way_at_the_end():
    schedule = AdaptiveSchedule(Gaussian, [40.0, 20.0, 4.0], threshold=0.5, **TOTAL)
    found = []
    while (z := schedule.next(0.0)) is not None:
        found.append(z)
    assert found[:2] == [20.0, 4.0]
    assert found[-1] == 40.0  # the rest is spent with more noise
    assert 1.9 < schedule.epsilon <= 2.0


def test_the_ledger_agrees_with_the_schedule(tmp_path):
    """Charged to an adaptive budget of the same total, every block fits."""
    schedule = AdaptiveSchedule(step, [3.0, 1.5], threshold=0.5, **TOTAL)
    ledger = Ledger(tmp_path / "l.sqlite")
    ledger.open_budget("s", composition="adaptive", unit="user", **TOTAL)
    for i in range(200):
        z = schedule.next(0.6 if i < 10 else 0.1)
        if z is None:
            break
        assert ledger.charge("s", str(i), step(z))
    assert ledger.spent("s") == pytest.approx(schedule.epsilon)
    assert ledger.spent("s") <= 2.0


@pytest.mark.parametrize("ladder", [[], [1.0, 2.0], [2.0, 2.0], [1.0, 0.0]])
def test_ladders_that_are_none(ladder):
    with pytest.raises(ValueError, match="ladder="):
        AdaptiveSchedule(Gaussian, ladder, threshold=0.5, **TOTAL)


@pytest.mark.parametrize("factors", [[], [0.0], [1.0, -1.0], [float("nan")]])
def test_factors_that_are_none(factors):
    with pytest.raises(ValueError, match="factors="):
        planned_multipliers(Gaussian, factors, **TOTAL)
