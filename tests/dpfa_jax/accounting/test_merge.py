"""Many kinds of events counted as few: never less than what was released, and fast."""

import math
import time

import dp_accounting
import pytest
from dp_accounting import pld
from hypothesis import given
from hypothesis import strategies as st

from dpfa_jax.accounting import Accountant
from dpfa_jax.accounting.merge import MOST_KINDS, merge_sampled, sampled_kinds, wide_interval
from dpfa_jax.accounting.totals import FixedTotal

GAUSSIAN = dp_accounting.GaussianDpEvent
DELTA = 1e-6


def step(q, z):
    return dp_accounting.PoissonSampledDpEvent(q, GAUSSIAN(z))


def truncated(z, q=0.01):
    return dp_accounting.TruncatedSubsampledGaussianDpEvent(1000, q, 30, z)


def epsilon(counts, adjacency="add_remove", **options):
    accountant = Accountant(adjacency, **options)
    for event, n in counts.items():
        accountant.compose(event, n)
    return accountant.epsilon(DELTA)


@given(st.dictionaries(st.floats(0.3, 20.0), st.integers(1, 1000), min_size=1, max_size=80))
def test_with_one_probability_no_noise_is_overstated(kinds):
    """Below every level of noise the merged events are at least as many: they dominate."""
    merged = merge_sampled({step(0.01, z): n for z, n in kinds.items()})
    assert len(merged) <= 16
    for level in kinds:
        released = sum(n for z, n in kinds.items() if z <= level)
        counted = sum(n for e, n in merged.items() if e.event.noise_multiplier <= level)
        assert counted >= released
    assert sum(merged.values()) == sum(kinds.values())


@given(
    st.dictionaries(
        st.tuples(st.floats(1e-4, 1.0), st.floats(0.3, 20.0)), st.integers(1, 1000), min_size=1,
        max_size=60,
    )
)  # fmt: skip
def test_every_kind_is_below_one_that_is_counted(kinds):
    merged = merge_sampled({step(q, z): n for (q, z), n in kinds.items()})
    assert sum(merged.values()) == sum(kinds.values())
    for q, z in kinds:
        assert any(e.sampling_probability >= q and e.event.noise_multiplier <= z for e in merged)
    # Every corner is made of probabilities and multipliers that were there.
    assert {e.sampling_probability for e in merged} <= {q for q, _ in kinds}


def test_few_kinds_are_left_as_they_are():
    counts = {step(0.01, 1.0): 5, step(0.2, 3.0): 1, GAUSSIAN(4.0): 2, truncated(1.0): 3}
    assert merge_sampled(counts) == counts


def test_other_events_are_kept_and_truncated_ones_merged_within_their_numbers():
    counts = {truncated(1 + i / 100): 1 for i in range(50)}
    counts |= {truncated(1 + i / 100, 0.02): 2 for i in range(50)}
    counts |= {GAUSSIAN(9.0): 7, dp_accounting.NonPrivateDpEvent(): 1}
    merged = merge_sampled(counts)
    assert sampled_kinds(merged) <= 17
    assert merged[GAUSSIAN(9.0)] == 7
    assert merged[dp_accounting.NonPrivateDpEvent()] == 1
    for q, number in ((0.01, 50), (0.02, 100)):
        group = [(e, n) for e, n in merged.items() if getattr(e, "sampling_probability", 0) == q]
        assert sum(n for _, n in group) == number
        assert min(e.noise_multiplier for e, _ in group) == 1.0


