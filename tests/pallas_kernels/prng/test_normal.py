"""The Gaussians: their law, their independence and their layout.

Keys are fixed, so every statistic below is a constant: the stated rates say how unlikely
it is that a correct generator would have failed on the day the key was chosen.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from pallas_kernels import prng

KEY = jnp.arange(11, 19, dtype=jnp.uint32)
DRAWS = 4_000_000


@pytest.fixture(scope="module")
def draws():
    x = np.asarray(jax.jit(prng.normal_stream, static_argnums=1)(KEY, DRAWS))
    assert x.dtype == np.float32
    return x.astype(np.float64)


@pytest.fixture(scope="module")
def tile():
    """[batch, rows, heads, columns] of independent normals, 2^20 of them."""
    make = jax.jit(prng.normal_tile, static_argnums=(3, 4))
    batch, rows = jnp.arange(4, dtype=jnp.uint32), jnp.arange(256, dtype=jnp.uint32)
    return np.asarray(make(KEY, batch, rows, 4, 256), np.float64)


def test_kolmogorov_smirnov(draws):
    """P(sup|F_n - F| > x/√n) <= 2 exp(-2x²) (Massart 1990): 1e-6 at x = 2.70."""
    n = draws.size
    law = special.ndtr(np.sort(draws))
    steps = np.arange(n + 1) / n
    distance = max(np.max(steps[1:] - law), np.max(law - steps[:-1]))
    assert distance < np.sqrt(np.log(2 / 1e-6) / 2) / np.sqrt(n)


def test_moments(draws):
    """The first six moments, each within five of its own standard deviations (6e-7)."""
    for k in range(1, 7):
        expected = 0.0 if k % 2 else float(special.factorial2(k - 1))
        spread = np.sqrt(special.factorial2(2 * k - 1) - expected**2)
        error = np.mean(draws**k) - expected
        assert abs(error) < 5 * spread / np.sqrt(draws.size), (k, error)


@pytest.mark.parametrize("side", [-1.0, 1.0])
@pytest.mark.parametrize("beyond", [0.5, 1.0, 2.0, 3.0, 4.0, 4.5, 5.0])
def test_tail_counts(draws, beyond, side):
    """Exact binomial limits with the mass of five standard deviations outside (6e-7)."""
    count = int(np.sum(side * draws > beyond))
    chance = stats.binom(draws.size, special.ndtr(-beyond))
    outside = special.ndtr(-5.0)
    assert chance.ppf(outside) <= count <= chance.isf(outside)


def test_the_extremes_are_those_of_a_normal(draws):
    """The largest of 4e6 magnitudes lies where 1 - 1e-6 of the law of the maximum does."""
    low, high = 4.6, 7.5
    law = [np.exp(draws.size * np.log1p(-2 * special.ndtr(-x))) for x in (low, high)]
    assert law[0] < 5e-7
    assert law[1] > 1 - 5e-7
    assert low < np.abs(draws).max() < high


@pytest.mark.parametrize(("extra", "top"), [(None, 41), (0, 65)])
def test_the_tail_is_reached_on_every_side(extra, top):
    """Word 0 and the smallest fraction: √(2 ln 2^41) = 7.54, with an extra word 9.49."""
    top = np.sqrt(2 * top * np.log(2))
    assert top > 6.6
    zero, quarter = jnp.uint32(0), jnp.uint32(2**30)
    extra = None if extra is None else jnp.uint32(extra)
    for turn, axis, sign in ((0, 0, 1), (2, 0, -1), (1, 1, 1), (3, 1, -1)):
        pair = prng.box_muller(zero, jnp.uint32(turn) * quarter, extra)
        assert float(pair[axis]) == pytest.approx(sign * top, rel=1e-6)
        assert abs(float(pair[1 - axis])) < 1e-5


def test_no_words_give_anything_but_finite_numbers():
    words = jnp.asarray([2**32 - 1, 2**32 - 128, 2**32 - 129, 2**31, 255, 1, 0], jnp.uint32)
    radius, angle, extra = (x.ravel() for x in jnp.meshgrid(words, words, words))
    for pair in (prng.box_muller(radius, angle), prng.box_muller(radius, angle, extra)):
        assert all(bool(jnp.isfinite(x).all()) for x in pair)


def test_every_bit_of_the_radius_counts_in_the_tail():
    """256 fractions a word without an extra word, all of the highest 16 bits with one."""
    word = jnp.repeat(jnp.arange(64, dtype=jnp.uint32), 256)
    low = jnp.tile(jnp.arange(256, dtype=jnp.uint32), 64)
    for extra, exact in ((None, low), (low << jnp.uint32(24), low)):
        angle = low if extra is None else jnp.zeros_like(low)
        radius = np.asarray(prng.box_muller(word, angle, extra)[0], np.float64)
        half = 0.5 / 256 if extra is None else 0.5 / 2.0**32
        expected = (np.asarray(word) + np.asarray(exact) / 256 + half) * 2.0**-32
        np.testing.assert_allclose(radius, np.sqrt(-2 * np.log(expected)), rtol=1e-6)
        # Strictly less for every larger (word, fraction), until float32 cannot tell.
        assert np.all(np.diff(radius[: 16 * 256]) <= 0)
        assert len(np.unique(radius[: 4 * 256])) > 900


def test_the_low_bits_of_the_angle_word_do_not_turn():
    """They belong to the radius: an angle of 24 bits, times all its 256 low parts."""
    angle = (jnp.uint32(12345678) << jnp.uint32(8)) + jnp.arange(256, dtype=jnp.uint32)
    first, second = prng.box_muller(jnp.full((256,), 7, jnp.uint32), angle)
    turned = np.arctan2(np.asarray(second, np.float64), np.asarray(first, np.float64))
    assert np.ptp(turned) < 1e-6
    assert np.ptp(np.hypot(first, second)) > 1e-3


def test_float32_transform_is_close_to_float64(plain):
    random = np.random.default_rng(0)
    words = random.integers(2**32, size=(3, 200_000), dtype=np.uint64)
    radius = np.sqrt(-2 * np.log((words[0] + 0.5) * 2.0**-32))
    short = [jnp.asarray(w.astype(np.uint32)) for w in words]
    # Near word 2^32 the uniform keeps 24 bits: an absolute error of 2^-25/radius.
    allowed = 3e-6 + 2.0**-24 / np.maximum(radius, 2.0**-12)
    for n in (2, 3):
        for ours, theirs in zip(
            prng.box_muller(*short[:n]), plain.box_muller(*words[:n]), strict=True
        ):
            assert np.all(np.abs(np.asarray(ours, np.float64) - theirs) < allowed)


def _correlation(x, y):
    """Sample correlation times √n: about standard normal if x and y are independent."""
    x, y = x.ravel() - x.mean(), y.ravel() - y.mean()
    return float(np.sum(x * y) / np.sqrt(np.sum(x * x) * np.sum(y * y)) * np.sqrt(x.size))


@pytest.mark.parametrize("lag", [1, 2, 3, 8, 16, 64, 128])
@pytest.mark.parametrize("axis", ["batch", "rows", "heads", "columns"])
def test_no_correlation_along_any_axis(tile, axis, lag):
    """Of the values, of their squares and of their signs' products, to five deviations.

    The two Gaussians of one Box-Muller pair stand eight columns apart.
    """
    axis = ("batch", "rows", "heads", "columns").index(axis)
    if lag >= tile.shape[axis]:
        lag = tile.shape[axis] - 1
    x = np.take(tile, range(tile.shape[axis] - lag), axis)
    y = np.take(tile, range(lag, tile.shape[axis]), axis)
    assert abs(_correlation(x, y)) < 5
    # Squares have heavier tails; absolute values would see the same dependence.
    assert abs(_correlation(np.abs(x), np.abs(y))) < 5
    assert abs(_correlation(x, np.abs(y))) < 5


def test_no_correlation_between_streams_keys_and_tiles(draws, tile):
    size = 2**19
    stream = jax.jit(prng.normal_stream, static_argnums=(1, 2))
    others = [stream(KEY, size, nonce) for nonce in ((1, 0, 0), (0, 1, 0), (0, 0, 1))]
    others += [stream(prng.derive_key(KEY, 16), size), stream(KEY + jnp.uint32(1), size)]
    everything = [draws[:size], tile.ravel()[:size], *(np.asarray(x, np.float64) for x in others)]
    for i, x in enumerate(everything):
        for y in everything[:i]:
            assert abs(_correlation(x, y)) < 5
            assert abs(_correlation(np.abs(x), np.abs(y))) < 5


def test_no_value_stands_twice_in_a_stream(draws):
    """4e6 pairs of words: a repeated block would repeat both Gaussians of a pair."""
    tiles = draws.reshape(-1, 5, 2, 128)
    pairs = np.ascontiguousarray(np.moveaxis(tiles, 2, 3)).reshape(-1, 2)
    # Chance repetitions need the 56 bits that a float32 pair keeps to agree: about
    # (2e6)²/2 / 2^50 of them.
    assert len(np.unique(pairs.view(np.complex128))) >= len(pairs) - 3


def test_stream_layout(plain):
    """Tiles of ten rows of 128; a pair takes three words of its column's block, in order."""
    nonce = (3, 4, 5)
    for size in (47, 1500):
        got = np.asarray(prng.normal_stream(KEY, size, nonce))
        assert got.shape == (size,)
        expected = plain.stream([int(w) for w in KEY], size, nonce)
        np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("rounds", [8, 20])
