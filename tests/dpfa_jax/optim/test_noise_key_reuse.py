"""One key, one stream of noise: a second use raises, and no two leaves share a draw."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpfa_jax import SecureKey, add_noise, dp_aggregate, keys
from dpfa_jax.optim import with_fresh_key


@pytest.mark.parametrize("first", [add_noise, dp_aggregate])
@pytest.mark.parametrize("second", [add_noise, dp_aggregate])
@pytest.mark.parametrize("as_array", [False, True])
def test_a_key_for_two_transformations_raises(first, second, as_array):
    secure = SecureKey.generate()
    rng = secure.key() if as_array else secure
    first(1.0, 1.0, 4.0, rng)
    with pytest.raises(ValueError, match="this key has made noise before"):
        second(2.0, 1.0, 8.0, rng)
    second(2.0, 1.0, 8.0, SecureKey.generate())


def test_a_refused_transformation_uses_no_key_up():
    rng = SecureKey.generate()
    for bad in ({"l2_clip_norm": 0.0}, {"noise_multiplier": -1.0}, {"expected_batch_size": 0.0}):
        args = {"l2_clip_norm": 1.0, "noise_multiplier": 1.0, "expected_batch_size": 4.0} | bad
        with pytest.raises(ValueError, match=f"{next(iter(bad))}="):
            add_noise(rng=rng, **args)
    add_noise(1.0, 1.0, 4.0, rng)


def test_a_restored_state_does_not_take_a_used_key():
    rng = SecureKey.generate()
    state = add_noise(1.0, 1.0, 4.0, rng).init(jnp.zeros(3))
    with pytest.raises(ValueError, match="this key has made noise before"):
        with_fresh_key(state, rng)


def test_children_of_a_key_are_keys_of_their_own():
    root = SecureKey.generate().key()
    children = [jax.random.fold_in(root, i) for i in range(3)]
    for child in children:
        add_noise(1.0, 1.0, 4.0, child)
    with pytest.raises(ValueError, match="made noise before"):
        add_noise(1.0, 1.0, 4.0, jax.random.fold_in(root, 1))


def test_multi_transform_gives_each_group_its_own_noise():
    """Each group sees a tree with leaves left out: the first leaf of each is not 'leaf 0'."""
    with keys.allow_reuse_for_tests():
        one = add_noise(1.0, 1.0, 1.0, keys.reproducible_key(0))
    tx = optax.multi_transform(
        {"a": one, "b": one, "c": optax.set_to_zero()},
        {"x": "a", "y": "b", "z": "c", "deep": {"x": "a"}},
    )
    zeros = {k: jnp.zeros(64) for k in "xyz"} | {"deep": {"x": jnp.zeros(64)}}
    out, _ = tx.update(zeros, tx.init(zeros))
    assert (np.asarray(out["z"]) == 0).all()
    drawn = [np.asarray(v) for v in (out["x"], out["y"], out["deep"]["x"])]
    assert all((d != 0).any() for d in drawn)
    for i, a in enumerate(drawn):
        for b in drawn[:i]:
            assert (a == b).mean() < 0.1
