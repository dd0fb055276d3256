"""An attack on the op itself: the tight neighbours of privacy.md, section 7.

Every row of one call is a release of its own, so one call on each of two neighbours
gives many samples. Their standardised distance estimates μ, which must be 1/z.

The keys are fixed. For a correct op the estimate has a standard deviation of at most
``ERROR`` below (each of two means has 1/n, the pooled deviation μ²/4n), so the limit of
five of them would fail for one choice of keys in 1.7 million.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpfa_jax import AttentionPrivacy, dp_dot_product_attention, keys

Z = 0.5  # μ = 2
ROWS, HEADS, DEPTH = 2500, 8, 4
SAMPLES = ROWS * HEADS
ERROR = math.sqrt(2 / SAMPLES + (1 / Z) ** 2 / (4 * SAMPLES))
CLIP, BOUND = 1.25, 0.3
DIRECTION = np.array([0.5, -0.5, 0.1, 0.7])
DIRECTION /= np.linalg.norm(DIRECTION)

NUM_KEYS = 320


@functools.partial(jax.jit, static_argnames=("privacy", "implementation"))
def _release(key, value, rng, ids=None, *, privacy, implementation):
    query = jnp.ones((1, ROWS, HEADS, DEPTH))
    return dp_dot_product_attention(
        query,
        key,
        value,
        privacy=privacy,
        rng=rng,
        scale=1.0,
        record_ids=ids,
        implementation=implementation,
    )


def _rows(logits, along):
    """Keys with these logits against a query of ones, values along the direction."""
    key = np.repeat(np.asarray(logits)[:, None] / DEPTH, DEPTH, axis=1)
    value = np.asarray(along)[:, None] * DIRECTION
    return tuple(jnp.asarray(x[None, :, None], jnp.float32) for x in (key, value))


def _project(out):
    return np.asarray(out, np.float64).reshape(SAMPLES, DEPTH) @ DIRECTION


def _mu(first, second):
    """Standardised distance of two sets of projected releases."""
    a, b = (_project(x) for x in (first, second))
    return (a.mean() - b.mean()) / math.sqrt((a.var() + b.var()) / 2)


def _estimate(privacy, with_record, without, implementation, ids=None, seed=0):
    outs = [
        _release(
            *_rows(*rows),
            keys.reproducible_key(seed + i),
            ids,
            privacy=privacy,
            implementation=implementation,
        )
        for i, rows in enumerate((with_record, without))
    ]
    assert all(bool(jnp.isfinite(out).all()) for out in outs)
    return _mu(*outs)


def _record(adjacency, **options):
    return AttentionPrivacy(
        unit="record",
        noise_multiplier=Z,
        value_clip=CLIP,
        adjacency=adjacency,
        logit_bound=BOUND,
        **options,
    )


def _others(along):
    """All keys of weight one and values of this length along the direction."""
    return np.full(NUM_KEYS, BOUND), np.full(NUM_KEYS, along)


def _change(rows, at, logit, along):
    rows = tuple(x.copy() for x in rows)
    rows[0][at], rows[1][at] = logit, along
    return rows


# The record of the attack tries to count for more than it may: its logit is above U and
# its value longer than C. A bound or clip that is missing multiplies the estimate.
OVER_U, OVER_C = BOUND + 4.0, 30.0 * CLIP


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_add_remove(implementation):
    """One record more. The ratio mixes N and L with the weights that are best for the attack.

    Where L is large, a change (ΔN, ΔL) moves N/L by (ΔN - r·ΔL)/L and the noise does so by
    (σ_N g - r·σ_L g')/L, with r = N/L. The best r for ΔN = C, ΔL = 1 is -C'²/C.
    """
    r = -CLIP / math.sqrt(DEPTH)  # C' = C·d^(-1/4)
    others = _others(r)
    absent = _change(others, 300, -1e4, r)  # weight zero
    present = _change(others, 300, OVER_U, OVER_C)
    mu = _estimate(_record("add_remove"), present, absent, implementation, seed=100)
    # The ratio is linear in the noise up to σ_L/L = 0.3 %.
    assert abs(mu - 1 / Z) < 5 * ERROR + 0.01


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_replace_one(implementation):
    """+C·u becomes -C·u at weight one; L does not change."""
    others = _others(0.0)
    plus = _change(others, 319, OVER_U, OVER_C)
    minus = _change(others, 319, OVER_U, -OVER_C)
    mu = _estimate(_record("replace_one"), plus, minus, implementation, seed=200)
    assert abs(mu - 1 / Z) < 5 * ERROR + 0.01


def test_rows_of_one_record():
    """A record that brings six rows, of which three are allowed, counts as three."""
    r = -CLIP / math.sqrt(DEPTH)
    privacy = _record("add_remove", rows_per_record=3)
    ids = np.arange(NUM_KEYS)
    at = [5, 130, 131, 300, 301, 319]
    ids[at] = 5
    ids = jnp.asarray(ids[None], jnp.int32)
    absent, present = _others(r), _others(r)
    for i in at:
        absent = _change(absent, i, -1e4, r)
        present = _change(present, i, OVER_U, OVER_C)
    mu = _estimate(privacy, present, absent, "xla", ids, seed=300)
    assert abs(mu - 1 / Z) < 5 * ERROR + 0.01


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_sequence(implementation):
    """Another sequence altogether: every row moves from +C·u to -C·u."""
    privacy = AttentionPrivacy(
        unit="sequence", noise_multiplier=Z, value_clip=CLIP, adjacency="replace_one"
    )
    random = np.random.default_rng(0)
    plus = random.normal(size=NUM_KEYS), np.full(NUM_KEYS, OVER_C)
    minus = 9 * random.normal(size=NUM_KEYS), np.full(NUM_KEYS, -OVER_C)
    mu = _estimate(privacy, plus, minus, implementation, seed=400)
    assert abs(mu - 1 / Z) < 5 * ERROR


@pytest.mark.parametrize("unit", ["record", "sequence"])
def test_noise_is_the_same_in_every_direction_and_independent_between_releases(unit):
    """What the attack projects on is not special: the noise is isotropic and white."""
    if unit == "record":
        privacy, scale = _record("replace_one"), NUM_KEYS
    else:
        privacy, scale = (
            AttentionPrivacy(
                unit="sequence", noise_multiplier=Z, value_clip=CLIP, adjacency="replace_one"
            ),
            1,
        )
    out = _release(
        *_rows(*_others(0.0)), keys.reproducible_key(500), privacy=privacy, implementation="xla"
    )
    x = np.asarray(out, np.float64).reshape(SAMPLES, DEPTH) * scale / (Z * 2 * CLIP)
    covariance = x.T @ x / SAMPLES
    # Deviations: √(2/n) on the diagonal, √(1/n) off it; ten numbers, five deviations.
    off = 5 / math.sqrt(SAMPLES)
    assert np.abs(covariance - np.eye(DEPTH)).max() < math.sqrt(2) * off + 0.005
    assert np.abs(x.mean(axis=0)).max() < off
    rows = x.reshape(ROWS, HEADS, DEPTH)
    for a, b in ((rows[1:], rows[:-1]), (rows[:, 1:], rows[:, :-1])):
        assert abs(np.mean(a * b)) < 5 / math.sqrt(a.size)
    assert len(np.unique(x[:, 0] * 2.0**20)) > 100  # not a constant, not a few levels


def test_the_attack_sees_too_little_noise():
    """The same estimate under a claim of twice the multiplier is far outside the limit."""
    others = _others(0.0)
    plus = _change(others, 0, OVER_U, OVER_C)
    minus = _change(others, 0, OVER_U, -OVER_C)
    mu = _estimate(_record("replace_one"), plus, minus, "xla", seed=600)
    assert abs(mu - 1 / (2 * Z)) > 20 * ERROR