# Adjacency, events, by how much the merged answer may exceed the exact one.
CASES = {
    "falling noise": ("add_remove", {step(0.01, 2.0 - i / 15): 40 for i in range(12)}, 1.2),
    "one dear kind": ("add_remove", {step(0.01, 1.0): 1000} | {
        step(0.01, 3.0 + i / 9): 1 for i in range(12)}, 1.2),
    "probabilities": ("add_remove", {step(0.01 + i / 1000, 1.5 + i / 10): 40 for i in range(12)},
                      1.2),
    "replace_one": ("replace_one", {step(0.01, 1.5 + i / 20): 40 for i in range(12)}, 1.2),
    "with Gaussians": ("add_remove", {step(0.01, 1.5 + i / 20): 40 for i in range(12)} | {
        GAUSSIAN(20.0): 9}, 1.2),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_answer_is_an_upper_bound_and_near(name):
    adjacency, counts, most = CASES[name]
    exact = epsilon(counts, adjacency, most_kinds=100, interval=5e-4)
    found = epsilon(counts, adjacency, most_kinds=5, interval=5e-4)
    assert exact * (1 - 1e-6) <= found <= most * exact


def test_one_kind_is_the_dearest_corner():
    counts = {step(0.02, 3.0): 5, step(0.01, 2.0): 7}
    assert merge_sampled(counts, 1) == {step(0.02, 2.0): 12}


@pytest.mark.parametrize("most", [0, -1, 2.0, True])
def test_numbers_of_kinds_that_are_not_allowed(most):
    with pytest.raises(ValueError, match="most_kinds="):
        Accountant("add_remove", most_kinds=most)


def test_the_name_says_that_kinds_were_merged():
    accountant = Accountant("add_remove", most_kinds=2)
    for i in range(3):
        assert "bounded" not in accountant.name
        accountant.compose(step(0.01, 1.0 + i))
    assert "3 kinds of events, bounded by fewer" in accountant.name


def test_wide_bins_suit_the_losses():
    assert wide_interval({step(0.01, 0.8): 1}, 1e-4) == 1e-3
    assert wide_interval({step(0.001, 5.0): 1}, 1e-4) == 1e-4
    assert wide_interval({step(0.01, 0.8): 1}, 5e-3) == 5e-3
    assert wide_interval({GAUSSIAN(1.0): 1}, 1e-4) == 1e-4


@pytest.mark.parametrize("adjacency", ["add_remove", "replace_one"])
def test_many_repetitions_compose_as_the_package_does(adjacency):
    ours = Accountant(adjacency, interval=1e-3).compose(step(0.01, 2.0), 12_000)
    is_replace = adjacency == "replace_one"
    relation = dp_accounting.NeighboringRelation
    theirs = pld.PLDAccountant(
        relation.REPLACE_ONE if is_replace else relation.ADD_OR_REMOVE_ONE, 1e-3
    ).compose(step(0.01, 4.0 if is_replace else 2.0), 12_000)
    for delta in (1e-12, 1e-3):
        assert ours.epsilon(delta) == pytest.approx(theirs.get_epsilon(delta), rel=1e-6)


def test_many_repetitions_without_privacy_are_infinite():
    accountant = Accountant("add_remove").compose(step(0.01, 0.0), 20_000)
    assert accountant.epsilon(DELTA) == math.inf


@pytest.mark.parametrize("different", ["Gaussians", "sampled"])
def test_a_million_equal_and_ten_thousand_different_events_answer_at_once(different):
    """CPU time: other work on the machine does not count. `dpfa bench ledger` has the figures."""
    make = (lambda z: GAUSSIAN(200 * z)) if different == "Gaussians" else lambda z: step(0.001, z)
    event = dp_accounting.ComposedDpEvent([
        dp_accounting.SelfComposedDpEvent(step(0.001, 5.0), 10**6),
        *(make(5.0 + i / 1000) for i in range(1, 10**4 + 1)),
    ])  # fmt: skip
    before = time.process_time()
    found = Accountant("add_remove").compose(event).epsilon(DELTA)
    assert time.process_time() - before < 1.0
    alone = Accountant("add_remove").compose(step(0.001, 5.0), 10**6).epsilon(DELTA)
    assert alone < found < 1.1 * alone


class TestInALedgersTotal:
    def test_more_kinds_than_that_are_bounded_by_few(self):
        """Near the limit the merged bound lets more through than Rényi's alone would."""
        total = FixedTotal("add_remove", DELTA)
        kinds = [(step(0.01, 1.0 + i / 100), 3) for i in range(MOST_KINDS + 10)]
        total.add(kinds)
        spent = total.epsilon()
        assert spent == pytest.approx(epsilon(dict(kinds)), rel=0.02)
        more = [(step(0.01, 9.0), 1)]
        assert total.fits(more, total.epsilon(more))
        assert not total.fits(more, total.epsilon(more) * (1 - 1e-6))

    def test_what_fitted_is_never_reported_as_more(self):
        """`dpfa budget verify` asks again; so does every process that reads the record."""
        total, refused = FixedTotal("add_remove", DELTA), 0
        total.add([(step(3e-4, 3.0 + i / 10), 20_000) for i in range(MOST_KINDS - 1)])
        limit = 1.3 * total.epsilon()
        for i in range(5):
            added = [(step(3e-4, 2.0 + i / 10), 20_000)]
            if total.fits(added, limit):
                total.add(added)
                assert total.epsilon() <= limit
            else:
                refused += 1
        assert 0 < refused < 5
