"""What was wrong once: one test for each defect found by review, kept from coming back."""

import functools
import subprocess
import sys

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpfa_jax import (
    AttentionPrivacy,
    Ledger,
    PoissonSampler,
    SecureKey,
    add_noise,
    clipped_grad,
    dp_aggregate,
    dp_dot_product_attention,
    keys,
)
from dpfa_jax.optim import scale_by_dp_adam
from dpfa_jax.sampling import padded_batch_size


@pytest.fixture(autouse=True)
def _setup():
    with jax.numpy_dtype_promotion("strict"), keys.allow_reuse_for_tests():
        yield


def test_dp_aggregate_of_an_empty_batch_is_pure_noise():
    tx = dp_aggregate(1.0, 1.0, 4.0, keys.reproducible_key(0))
    out, _ = tx.update(jnp.zeros((0, 3)), tx.init(jnp.zeros(3)))
    assert np.isfinite(np.asarray(out)).all()
    assert (np.asarray(out) != 0).all()


def test_dp_adam_takes_float32_updates_for_bfloat16_parameters():
    """What add_noise makes of clipped_grad's float32 sum."""
    params = jnp.ones(3, jnp.bfloat16)
    total = clipped_grad(lambda w, x: jnp.sum(w * x), l2_clip_norm=1.0)(
        params, jnp.ones((4, 3), jnp.bfloat16)
    )
    tx = optax.chain(add_noise(1.0, 1.0, 4.0, keys.reproducible_key(0)), scale_by_dp_adam(0.25))
    out, _ = tx.update(total, tx.init(params), params)
    assert out.dtype == jnp.float32


def test_the_second_moment_does_not_stall_in_bfloat16():
    """0.001·g² is below half a unit in the last place of v: v stops far from E[g²]."""
    tx = scale_by_dp_adam(0.0, floor=1e-6)

    def body(state, _):
        out, state = tx.update(jnp.ones(1, jnp.bfloat16), state)
        return state, out

    _, out = jax.lax.scan(body, tx.init(jnp.ones(1, jnp.bfloat16)), None, length=4000)
    assert float(out[-1, 0]) == pytest.approx(1.0, rel=0.05)


def test_verify_does_not_blame_a_nan_example():
    grad = clipped_grad(lambda w, x: jnp.sum(w * x), l2_clip_norm=1.0, verify=True)
    out = grad(jnp.ones(2), jnp.array([[1.0, 2.0], [jnp.nan, 0.0]]))
    np.testing.assert_allclose(np.linalg.norm(out), 1.0, rtol=1e-5)


def test_verify_with_an_empty_leaf():
    grad = clipped_grad(
        lambda p, x: jnp.sum(p["a"] * x) + jnp.sum(p["b"]), l2_clip_norm=1.0, verify=True
    )
    out = grad({"a": jnp.ones(3), "b": jnp.ones(0)}, jnp.ones((2, 3)))
    assert out["b"].shape == (0,)


def test_parameters_without_leaves():
    with pytest.raises(ValueError, match="argnums"):
        clipped_grad(lambda p, x: jnp.sum(x), l2_clip_norm=1.0)({}, jnp.ones((2, 3)))


@pytest.mark.parametrize(
    "make", [lambda k: add_noise(1.0, 1.0, 1.0, k), lambda k: PoissonSampler(10, 0.5, 10, k)]
)
def test_an_array_of_keys_is_refused_at_construction(make):
    with pytest.raises(ValueError, match="rng"):
        make(jax.random.split(keys.reproducible_key(0), 3))


@pytest.mark.parametrize("args", [(0, 0.1), (10, 0.0), (10, 1.5), (10, float("nan")), (10, 0.1, 0)])
def test_padded_batch_size_names_what_is_wrong(args):
    with pytest.raises(ValueError, match=r"population=|sampling_probability=|multiple_of="):
        padded_batch_size(*args)


def test_a_composed_event_with_a_tuple_is_the_same_event_again(tmp_path):
    ledger = Ledger(tmp_path / "l.sqlite")
    ledger.open_budget("s", epsilon=4.0, delta=1e-5, adjacency="add_remove", unit="u")
    event = dp_accounting.ComposedDpEvent((dp_accounting.GaussianDpEvent(9.0),))
    assert ledger.charge("s", "a", event) is True
    assert ledger.charge("s", "a", event) is False


@pytest.mark.parametrize("z", [1e-40, 1e-300])
def test_a_noise_multiplier_too_small_for_float32_is_refused(z):
    with pytest.raises(ValueError, match="noise_multiplier="):
        add_noise(1.0, z, 1.0, keys.reproducible_key(0))


def test_overflowing_noise_is_a_value_error():
    with pytest.raises(ValueError, match="noise_multiplier="):
        add_noise(1e9, 1e307, 1.0, keys.reproducible_key(0))


def test_has_aux_without_aux():
    with pytest.raises(ValueError, match="has_aux"):
        clipped_grad(lambda w, x: jnp.sum(w * x), l2_clip_norm=1.0, has_aux=True)(
            jnp.ones(3), jnp.ones((2, 3))
        )


def test_charges_of_an_unknown_scope(tmp_path):
    with pytest.raises(ValueError, match="no budget was opened"):
        Ledger(tmp_path / "l.sqlite").charges("typo")


@pytest.mark.parametrize("value", [np.float32(1.0), np.int64(4)])
def test_numpy_scalars_are_numbers(value):
    tx = add_noise(value, 1.0, value, keys.reproducible_key(0))
    out, _ = tx.update(jnp.ones(3), tx.init(jnp.ones(3)))
    assert out.dtype == jnp.float32


def test_two_samplers_of_one_key_raise(monkeypatch):
    rng = SecureKey.generate()
    monkeypatch.setattr(keys._reuse_allowed, "value", False)
    PoissonSampler(10, 0.5, 10, rng)
    with pytest.raises(ValueError, match="key"):
        PoissonSampler(10, 0.5, 10, rng)


def test_a_refused_call_leaves_the_key_unused(monkeypatch):
    monkeypatch.setattr(keys._reuse_allowed, "value", False)
    privacy = AttentionPrivacy(
        unit="record", noise_multiplier=1.0, value_clip=1.0, adjacency="add_remove", logit_bound=0.0
    )
    rng, x = SecureKey.generate().key(), jnp.ones((1, 3, 1, 4))
    call = functools.partial(dp_dot_product_attention, x, x, x, privacy=privacy, rng=rng)
    for bad in ({"mask": jnp.ones((3, 3), bool)}, {"implementation": "cuda"}):
        with pytest.raises(ValueError, match=r"mask|implementation"):
            call(**bad)
    assert call(key_value_seq_lengths=[2]).shape == x.shape


def test_importing_starts_no_back_end():
    """A program must still be able to choose devices or call jax.distributed.initialize."""
    code = (
        "import dpfa_jax, dpfa_jax.linen, dpfa_jax.nnx, jax\n"
        "jax.config.update('jax_num_cpu_devices', 3)\n"
        "assert jax.device_count() == 3"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
