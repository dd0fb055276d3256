"""Poisson sampling: the statistics that amplification counts on, and the padding.

Each statistical test has a false-alarm rate below 1e-6; keys are fixed.
"""

import inspect
import math

import dp_accounting
import jax
import numpy as np
import pytest
import scipy.stats

import dpfa_jax
from dpfa_jax import PoissonSampler, SecureKey, keys
from dpfa_jax.sampling import padded_batch_size

KEY = keys.reproducible_key(0)
FALSE_ALARM = 1e-6


@pytest.fixture(autouse=True)
def _compare_under_equal_noise():
    with keys.allow_reuse_for_tests():
        yield


def sampler(population, q, batch_size=None, seed=0):
    return PoissonSampler(population, q, batch_size or population, keys.reproducible_key(seed))


def membership(s, steps):
    """bool[steps, population]: who is in which batch."""
    out = np.zeros((steps, s.population), bool)
    for i in range(steps):
        batch = s.sample(i)
        out[i, batch.indices[~batch.is_padding_example]] = True
    return out


def largest_normal(comparisons):
    """|z| that so many independent standard normals pass with probability 1e-6."""
    return scipy.stats.norm.isf(FALSE_ALARM / (2 * comparisons))


@pytest.fixture(scope="module")
def members():
    # Made before the fixture of each test: another test may have used the key.
    with keys.allow_reuse_for_tests():
        return membership(sampler(60, 0.3), 3000)


# --- who joins -------------------------------------------------------------------------


def test_each_record_joins_with_probability_q(members):
    steps, population = members.shape
    low, high = scipy.stats.binom.ppf(
        [FALSE_ALARM / (2 * population), 1 - FALSE_ALARM / (2 * population)], steps, 0.3
    )
    counts = members.sum(0)
    assert low <= counts.min()
    assert counts.max() <= high


def test_batch_sizes_are_binomial(members):
    """Chi-square over the sizes; those expected fewer than ten times are pooled."""
    steps, population = members.shape
    expected = steps * scipy.stats.binom.pmf(np.arange(population + 1), population, 0.3)
    observed = np.bincount(members.sum(1), minlength=population + 1)
    low, high = np.flatnonzero(expected >= 10)[[0, -1]]

    def pooled(x):
        return np.array([x[:low].sum(), *x[low : high + 1], x[high + 1 :].sum()])

    assert scipy.stats.chisquare(pooled(observed), pooled(expected)).pvalue > FALSE_ALARM


def test_records_are_independent_of_each_other(members):
    steps, population = members.shape
    z = (members - 0.3) / math.sqrt(0.21)
    correlation = (z.T @ z) / math.sqrt(steps)
    pairs = correlation[np.triu_indices(population, 1)]
    assert np.abs(pairs).max() < largest_normal(pairs.size)
    # All pairs together: dependence that is weak and everywhere.
    assert abs(pairs.sum()) / math.sqrt(pairs.size) < largest_normal(1)


def test_steps_are_independent_of_each_other(members):
    z = (members - 0.3) / math.sqrt(0.21)
    for lag in (1, 2, 3, 16, 256):
        products = z[lag:] * z[:-lag]
        per_record = products.sum(0) / math.sqrt(products.shape[0])
        assert np.abs(per_record).max() < largest_normal(per_record.size)
        assert abs(per_record.sum()) / math.sqrt(per_record.size) < largest_normal(1)
    # Also against a neighbour's earlier choice (a stream that is shifted, not fresh).
    for shift in (1, -1, 16):
        products = z[1:] * np.roll(z[:-1], shift, axis=1)
        assert abs(products.sum()) / math.sqrt(products.size) < largest_normal(1)


def test_the_two_ends_of_the_probability():
    full = sampler(17, 1.0)
    for i in range(3):
        batch = full.sample(i)
        np.testing.assert_array_equal(batch.indices, np.arange(17))
        assert not batch.is_padding_example.any()
    almost_never = sampler(1000, 1e-9)
    assert all(almost_never.sample(i).is_padding_example.all() for i in range(20))
    never = sampler(1000, 1e-12)  # below 2⁻³²: rounded down to never, which is private
    assert never.sample(0).is_padding_example.all()


