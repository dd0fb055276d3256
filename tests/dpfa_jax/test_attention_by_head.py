"""Multipliers of single heads and layers: in the noise, and in the event."""

import dataclasses
import math

import dp_accounting
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dpfa_jax.linen
import dpfa_jax.nnx
from dpfa_jax import (
    Accountant,
    AttentionPrivacy,
    attention_event,
    attention_fn,
    calibrate_noise_multiplier,
    dp_dot_product_attention,
    keys,
    noise_key,
)

Z = (0.5, 1.0, 1.0, 4.0)
RECORD = AttentionPrivacy(
    unit="record", noise_multiplier=Z, value_clip=1.5, adjacency="add_remove", logit_bound=0.0,
    public_queries=True, rounds=8,
)  # fmt: skip
SEQUENCE = AttentionPrivacy(
    unit="sequence", noise_multiplier=Z, value_clip=1.5, adjacency="replace_one", rounds=8
)
CALM = dataclasses.replace(RECORD, noise_multiplier=tuple(10 * z for z in Z))
ROWS, KEYS, DEPTH = 2500, 320, 8


def release(privacy, query, key, value):
    run = jax.jit(lambda rng, *x: dp_dot_product_attention(*x, privacy=privacy, rng=rng, scale=1.0))
    return np.asarray(run(keys.reproducible_key(7), query, key, value), np.float64)


# Of n draws the estimate of a standard deviation errs by 1/√(2n), relative. Six times that
# fails a correct op for one key in 5·10⁸; there are 12 such comparisons, with fixed keys.
def close(measured, wanted, draws):
    assert measured == pytest.approx(wanted, rel=6 / math.sqrt(2 * draws))


@pytest.mark.parametrize("privacy", [RECORD, SEQUENCE], ids=["record", "sequence"])
def test_the_noise_of_each_head_has_the_event_s_multiplier(privacy):
    floor = 2.0**20 if privacy.unit == "record" else None
    privacy = dataclasses.replace(privacy, denominator_floor=floor)
    zeros = jnp.zeros((1, KEYS, 2, DEPTH))
    out = release(privacy, jnp.zeros((1, ROWS, 4, DEPTH)), zeros, zeros) * (floor or 1.0)
    event = attention_event(privacy, (1, ROWS, 4, DEPTH))
    weight = 1.5 * DEPTH**-0.25
    sensitivity = math.hypot(1.5, weight) if privacy.unit == "record" else 2 * 1.5
    for head, part in enumerate(event.events):
        assert part.count == ROWS
        wanted = part.event.noise_multiplier * sensitivity
        # The sensitivity counts rounding as well: less than 1e-3 of it here.
        close(out[0, :, head].std(), wanted, ROWS * DEPTH)


def test_the_sum_of_weights_of_each_head_has_its_own_noise():
    """With N = nC and L = n, nC/Õ has the variance σ_L² + (σ_N/C)², up to terms in 1/n."""
    value = jnp.zeros((1, KEYS, 2, DEPTH)).at[..., 0].set(1.5)
    query = jnp.zeros((1, ROWS, 4, DEPTH))
    out = release(RECORD, query, jnp.zeros_like(value), value)
    for head, z in enumerate(Z):
        weight = 1.5 * DEPTH**-0.25
        joint = math.hypot(1.5, weight)
        close((KEYS * 1.5 / out[0, :, head, 0]).std(),
              z * math.hypot(joint / weight, joint / 1.5), ROWS)  # fmt: skip


# --- events ---------------------------------------------------------------------------------


def epsilon(event):
    return Accountant("add_remove").compose(event).epsilon(1e-5)


def test_heads_compose_as_by_hand():
    """2 rows, 3 calls: μ² = 6·Σ 1/z²."""
    event = attention_event(CALM, (5, 2, 4, 8), calls=3)
    mu = math.sqrt(6 * sum((10 * z) ** -2 for z in Z))
    assert epsilon(event) == pytest.approx(epsilon(dp_accounting.GaussianDpEvent(1 / mu)), rel=1e-6)


def test_equal_multipliers_cost_what_a_single_number_costs():
    same = dataclasses.replace(RECORD, noise_multiplier=(3.0,) * 4)
    one = dataclasses.replace(RECORD, noise_multiplier=3.0)
    events = [attention_event(p, (1, 10, 4, 8)) for p in (same, one)]
    assert epsilon(events[0]) == pytest.approx(epsilon(events[1]), rel=1e-9)


def test_layers_compose_as_by_hand():
    plain = dataclasses.replace(RECORD, noise_multiplier=9.0)
    got = epsilon(attention_event([CALM, plain, plain], (1, 2, 4, 8), calls=2))
    mu = math.sqrt(4 * (sum((10 * z) ** -2 for z in Z) + 8 / 81))
    assert got == pytest.approx(epsilon(dp_accounting.GaussianDpEvent(1 / mu)), rel=1e-6)


