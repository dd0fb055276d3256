"""Sampling of users: all of a user's capped examples join, or none."""

import math

import dp_accounting
import jax
import numpy as np
import pytest
import scipy.stats

import dpfa_jax
from dpfa_jax import PoissonSampler, UserSampler, keys

FALSE_ALARM = 1e-6
KEY = keys.reproducible_key(0)


@pytest.fixture(autouse=True)
def _compare_under_equal_noise():
    with keys.allow_reuse_for_tests():
        yield


def ragged(users=40, most=9, seed=0):
    """Examples of users with 1 to ``most`` examples each, interleaved; ids are not 0..n."""
    rng = np.random.default_rng(seed)
    ids = rng.permutation(10_000)[:users] - 5_000
    return rng.permutation(np.repeat(ids, rng.integers(1, most + 1, users)))


def make(owner, cap, q=1.0, batch_size=None, seed=0):
    return UserSampler(
        owner,
        max_examples_per_user=cap,
        sampling_probability=q,
        batch_size=batch_size or np.unique(owner).size,
        rng=keys.reproducible_key(seed),
    )


def rows(batch):
    """The example numbers of each real row, padding slots left out."""
    return [
        row[~missing].tolist()
        for row, missing, padded in zip(
            batch.examples, batch.is_padding_slot, batch.is_padding_example, strict=True
        )
        if not padded
    ]


@pytest.mark.parametrize("cap", [1, 2, 5, 9, 30])
def test_each_user_keeps_their_first_examples(cap):
    owner = ragged()
    expected = {
        user: np.flatnonzero(owner == user)[:cap].tolist() for user in np.unique(owner).tolist()
    }
    got = rows(make(owner, cap).sample(0))
    assert len(got) == len(expected)
    for row in got:
        assert expected.pop(int(owner[row[0]])) == row
    assert not expected


def test_the_cap_holds_for_the_heaviest_user():
    owner = np.array([3] * 1000 + [5, 6])
    s = make(owner, 4)
    assert s.population == 3
    assert rows(s.sample(0)) == [[0, 1, 2, 3], [1000], [1001]]


@pytest.mark.parametrize("q", [0.2, 0.7])
def test_all_or_nothing(q):
    owner = ragged()
    whole = {tuple(row) for row in rows(make(owner, 5).sample(0))}
    s = make(owner, 5, q=q)
    for i in range(50):
        got = rows(s.sample(i))
        assert {tuple(row) for row in got} <= whole  # a user's row is never cut
        examples = [e for row in got for e in row]
        assert len(set(examples)) == len(examples)
        users = [int(owner[row[0]]) for row in got]
        assert len(set(users)) == len(users)
        for row, user in zip(got, users, strict=True):
            assert (owner[row] == user).all()


def test_users_join_with_probability_q_however_many_examples_they_have():
    owner = np.array([0] * 50 + [1] + [2] * 5 + [3] * 2)
    steps, q = 2000, 0.4
    s = make(owner, 3, q=q)
    counts = np.zeros(4)
    for i in range(steps):
        for row in rows(s.sample(i)):
            counts[owner[row[0]]] += 1
    low, high = scipy.stats.binom.ppf([FALSE_ALARM / 8, 1 - FALSE_ALARM / 8], steps, q)
    assert (low <= counts).all()
    assert (counts <= high).all()


def test_padding():
    owner = ragged(users=12)
    s = make(owner, 4, q=0.5, batch_size=20)
    for i in range(20):
        batch = s.sample(i)
        assert batch.examples.shape == batch.is_padding_slot.shape == (20, 4)
        assert batch.examples.dtype == np.int32
        assert batch.is_padding_example.shape == (20,)
        assert batch.is_padding_slot.dtype == batch.is_padding_example.dtype == bool
        assert batch.is_padding_slot[batch.is_padding_example].all()
        # A row that is not padding has a first example, and its padding stands behind.
        real = ~batch.is_padding_example
        assert not batch.is_padding_slot[real, 0].any()
        assert (np.diff(batch.is_padding_slot[real].astype(int), axis=1) >= 0).all()
        assert (batch.examples[batch.is_padding_slot] == 0).all()


