"""Claims of sampled training under attack: the sampler's own event, through its accountant."""

import jax
import numpy as np
import pytest

from dpfa_jax import keys
from dpfa_jax.audit import audit_sampled, sampled, sampled_cases


@pytest.mark.parametrize("number", [0, 3])
def test_claims_stand(number, stands):
    case = sampled_cases()[number]
    stands(audit_sampled(case, rng=keys.reproducible_key(860 + number)))


@pytest.mark.parametrize("number", [0, 2])
def test_the_releases_are_the_canary_and_the_noise(number):
    """Along the canary: 1/z where it joined (1/(2z) under replace_one), unit noise, no others.

    2,000 runs of four steps: a mean of 2,000 unit normals is off by 0.16, seven deviations of it,
    with probability below 10⁻¹¹.
    """
    case = sampled_cases()[number]
    joins = np.zeros((2000, case.steps), bool)
    joins[:, 1] = True
    noise = jax.random.split(keys.reproducible_key(870 + number), 2000)
    r = np.asarray(sampled._releases(case, "vmap")(noise, joins, np.float32(1.0)))
    shift = 1 / case.noise_multiplier / (2 if case.adjacency == "replace_one" else 1)
    np.testing.assert_allclose(r.mean(0), np.where(joins[0], shift, 0.0), atol=0.16)
    np.testing.assert_allclose(r.std(0), 1.0, atol=0.11)


def test_bad_input():
    case = sampled_cases()[0]
    key = keys.reproducible_key(880)
    with pytest.raises(ValueError, match="samples=19"):
        audit_sampled(case, rng=key, samples=19)
    with pytest.raises(ValueError, match="rng=None"):
        audit_sampled(case, rng=None)
    with pytest.raises(ValueError, match="engine='no'"):
        audit_sampled(case, rng=key, engine="no")