@pytest.mark.parametrize("columns", [1, 16, 17, 20, 64, 65, 128, 130, 300])
def test_tile_layout(plain, columns, rounds):
    batch, rows = [0, 5], [0, 1, 300, 2**32 - 1]
    got = prng.normal_tile(
        KEY,
        jnp.asarray(batch, jnp.uint32),
        jnp.asarray(rows, jnp.uint32),
        3,
        columns,
        rounds=rounds,
    )
    expected = plain.tile([int(w) for w in KEY], batch, rows, 3, columns, rounds)
    # Loose where the radius is small (see above); a misplaced column errs by about 1.
    np.testing.assert_allclose(np.asarray(got), expected, atol=1e-4)


def test_a_tile_depends_on_its_counters_only():
    """Rows, heads and columns cut out of a larger tile are the same numbers."""
    batch, rows = jnp.arange(3, dtype=jnp.uint32), jnp.arange(40, dtype=jnp.uint32)
    make = jax.jit(prng.normal_tile, static_argnums=(3, 4))
    # Rows of at most 64 columns have an order of their own.
    for columns, fewer in ((150, 70), (64, 5)):
        whole = make(KEY, batch, rows, 4, columns)
        part = make(KEY, batch[2:], rows[17:31], 2, fewer)
        np.testing.assert_allclose(part, whole[2:, 17:31, :2, :fewer], atol=1e-6)


def test_streams_of_different_length_agree():
    lengths = jax.jit(lambda: [prng.normal_stream(KEY, n) for n in (1, 10, 333, 3000)])()
    for part in lengths[:-1]:
        np.testing.assert_allclose(part, lengths[-1][: len(part)], atol=1e-6)