def test_a_whole_plan_is_calibrated():
    """A head with twice the noise, a second layer with three times."""

    def plan(z):
        first = dataclasses.replace(RECORD, noise_multiplier=(z, z, z, 2 * z))
        return attention_event(
            [first, dataclasses.replace(first, noise_multiplier=3 * z)], (1, 10, 4, 8)
        )

    z = calibrate_noise_multiplier(plan, epsilon=2.0, delta=1e-5, adjacency="add_remove")
    assert 1.99 < epsilon(plan(z)) <= 2.0


def test_one_layer_without_privacy_costs_everything():
    event = attention_event([RECORD, None], (1, 10, 4, 8))
    assert dp_accounting.NonPrivateDpEvent() in event.events


# --- layers ---------------------------------------------------------------------------------


def test_flax_layers_take_multipliers_of_heads():
    """The last head's noise, 1000 times that of the first, is in every output."""
    x = jax.random.normal(jax.random.key(0), (1, 100, 8))
    privacy = dataclasses.replace(SEQUENCE, noise_multiplier=(1.0, 1000.0))
    key = keys.reproducible_key(0)
    linen = dpfa_jax.linen.DPMultiHeadDotProductAttention(num_heads=2, privacy=privacy)
    rngs = nnx.Rngs(params=0, privacy=key)
    layer = dpfa_jax.nnx.DPMultiHeadAttention(2, 8, privacy=privacy, decode=False, rngs=rngs)
    flax = nn.MultiHeadDotProductAttention(2, attention_fn=attention_fn(privacy))
    found = [
        linen.init_with_output({"params": jax.random.key(0), "privacy": key}, x)[0],
        layer(x),
    ]
    with noise_key(keys.reproducible_key(1)):
        found.append(flax.init_with_output(jax.random.key(0), x)[0])
    for out in found:
        assert float(out.std()) > 100
    with pytest.raises(ValueError, match="has 2 numbers and the query 4 heads"):
        linen.clone(num_heads=4).init({"params": key, "privacy": keys.reproducible_key(2)}, x)


# --- refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize("z", [(), (1.0, 0.0), (1.0, math.inf), (1.0, "2"), (True, 1.0), [1.0]])
def test_bad_multipliers_are_refused(z):
    with pytest.raises(ValueError, match=r"noise_multiplier=.*allowed is a finite number > 0"):
        dataclasses.replace(RECORD, noise_multiplier=z)


def test_another_number_of_heads_is_refused_before_the_key_is_used():
    x, key = jnp.zeros((1, 3, 2, 8)), keys.reproducible_key(3)
    with pytest.raises(ValueError, match=r"noise_multiplier=.*has 4 numbers and the query 2 heads"):
        dp_dot_product_attention(x, x, x, privacy=RECORD, rng=key)
    keys.consume(key)  # would raise for a used key
    with pytest.raises(ValueError, match="has 4 numbers"):
        attention_event(RECORD, x.shape)


def test_shapes_are_refused_before_heads_are_counted():
    x = jnp.zeros((3, 2, 8))
    with pytest.raises(ValueError, match="four axes"):
        dp_dot_product_attention(x, x, x, privacy=RECORD, rng=keys.reproducible_key(3))


def test_a_spec_of_one_head_needs_its_number():
    numbers = {"scale": 1.0, "head_dim": 8, "num_keys": 4, "dtype": "float32"}
    for head in (None, 4, -1):
        with pytest.raises(ValueError, match="head="):
            RECORD.spec(**numbers, head=head)
    assert RECORD.spec(**numbers, head=3).numerator_std == pytest.approx(
        8 * RECORD.spec(**numbers, head=0).numerator_std
    )
    # The default floor is one standard deviation of the head's own noise.
    assert RECORD.spec(**numbers, head=3).denominator_floor == pytest.approx(
        8 * RECORD.spec(**numbers, head=0).denominator_std
    )


@pytest.mark.parametrize("layers", [[], [RECORD, SEQUENCE]])
def test_layers_that_hide_different_things_are_refused(layers):
    with pytest.raises(ValueError, match=r"privacy: .* layers that hide"):
        attention_event(layers, (1, 10, 4, 8))


def test_an_event_of_something_else_is_refused():
    with pytest.raises(ValueError, match="privacy is a float"):
        attention_event(1.0, (1, 10, 4, 8))


def test_the_guarantee_names_every_multiplier():
    text = RECORD.guarantee((1, 10, 4, 8), calls=2)
    assert "20 Gaussian releases of each head, of noise multipliers (0.5, 1.0, 1.0, 4.0)" in text
