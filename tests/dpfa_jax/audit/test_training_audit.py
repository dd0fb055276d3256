"""DP-SGD's claims under attack, through every engine that ``clipped_grad`` names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpfa_jax import clipped_grad, keys
from dpfa_jax.audit import audit_training, engines, training, training_cases

CASES = {case.name: case for case in training_cases()}


@pytest.mark.parametrize(
    "name",
    [
        "training, add_remove, two steps",
        "training, replace_one, four steps of DP AdamW",
        "training, add_remove, a NaN example",
    ],
)
def test_claims_stand(name, stands):
    key = keys.reproducible_key(800 + list(CASES).index(name))
    stands(audit_training(CASES[name], rng=key))


@pytest.mark.parametrize("engine", engines())
def test_every_engine_bounds_a_kernel_that_is_used_twice(engine, stands):
    name = "training, add_remove, a kernel used twice"
    key = keys.reproducible_key(820 + engines().index(engine))
    stands(audit_training(CASES[name], rng=key, engine=engine))


@pytest.mark.parametrize("case", training_cases(), ids=lambda case: case.name)
def test_the_canary_is_what_it_is_said_to_be(case):
    """Its direction and length against JAX's own gradient; the others pull the other way."""
    x, t, is_padding = training._batch(case, positive=True)
    params = {"kernel": jnp.zeros((3, 4)), "bias": jnp.zeros(4)}
    gradient = jax.grad(training._loss(case.is_tied))(params, x[0], t[0])
    kernel, bias, _ = training._canary(case.is_tied, "vmap")
    flat = np.concatenate([gradient["kernel"].ravel(), gradient["bias"]])
    unit = np.concatenate([kernel.ravel(), bias])
    assert np.linalg.norm(unit) == pytest.approx(1.0)
    np.testing.assert_allclose(flat, 60 * training.CLIP * unit, rtol=1e-5, atol=1e-6)
    assert is_padding.sum() == 2
    assert not is_padding[0]
    grad = clipped_grad(training._loss(case.is_tied), l2_clip_norm=0.5, batch_argnums=(1, 2))
    total = grad(params, x, t, is_padding_example=is_padding)
    along = np.concatenate([total["kernel"].ravel(), total["bias"]]) @ unit
    assert along == pytest.approx(training.CLIP * (1 - training.OTHERS), rel=1e-4)


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("engine", engines())
def test_the_attacker_looks_along_the_clipped_canary(engine, is_tied):
    """Where leaves are clipped alone, that is not the gradient's direction."""
    case = training.TrainingCase(name="", adjacency="add_remove", is_tied=is_tied)
    x, t, is_padding = training._batch(case, positive=True)
    is_padding[1:] = True
    params = {"kernel": jnp.zeros((3, 4)), "bias": jnp.zeros(4)}
    grad = clipped_grad(
        training._loss(is_tied), l2_clip_norm=0.5, engine=engine, batch_argnums=(1, 2)
    )
    total = grad(params, x, t, is_padding_example=is_padding)
    kernel, bias, _ = training._canary(is_tied, engine)
    along = np.sum(total["kernel"] * kernel) + np.sum(total["bias"] * bias)
    assert along == pytest.approx(training.CLIP, rel=1e-3)


def test_bad_input():
    case = training_cases()[0]
    key = keys.reproducible_key(840)
    with pytest.raises(ValueError, match="samples=19"):
        audit_training(case, rng=key, samples=19)
    with pytest.raises(ValueError, match="mu=0"):
        audit_training(case, rng=key, mu=0)
    with pytest.raises(ValueError, match="engine='no'"):
        audit_training(case, rng=key, engine="no")
    with pytest.raises(ValueError, match="rng=None"):
        audit_training(case, rng=None)
