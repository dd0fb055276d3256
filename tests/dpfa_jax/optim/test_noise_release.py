"""``add_noise`` and ``dp_aggregate``: agreement, refusals, state, and chaining."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpfa_jax
from dpfa_jax import SecureKey, add_noise, dp_aggregate, keys
from dpfa_jax.clipping.tree import clip_and_sum
from dpfa_jax.optim import DPNoiseState, noise_std, with_fresh_key, without_keys

KEY = keys.reproducible_key(0)
PARAMS = {"w": jnp.zeros((3, 4)), "b": jnp.zeros(4)}


@pytest.fixture(autouse=True)
def _compare_under_equal_noise():
    with keys.allow_reuse_for_tests():
        yield


def per_example(batch=6, seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    scale = np.geomspace(1e-2, 1e2, batch)
    return {
        "w": jnp.asarray(rng.normal(size=(batch, 3, 4)) * scale[:, None, None], dtype),
        "b": jnp.asarray(rng.normal(size=(batch, 4)) * scale[:, None], dtype),
    }


def once(tx, updates):
    return jax.jit(tx.update)(updates, tx.init(PARAMS))[0]


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


# --- one release -----------------------------------------------------------------------


@pytest.mark.parametrize("adjacency", ["add_remove", "replace_one"])
@pytest.mark.parametrize("noise_multiplier", [0.0, 1.3])
def test_dp_aggregate_is_clip_and_sum_then_add_noise(adjacency, noise_multiplier):
    args = (0.7, noise_multiplier, 5.0, KEY)
    whole = dp_aggregate(*args, adjacency=adjacency)
    noise = add_noise(*args, adjacency=adjacency)
    # Eagerly without noise: there is no grid then to absorb how jit fuses a sum.
    jit = jax.jit if noise_multiplier else (lambda f: f)
    update, add = jit(whole.update), jit(noise.update)
    state, noise_state = whole.init(PARAMS), noise.init(PARAMS)
    for step in range(3):
        grads = per_example(seed=step)
        out, state = update(grads, state)
        total = clip_and_sum(grads, 0.7, None)
        expected, noise_state = add(total, noise_state)
        assert_same(out, expected)
    assert int(state.step) == int(noise_state.step) == 3


def test_dp_aggregate_releases_what_clipped_grad_then_add_noise_releases():
    def loss(p, x):
        return jnp.sum(jnp.tanh(x @ p["w"]) * 3.0) + jnp.sum(p["b"]) * x[0]

    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)), jnp.float32)
    grads = jax.vmap(jax.grad(loss), in_axes=(None, 0))(PARAMS, x)
    total = dpfa_jax.clipped_grad(loss, l2_clip_norm=0.7)(PARAMS, x)
    a = once(dp_aggregate(0.7, 1.0, 6, KEY), grads)
    b = once(add_noise(0.7, 1.0, 6, KEY), total)
    assert_same(a, b)


def test_noise_multiplier_zero_is_the_exact_clipped_mean():
    grads = {"w": jnp.array([[0.5, 0.25], [0.125, -0.5], [0.0, 0.75]])}
    out = once(dp_aggregate(1.0, 0.0, 8.0, KEY), grads)
    np.testing.assert_array_equal(out["w"], [0.625 / 8, 0.5 / 8])
    out = once(add_noise(1.0, 0, 3, KEY), {"w": jnp.array([1.0, 2.0])})
    np.testing.assert_array_equal(out["w"], np.float32([1, 2]) / np.float32(3))


def test_the_mean_divides_by_the_public_constant_not_by_the_batch():
    grads = {"w": jnp.full((4, 2), 0.125)}
    twice = {"w": jnp.full((8, 2), 0.125)}
    tx = dp_aggregate(1.0, 0.0, 10.0, KEY)
    np.testing.assert_array_equal(once(tx, grads)["w"], np.full(2, np.float32(0.05)))
    np.testing.assert_array_equal(once(tx, twice)["w"], np.full(2, np.float32(0.1)))


def test_the_noise_does_not_depend_on_the_data_nor_on_the_batch_size():
    """Same key, other data: the two releases differ by the clipped difference alone."""
    tx = dp_aggregate(1.0, 1.0, 4.0, KEY)
    a, b = per_example(6, seed=1), per_example(9, seed=2)
    a_sum, b_sum = clip_and_sum(a, 1.0, None), clip_and_sum(b, 1.0, None)
    grid = 2.0**-10
    for name in ("w", "b"):
        got = np.asarray(once(tx, a)[name]) - np.asarray(once(tx, b)[name])
        want = (np.asarray(a_sum[name]) - np.asarray(b_sum[name])) / 4.0
        np.testing.assert_allclose(got, want, rtol=0, atol=1.01 * grid / 4.0)


# --- what optax.contrib.differentially_private_aggregate gets wrong -------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_a_bad_example_contributes_zero(bad):
    grads = per_example()
    poisoned = {**grads, "b": grads["b"].at[2, 1].set(bad)}
    zeroed = jax.tree.map(lambda x: x.at[2].set(0.0), grads)
    tx = dp_aggregate(1.0, 1.0, 6.0, KEY)
    assert_same(once(tx, poisoned), once(tx, zeroed))


def test_a_sum_of_nothing_releases_pure_noise():
    tx = dp_aggregate(1.0, 1.0, 6.0, KEY)
    empty = jax.tree.map(jnp.zeros_like, per_example())
    out = once(tx, empty)
    flat = np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(out)])
    assert np.isfinite(flat).all()
    assert np.unique(flat).size == flat.size  # sixteen draws
    assert 0.3 < flat.std() * 6.0 < 3.0
    again = once(add_noise(1.0, 1.0, 6.0, KEY), jax.tree.map(jnp.zeros_like, PARAMS))
    assert_same(out, again)


@pytest.mark.parametrize("make", [add_noise, dp_aggregate])
def test_the_key_is_mandatory(make):
    with pytest.raises(ValueError, match="rng=None: noise needs a key"):
        make(1.0, 1.0, 4.0, None)
    with pytest.raises(TypeError):
        make(1.0, 1.0, 4.0)  # no default either


@pytest.mark.parametrize("make", [add_noise, dp_aggregate])
@pytest.mark.parametrize(
    "rng", [0, 42, "key", np.zeros(8, np.uint32), jnp.zeros(8, jnp.uint32), jax.random.key(0)]
)
def test_other_keys_are_refused(make, rng):
    with pytest.raises(ValueError, match="rng is a "):
        make(1.0, 1.0, 4.0, rng)


def test_a_raw_threefry_key_is_refused():
    with pytest.raises(ValueError, match="rng is a "):
        add_noise(1.0, 1.0, 4.0, jax.random.PRNGKey(0))


def test_two_fresh_keys_give_two_releases_and_a_secure_key_is_taken_as_it_is():
    secure = SecureKey.generate()
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    a = once(add_noise(1.0, 1.0, 4.0, secure), zeros)
    b = once(add_noise(1.0, 1.0, 4.0, secure.key()), zeros)
    c = once(add_noise(1.0, 1.0, 4.0, SecureKey.generate()), zeros)
    assert_same(a, b)
    assert not np.isin(np.asarray(a["w"]), np.asarray(c["w"])).any()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_short_gradients_get_float32_noise(dtype):
    """jax.random.normal(dtype=bfloat16) has 128 values and never exceeds 2.89."""
    n = 200_000
    grads = jnp.zeros((2, n), dtype)
    tx = dp_aggregate(1.0, 1.0, 1.0, KEY)
    out, _ = tx.update(grads, tx.init(jnp.zeros(n, dtype)))
    assert out.dtype == dtype
    values = np.asarray(out).astype(np.float64)
    # 2·(1 − Φ(2.9)) = 0.0037: 746 expected, 600 is more than five standard deviations off.
    assert 600 < (np.abs(values) > 2.9).sum() < 900
    assert np.abs(values).max() > 4.0
    assert np.unique(values).size > 1000
    # The same draws as for float32, rounded once at the end.
    wide = add_noise(1.0, 1.0, 1.0, KEY)
    reference, _ = wide.update(jnp.zeros(n), wide.init(jnp.zeros(n)))
    np.testing.assert_array_equal(out, reference.astype(dtype))


def test_short_gradients_are_summed_in_float32():
    grads = jnp.ones((1000, 2), jnp.bfloat16)  # a bfloat16 sum stops at 256
    tx = dp_aggregate(10.0, 0.0, 1000.0, KEY)
    out, _ = tx.update(grads, tx.init(jnp.zeros(2, jnp.bfloat16)))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out.astype(jnp.float32), [1.0, 1.0])


# --- numbers and shapes that are not allowed --------------------------------------------


@pytest.mark.parametrize("make", [add_noise, dp_aggregate])
@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf"), "1", None])
def test_numbers_that_are_not_allowed(make, bad):
    with pytest.raises(ValueError, match="l2_clip_norm="):
        make(bad, 1.0, 4.0, KEY)
    with pytest.raises(ValueError, match="noise_multiplier="):
        make(1.0, bad, 4.0, KEY)
    with pytest.raises(ValueError, match="expected_batch_size="):
        make(1.0, 1.0, bad, KEY)


@pytest.mark.parametrize("make", [add_noise, dp_aggregate])
def test_zero_is_allowed_for_the_noise_only(make):
    make(1.0, 0.0, 4.0, KEY)
    with pytest.raises(ValueError, match="l2_clip_norm="):
        make(0.0, 1.0, 4.0, KEY)
    with pytest.raises(ValueError, match="expected_batch_size="):
        make(1.0, 1.0, 0.0, KEY)
    with pytest.raises(ValueError, match="adjacency='zero_out'"):
        make(1.0, 1.0, 4.0, KEY, adjacency="zero_out")


@pytest.mark.parametrize(
    "updates",
    [
        {"w": jnp.zeros((2, 3)), "b": jnp.zeros((3, 3))},
        {"w": jnp.zeros((2, 3)), "b": jnp.float32(0)},
        jnp.float32(0),
        {},
    ],
    ids=["2 and 3", "scalar beside", "scalar", "no leaf"],
)
def test_updates_without_a_common_batch_axis(updates):
    tx = dp_aggregate(1.0, 1.0, 4.0, KEY)
    with pytest.raises(ValueError, match="updates: per-example gradients are needed"):
        tx.update(updates, tx.init(PARAMS))


def test_noise_std_is_z_c_k_over_b():
    assert noise_std(2.0, 3.0, 4.0) == 1.5
    assert noise_std(2.0, 3.0, 4.0, "replace_one") == 3.0
    assert noise_std(2.0, 0.0, 4.0) == 0.0
    with pytest.raises(ValueError, match="adjacency="):
        noise_std(2.0, 3.0, 4.0, "other")


# --- state -----------------------------------------------------------------------------


def test_the_state_goes_through_jit_and_scan():
    tx = dp_aggregate(1.0, 1.0, 6.0, KEY)
    batches = [per_example(seed=s) for s in range(4)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *batches)
    eager, state = [], tx.init(PARAMS)
    update = jax.jit(tx.update)
    for grads in batches:
        out, state = update(grads, state)
        eager.append(out)

    @jax.jit
    def run(state, stacked):
        def body(state, grads):
            out, state = tx.update(grads, state)
            return state, out

        return jax.lax.scan(body, state, stacked)

    scanned_state, scanned = run(tx.init(PARAMS), stacked)
    for i, out in enumerate(eager):
        for name in ("w", "b"):
            # One grid step: the sum may be fused in another order.
            np.testing.assert_allclose(scanned[name][i], out[name], rtol=0, atol=2.0**-10 / 6)
    assert int(scanned_state.step) == int(state.step) == 4
    assert scanned_state.step.dtype == jnp.uint32


def test_a_restored_state_continues_the_same_stream():
    """Step s has the same noise whether or not the steps before it ran here."""
    tx = add_noise(1.0, 1.0, 1.0, KEY)
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    state = tx.init(PARAMS)
    _, state = tx.update(zeros, state)
    expected, _ = tx.update(zeros, state)
    out, _ = tx.update(zeros, DPNoiseState(jnp.uint32(1), KEY))
    assert_same(out, expected)


def test_without_keys_holds_no_key_and_can_be_saved():
    tx = optax.chain(add_noise(1.0, 1.0, 1.0, KEY), optax.adamw(1e-3))
    state = tx.init(PARAMS)
    with jax.numpy_dtype_promotion("standard"):  # Optax's Adam is not strict
        _, state = tx.update(PARAMS, state, PARAMS)
    saved = without_keys(state)
    assert saved[0].key is None
    assert int(saved[0].step) == 1
    assert int(saved[1][0].count) == 1
    secret = np.asarray(jax.random.key_data(KEY)).tobytes()
    assert secret not in pickle.dumps(jax.tree.map(np.asarray, saved))


def test_with_fresh_key_gives_each_noise_state_a_key_of_its_own():
    tx = optax.chain(
        add_noise(1.0, 1.0, 1.0, keys.reproducible_key(1)),
        optax.scale(0.0),
        add_noise(1.0, 1.0, 1.0, keys.reproducible_key(2)),
    )
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    _, state = tx.update(zeros, tx.init(PARAMS))
    fresh = keys.reproducible_key(3)
    renewed = with_fresh_key(without_keys(state), fresh)
    assert int(renewed[0].step) == int(renewed[2].step) == 1
    words = [
        np.asarray(jax.random.key_data(k)).tobytes()
        for k in (fresh, state[0].key, state[2].key, renewed[0].key, renewed[2].key)
    ]
    assert len(set(words)) == 5
    old, _ = tx.update(zeros, state)
    new, _ = tx.update(zeros, renewed)
    assert not np.isin(np.asarray(new["w"]), np.asarray(old["w"])).any()
    assert with_fresh_key(state, SecureKey.generate())[0].key.dtype == KEY.dtype


def test_with_fresh_key_refuses():
    state = add_noise(1.0, 1.0, 1.0, KEY).init(PARAMS)
    with pytest.raises(ValueError, match="rng=None"):
        with_fresh_key(state, None)
    with pytest.raises(ValueError, match="rng is a "):
        with_fresh_key(state, jax.random.key(0))
    with pytest.raises(ValueError, match="opt_state: holds no noise state"):
        with_fresh_key(optax.adamw(1e-3).init(PARAMS), keys.reproducible_key(9))


# --- in a chain ------------------------------------------------------------------------


def test_chained_with_adamw_under_jit_and_scan():
    def loss(p, x):
        return jnp.sum((x @ p["w"] + p["b"]) ** 2)

    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)
    params = jax.tree.map(lambda p: p + 1.0, PARAMS)
    grad = dpfa_jax.clipped_grad(loss, l2_clip_norm=1.0, microbatch_size=3)
    tx = optax.chain(add_noise(1.0, 1.0, 8.0, KEY), optax.adamw(0.1, weight_decay=0.01))

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(grad(params, x), state, params)
        return (optax.apply_updates(params, updates), state), None

    start = carry = (params, tx.init(params))
    one, five = jax.jit(step), jax.jit(lambda c: jax.lax.scan(step, c, None, length=5)[0])
    with jax.numpy_dtype_promotion("standard"):  # Optax's Adam is not strict
        for _ in range(5):
            carry, _ = one(carry, None)
        scanned = five(start)
    for name in ("w", "b"):
        np.testing.assert_allclose(scanned[0][name], carry[0][name], rtol=0, atol=2e-3)
        assert not np.allclose(carry[0][name], params[name])
    assert int(scanned[1][0].step) == 5


def test_masked_parameters_get_noise_only_where_they_train():
    tx = optax.masked(add_noise(1.0, 1.0, 1.0, KEY), {"w": True, "b": False})
    out, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    assert (np.asarray(out["w"]) != 0).all()
    np.testing.assert_array_equal(out["b"], PARAMS["b"])


def test_the_public_names():
    assert dpfa_jax.add_noise is add_noise
    assert dpfa_jax.dp_aggregate is dp_aggregate