def test_a_population_of_one():
    steps = 400
    joined = sum(
        int(not sampler_batch.is_padding_example[0])
        for sampler_batch in map(sampler(1, 0.5).sample, range(steps))
    )
    low, high = scipy.stats.binom.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], steps, 0.5)
    assert low <= joined <= high


# --- the padded batch ------------------------------------------------------------------


def test_padding_stands_behind_and_indices_are_sorted_and_unique():
    s = sampler(50, 0.2, batch_size=30)
    for i in range(50):
        batch = s.sample(i)
        assert batch.indices.shape == batch.is_padding_example.shape == (30,)
        assert batch.indices.dtype == np.int32
        assert batch.is_padding_example.dtype == bool
        count = int((~batch.is_padding_example).sum())
        assert not batch.is_padding_example[:count].any()
        assert batch.is_padding_example[count:].all()
        chosen = batch.indices[:count]
        assert (np.diff(chosen) > 0).all()
        assert ((chosen >= 0) & (chosen < 50)).all()
        assert (batch.indices[count:] == 0).all()


def test_a_batch_may_be_larger_than_the_population():
    batch = sampler(3, 1.0, batch_size=8).sample(0)
    np.testing.assert_array_equal(batch.indices[:3], [0, 1, 2])
    np.testing.assert_array_equal(batch.is_padding_example, np.arange(8) >= 3)


def test_truncation_keeps_a_uniformly_random_subset():
    population, size, steps = 12, 4, 4000
    members = membership(sampler(population, 1.0, batch_size=size), steps)
    assert (members.sum(1) == size).all()
    # Without replacement: mean n·p, and counts of all records vary together.
    p = size / population
    z = (members.sum(0) - steps * p) / math.sqrt(steps * p * (1 - p))
    assert np.abs(z).max() < largest_normal(population)
    pairs = members.T.astype(float) @ members
    p2 = p * (size - 1) / (population - 1)
    z = (pairs[np.triu_indices(population, 1)] - steps * p2) / math.sqrt(steps * p2 * (1 - p2))
    assert np.abs(z).max() < largest_normal(z.size)


def test_truncation_among_those_who_joined():
    """At q = 0.9 the kept ones are still uniform, and always among the joined."""
    population, size, steps = 12, 4, 3000
    kept = membership(sampler(population, 0.9, batch_size=size), steps)
    joined = membership(sampler(population, 0.9), steps)  # same key, no truncation
    assert not (kept & ~joined).any()
    np.testing.assert_array_equal(kept.sum(1), np.minimum(joined.sum(1), size))
    p = kept.sum() / kept.size
    z = (kept.sum(0) - steps * p) / math.sqrt(steps * p * (1 - p))
    assert np.abs(z).max() < largest_normal(population)


# --- what a batch is a function of -----------------------------------------------------


def test_the_same_number_gives_the_same_batch_in_any_order():
    first = [sampler(100, 0.3).sample(i) for i in range(5)]
    again = sampler(100, 0.3)
    for i in (3, 0, 4, 3, 1, 2):
        np.testing.assert_array_equal(again.sample(i).indices, first[i].indices)
    assert len({b.indices.tobytes() for b in first}) == 5


def test_another_key_gives_other_batches():
    a, b = (sampler(100, 0.3, seed=s).sample(0).indices for s in (0, 1))
    assert not np.array_equal(a, b)
    fresh = [PoissonSampler(100, 0.3, 100, SecureKey.generate()) for _ in range(2)]
    a, b = (s.sample(0).indices for s in fresh)
    assert not np.array_equal(a, b)


def test_sampling_and_noise_under_one_key_do_not_share_words():
    """A key is for one use; should it be used twice, the streams still differ."""
    step_key = jax.random.fold_in(KEY, 0)
    bits = np.asarray(jax.random.bits(step_key, (64,)))
    join, order = jax.random.split(step_key)
    assert not np.isin(np.asarray(jax.random.bits(join, (64,))), bits).any()
    assert not np.isin(
        np.asarray(jax.random.bits(join, (64,))), np.asarray(jax.random.bits(order, (64,)))
    ).any()


