"""The choice of the generator: public, 20 rounds unless asked, Threefry in tests alone."""

import dataclasses

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpfa_jax import AttentionPrivacy, attention_event, dp_dot_product_attention, keys

RECORD = AttentionPrivacy(
    unit="record",
    noise_multiplier=1.5,
    value_clip=2.0,
    adjacency="add_remove",
    logit_bound=1.0,
    rows_per_record=3,
)
SEQUENCE = AttentionPrivacy(
    unit="sequence", noise_multiplier=4.0, value_clip=1.0, adjacency="replace_one"
)
SHAPE = (2, 5, 4, 8)
NUMBERS = {"scale": 0.25, "head_dim": 8, "num_keys": 6, "dtype": "float32"}
CHACHA = [8, 12, 20]


def _with(privacy, rounds):
    return dataclasses.replace(privacy, rounds=rounds)


def _call(privacy, seed=0, implementation=None):
    q = jnp.ones(SHAPE)
    kv = jnp.ones((2, 6, 2, 8))
    rng = keys.reproducible_key(seed)
    return dp_dot_product_attention(
        q, kv, kv, privacy=privacy, rng=rng, implementation=implementation
    )


@pytest.fixture
def reuse():
    with keys.allow_reuse_for_tests():
        yield


@pytest.mark.parametrize("privacy", [RECORD, SEQUENCE])
def test_twenty_rounds_unless_asked(privacy):
    assert privacy.rounds == 20
    for rounds in CHACHA:
        assert _with(privacy, rounds).spec(**NUMBERS).rounds == rounds


@pytest.mark.parametrize("rounds", [0, 7, 10, 24, 8.0, True, None, "20", "chacha", "Threefry"])
def test_other_rounds_raise(rounds):
    with pytest.raises(ValueError, match=r"rounds=.*: allowed are \(8, 12, 20, 'threefry'\)"):
        _with(SEQUENCE, rounds)


def test_the_generator_is_named_in_the_guarantee():
    for rounds in CHACHA:
        text = _with(SEQUENCE, rounds).guarantee(SHAPE, calls=3)
        assert text == (
            "A sequence is hidden under replace_one by 60 Gaussian releases of noise "
            f"multiplier 4.0. The noise comes from ChaCha{rounds} with a 256-bit key."
        )
    assert RECORD.guarantee(SHAPE) == (
        "A record of at most 3 key/value rows is hidden under add_remove by 20 Gaussian "
        "releases of noise multiplier 1.5, for queries that do not depend on the records. "
        "The noise comes from ChaCha20 with a 256-bit key."
    )
    with pytest.raises(ValueError, match="query_shape"):
        RECORD.guarantee((5, 4, 8))


def test_rounds_do_not_change_the_cost():
    for rounds in CHACHA:
        assert attention_event(_with(SEQUENCE, rounds), SHAPE) == attention_event(SEQUENCE, SHAPE)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_each_choice_makes_its_own_noise(reuse, implementation):
    outputs = [
        np.asarray(_call(_with(SEQUENCE, rounds), implementation=implementation))
        for rounds in CHACHA
    ]
    with keys.allow_threefry_for_tests():
        privacy = _with(SEQUENCE, "threefry")
        outputs.append(np.asarray(_call(privacy, implementation=implementation)))
        again = np.asarray(_call(privacy, implementation=implementation))
    assert (again == outputs[-1]).all()
    for i, x in enumerate(outputs):
        assert np.std(x) == pytest.approx(8.0, rel=0.3)
        assert all((x != y).mean() > 0.99 for y in outputs[:i])


def test_threefry_costs_everything_and_says_so():
    privacy = _with(RECORD, "threefry")
    assert attention_event(privacy, SHAPE) == dp_accounting.NonPrivateDpEvent()
    assert "Nothing is hidden" in privacy.guarantee(SHAPE)
    assert "Threefry" in privacy.guarantee(SHAPE)


def test_threefry_outside_of_tests_raises_before_the_key_is_used():
    message = "rounds='threefry': Threefry's 64-bit key hides nothing"
    with pytest.raises(ValueError, match=message):
        _with(RECORD, "threefry").spec(**NUMBERS)
    privacy = _with(SEQUENCE, "threefry")
    with pytest.raises(ValueError, match=message):
        _call(privacy, seed=770077)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: _call(privacy, seed=770077))
    with keys.allow_threefry_for_tests(), keys.allow_reuse_for_tests():
        _call(privacy, seed=770077)
    with pytest.raises(ValueError, match=message):
        _call(privacy, seed=770077)
    _call(SEQUENCE, seed=770077)  # the refusals have not spent the key


def test_the_allowance_ends_with_an_exception():
    with pytest.raises(KeyError), keys.allow_threefry_for_tests():
        raise KeyError
    with pytest.raises(ValueError, match="Threefry"):
        keys.check_threefry_allowed("x")
