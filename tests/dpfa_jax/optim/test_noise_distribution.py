"""The noise is Gaussian, of the stated size, independent, and on a public grid.

Bounds are two-sided with a false-alarm rate below 1e-6 each; the keys are fixed, so that
a test that passes once passes always.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

from dpfa_jax import add_noise, dp_aggregate, keys

N = 1 << 17
FALSE_ALARM = 1e-6


@pytest.fixture(autouse=True)
def _compare_under_equal_noise():
    with keys.allow_reuse_for_tests():
        yield


def draw(tx, steps=1, shape=(N,)):
    """Releases of a zero sum, one a step."""
    state, out = tx.init(jnp.zeros(shape)), []
    update = jax.jit(tx.update)
    for _ in range(steps):
        noise, state = update(jnp.zeros(shape), state)
        out.append(np.asarray(noise, np.float64).ravel())
    return out


def assert_std(x, std):
    """Chi-square bound on Σ x²/σ²."""
    statistic = np.sum((x / std) ** 2)
    low, high = scipy.stats.chi2.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], x.size)
    assert low < statistic < high, math.sqrt(statistic / x.size)


def assert_uncorrelated(x, y):
    """At every lag: equal streams, shifted streams and repeated blocks all show."""
    n = x.size
    spectrum = np.fft.rfft(x / x.std()) * np.conj(np.fft.rfft(y / y.std()))
    z = np.fft.irfft(spectrum, n) / math.sqrt(n)
    assert np.abs(z).max() < scipy.stats.norm.isf(FALSE_ALARM / (2 * n))


@pytest.mark.parametrize(
    ("l2_clip_norm", "noise_multiplier", "batch", "adjacency", "std"),
    [
        (1.0, 1.0, 1.0, "add_remove", 1.0),
        (1.0, 1.0, 1.0, "replace_one", 2.0),
        (0.3, 1.7, 64, "add_remove", 0.3 * 1.7 / 64),
        (5, 0.01, 1000.0, "replace_one", 2 * 5 * 0.01 / 1000),
        (1e-6, 1.999, 3.0, "add_remove", 1e-6 * 1.999 / 3),
        (1e6, 2.001, 0.5, "add_remove", 1e6 * 2.001 / 0.5),
    ],
)
def test_size(l2_clip_norm, noise_multiplier, batch, adjacency, std):
    key = keys.reproducible_key(1)
    (x,) = draw(add_noise(l2_clip_norm, noise_multiplier, batch, key, adjacency=adjacency))
    assert_std(x, std)
    assert abs(x.mean()) < scipy.stats.norm.isf(FALSE_ALARM / 2) * std / math.sqrt(x.size)


def test_size_of_dp_aggregate():
    tx = dp_aggregate(0.5, 3.0, 10.0, keys.reproducible_key(2), adjacency="replace_one")
    out, _ = tx.update(jnp.zeros((2, N)), tx.init(jnp.zeros(N)))
    assert_std(np.asarray(out, np.float64), 0.3)


def test_replace_one_is_exactly_twice_add_remove():
    one, two = (
        draw(add_noise(1.0, 1.0, 1.0, keys.reproducible_key(3), adjacency=a))[0]
        for a in ("add_remove", "replace_one")
    )
    np.testing.assert_array_equal(two, 2 * one)


def test_normality():
    """Kolmogorov–Smirnov; the grid of σ/1024 moves the distribution function by 4e-4."""
    (x,) = draw(add_noise(1.0, 1.0, 1.0, keys.reproducible_key(4)))
    assert scipy.stats.kstest(x, "norm").pvalue > FALSE_ALARM
    # Third and fourth moments: their standard errors are √(6/n) and √(24/n).
    assert abs(scipy.stats.skew(x)) < 5 * math.sqrt(6 / N)
    assert abs(scipy.stats.kurtosis(x)) < 5 * math.sqrt(24 / N)


def test_tails():
    (x,) = draw(add_noise(1.0, 1.0, 1.0, keys.reproducible_key(5)), shape=(1 << 20,))
    for threshold in (3.0, 3.5, 4.0, 4.5):
        for tail in (x, -x):
            p = scipy.stats.norm.sf(threshold)
            low, high = scipy.stats.binom.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], x.size, p)
            assert low <= (tail > threshold).sum() <= high
    assert np.abs(x).max() > 4.5


def test_steps_are_independent_and_a_step_is_white():
    a, b, c = draw(add_noise(1.0, 1.0, 1.0, keys.reproducible_key(6)), steps=3)
    for x, y in ((a, b), (b, c), (a, c)):
        assert_uncorrelated(x, y)
        # Two independent grid values agree with probability 1/(2√π·1024) = 0.00028.
        assert (x == y).mean() < 0.0005
    z = np.abs(np.fft.rfft(a)[1:-1]) ** 2 / N  # exponential of mean 1 for white noise
    assert z.max() < -math.log(FALSE_ALARM / z.size)


def test_leaves_are_independent():
    """Of equal shapes, and a leaf inside another's block of sixteen."""
    tx = add_noise(1.0, 1.0, 1.0, keys.reproducible_key(7))
    zeros = {"a": jnp.zeros(N), "b": jnp.zeros((2, N // 2)), "c": jnp.zeros((N // 4, 4))}
    out, _ = tx.update(zeros, tx.init(zeros))
    a, b, c = (np.asarray(out[k], np.float64).ravel() for k in "abc")
    for x, y in ((a, b), (b, c), (a, c)):
        assert_uncorrelated(x, y)
        assert (x == y).mean() < 0.0005


def test_step_and_leaf_do_not_collide():
    """Leaf i of step j is not leaf j of step i."""
    tx = add_noise(1.0, 1.0, 1.0, keys.reproducible_key(8))
    zeros = [jnp.zeros(64)] * 4
    state, seen = tx.init(zeros), []
    update = jax.jit(tx.update)
    for _ in range(4):
        out, state = update(zeros, state)
        seen += [np.asarray(x).tobytes() for x in out]
    assert len(set(seen)) == 16


def test_two_chained_transforms_are_independent():
    first, second = keys.reproducible_key(9), keys.reproducible_key(10)
    alone = [draw(add_noise(1.0, 1.0, 1.0, k))[0] for k in (first, second)]
    assert_uncorrelated(*alone)
    tx = optax.chain(add_noise(1.0, 1.0, 1.0, first), add_noise(1.0, 1.0, 1.0, second))
    (both,) = draw(tx)
    assert_std(both, math.sqrt(2.0))


@pytest.mark.parametrize(("noise_multiplier", "size"), [(0.013, 1.0), (1.9, 1e3), (700.0, 1.0)])
def test_releases_lie_on_a_grid_that_the_data_does_not_move(noise_multiplier, size):
    l2_clip_norm, batch = 0.37, 48.0
    sigma = noise_multiplier * l2_clip_norm
    spacing = 2.0 ** (math.floor(math.log2(sigma)) - 10)  # public: σ/2048 < spacing <= σ/1024
    tx = add_noise(l2_clip_norm, noise_multiplier, batch, keys.reproducible_key(11))
    update = jax.jit(tx.update)
    for seed in range(3):
        data = np.random.default_rng(seed).normal(size=4096) * size * sigma
        out, _ = update(jnp.asarray(data, jnp.float32), tx.init(jnp.zeros(4096)))
        steps = np.asarray(out, np.float64) * batch / spacing
        # What is left is the float32 rounding of the division.
        np.testing.assert_allclose(
            steps, np.round(steps), rtol=0, atol=np.abs(steps).max() * 2.0**-23
        )
        assert np.unique(np.round(steps)).size > 1000


def test_rounding_to_the_grid_is_to_nearest():
    """The same draws on two grids (σ/1024 and σ/2038): rounding down would tell them apart."""
    key = keys.reproducible_key(12)
    coarse, fine = (draw(add_noise(1.0, z, 1.0, key))[0] / z for z in (1.0, 1.99))
    error = coarse - fine
    assert np.abs(error).max() <= 1.01 * (2.0**-11 + 2.0**-11 / 1.99)
    assert abs(error.mean()) < 5 * error.std() / math.sqrt(N)


def test_what_is_between_two_grid_points_comes_out_right_on_average():
    tx = add_noise(1.0, 1.0, 1.0, keys.reproducible_key(13))
    update = jax.jit(tx.update)
    offset = 0.3 * 2.0**-10
    with_offset, _ = update(jnp.full(N, offset), tx.init(jnp.zeros(N)))
    without, _ = update(jnp.zeros(N), tx.init(jnp.zeros(N)))
    steps = (np.asarray(with_offset, np.float64) - np.asarray(without, np.float64)) / 2.0**-10
    # Each of N entries moves by one grid step or none: mean 0.3 steps.
    assert set(np.unique(steps)) <= {0.0, 1.0}
    assert abs(steps.mean() - 0.3) < 5 * math.sqrt(0.21 / N)