# --- the event -------------------------------------------------------------------------


def test_the_event_says_what_the_sampler_does():
    assert sampler(1000, 0.1, 160).event(1.2) == (
        dp_accounting.TruncatedSubsampledGaussianDpEvent(
            dataset_size=1001,  # the larger of two neighbours
            sampling_probability=0.1,
            truncated_batch_size=160,
            noise_multiplier=1.2,
        )
    )
    plain = dp_accounting.PoissonSampledDpEvent(0.1, dp_accounting.GaussianDpEvent(1.2))
    assert sampler(1000, 0.1, 1000).event(1.2) == plain
    assert sampler(1000, 0.1, 2000).event(1.2) == plain
    assert isinstance(
        sampler(1000, 0.1, 999).event(1.2), dp_accounting.TruncatedSubsampledGaussianDpEvent
    )


def test_there_is_nothing_to_call_for_a_shuffled_epoch():
    """Only what is accounted for can be drawn."""
    public = {name for name, _ in inspect.getmembers(PoissonSampler) if not name.startswith("_")}
    assert public == {"sample", "event"}
    assert not hasattr(PoissonSampler, "__iter__")
    assert not hasattr(PoissonSampler, "__len__")
    assert not hasattr(PoissonSampler, "__getitem__")


# --- padded_batch_size -----------------------------------------------------------------


def tail(population, q, size):
    """P(Bin(n, q) > size), summed in the logarithm of the terms: no scipy.stats."""
    log_q, log_not = math.log(q), math.log1p(-q)
    return math.fsum(
        math.exp(
            math.lgamma(population + 1)
            - math.lgamma(k + 1)
            - math.lgamma(population - k + 1)
            + k * log_q
            + (population - k) * log_not
        )
        for k in range(size + 1, population + 1)
    )


@pytest.mark.parametrize(
    ("population", "q"), [(10, 0.5), (100, 0.01), (1000, 0.1), (1085, 0.27), (50_000, 0.002)]
)
def test_overflow_is_rarer_than_one_in_a_million(population, q):
    size = padded_batch_size(population, q)
    assert size <= population
    assert tail(population, q, size) < 1e-6
    assert population * q < size
    if size < population:  # and it is not much larger than it must be
        assert tail(population, q, size - 2) > 1e-6


def test_rounding_up_to_a_multiple():
    for multiple in (1, 7, 16, 64):
        size = padded_batch_size(1000, 0.1, multiple)
        assert size % multiple == 0
        assert 0 <= size - padded_batch_size(1000, 0.1) < multiple
    assert padded_batch_size(10, 1.0) == 10
    assert padded_batch_size(1, 0.5) == 1


# --- refusals --------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [0, -1, 1.5, 10.0, True, None, "10", float("nan")])
def test_sizes_that_are_not_allowed(bad):
    with pytest.raises(ValueError, match="population="):
        PoissonSampler(bad, 0.1, 10, KEY)
    with pytest.raises(ValueError, match="batch_size="):
        PoissonSampler(10, 0.1, bad, KEY)


@pytest.mark.parametrize("bad", [0.0, -0.1, 1.0001, float("nan"), float("inf"), None, "0.1"])
def test_probabilities_that_are_not_allowed(bad):
    with pytest.raises(ValueError, match="sampling_probability="):
        PoissonSampler(10, bad, 10, KEY)


@pytest.mark.parametrize("bad", [-1, 2**32, 0.0, None, "0"])
def test_batch_numbers_that_are_not_allowed(bad):
    with pytest.raises(ValueError, match="index="):
        sampler(10, 0.5).sample(bad)


@pytest.mark.parametrize("rng", [None, 0, jax.random.key(0), np.zeros(8, np.uint32)])
def test_keys_that_are_not_allowed(rng):
    with pytest.raises(ValueError, match="rng"):
        PoissonSampler(10, 0.5, 10, rng)


def test_the_public_name():
    assert dpfa_jax.PoissonSampler is PoissonSampler