def test_truncation_drops_whole_users():
    owner = ragged(users=10)
    s = make(owner, 3, q=1.0, batch_size=4)
    whole = {tuple(row) for row in rows(make(owner, 3).sample(0))}
    kept = np.zeros(10)
    ids = np.unique(owner).tolist()
    for i in range(1000):
        got = rows(s.sample(i))
        assert len(got) == 4
        assert {tuple(row) for row in got} <= whole
        for row in got:
            kept[ids.index(int(owner[row[0]]))] += 1
    z = (kept - 400) / math.sqrt(1000 * 0.4 * 0.6)
    assert np.abs(z).max() < scipy.stats.norm.isf(FALSE_ALARM / 20)


def test_it_draws_the_users_that_a_poisson_sampler_draws():
    owner = np.repeat(np.arange(30), 2)
    users = PoissonSampler(30, 0.4, 30, keys.reproducible_key(0))
    s = make(owner, 2, q=0.4)
    for i in range(10):
        expected = users.sample(i)
        batch = s.sample(i)
        np.testing.assert_array_equal(batch.is_padding_example, expected.is_padding_example)
        real = ~expected.is_padding_example
        np.testing.assert_array_equal(batch.examples[real, 0], 2 * expected.indices[real])


def test_same_number_same_batch():
    owner = ragged()
    a, b = make(owner, 3, q=0.5), make(owner, 3, q=0.5)
    for i in (2, 0, 2):
        for x, y in zip(a.sample(i), b.sample(i), strict=True):
            np.testing.assert_array_equal(x, y)
    assert rows(a.sample(0)) != rows(a.sample(1))
    assert rows(a.sample(0)) != rows(make(owner, 3, q=0.5, seed=1).sample(0))


def test_the_record_of_the_event_is_the_user():
    owner = np.repeat(np.arange(50), 20)
    assert make(owner, 5, q=0.3).population == 50
    assert make(owner, 5, q=0.3).event(1.5) == dp_accounting.PoissonSampledDpEvent(
        0.3, dp_accounting.GaussianDpEvent(1.5)
    )
    assert make(owner, 5, q=0.3, batch_size=25).event(1.5) == (
        dp_accounting.TruncatedSubsampledGaussianDpEvent(
            dataset_size=51,  # the larger of two neighbours
            sampling_probability=0.3,
            truncated_batch_size=25,
            noise_multiplier=1.5,
        )
    )


def test_one_user():
    assert rows(make([9, 9, 9], 2).sample(0)) == [[0, 1]]


@pytest.mark.parametrize("bad", [0, -1, 2.0, True, None])
def test_caps_that_are_not_allowed(bad):
    with pytest.raises(ValueError, match="max_examples_per_user="):
        make(np.arange(3), bad, batch_size=3)


@pytest.mark.parametrize(
    "owner",
    [[], np.zeros((2, 2), int), [0.0, 1.0], [True, False], ["a", "b"], 3],
    ids=["empty", "two axes", "float", "bool", "text", "scalar"],
)
def test_owners_that_are_not_allowed(owner):
    with pytest.raises(ValueError, match=r"user_of_example is .*integers \[n\]"):
        make(owner, 2, batch_size=2)


def test_the_rest_is_refused_by_name():
    owner = np.arange(5)
    with pytest.raises(ValueError, match="sampling_probability="):
        make(owner, 2, q=1.5)
    with pytest.raises(ValueError, match="batch_size="):
        make(owner, 2, batch_size=-1)
    with pytest.raises(ValueError, match="index="):
        make(owner, 2).sample(-1)
    for rng in (None, jax.random.key(0)):
        with pytest.raises(ValueError, match="rng"):
            UserSampler(
                owner,
                max_examples_per_user=1,
                sampling_probability=0.5,
                batch_size=5,
                rng=rng,
            )


def test_the_public_name():
    assert dpfa_jax.UserSampler is UserSampler
