"""Adam with the noise variance subtracted, against a transcription of the algorithm."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpfa_jax import add_noise, keys
from dpfa_jax.optim import dp_adamw, noise_std, scale_by_dp_adam

PARAMS = {"w": jnp.zeros((3, 2)), "b": jnp.zeros(4)}


@pytest.fixture(autouse=True)
def _compare_under_equal_noise():
    with keys.allow_reuse_for_tests():
        yield


def gradients(steps, seed=0, scale=1.0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return [
        jax.tree.map(lambda p: jnp.asarray(scale * rng.normal(size=p.shape), dtype), PARAMS)
        for _ in range(steps)
    ]


def run(tx, grads, params=None):
    params = jax.tree.map(jnp.zeros_like, grads[0]) if params is None else params
    state, out = tx.init(params), []
    update = jax.jit(tx.update)
    for g in grads:
        updates, state = update(g, state, params)
        out.append(updates)
    return out, state


def dp_adam_bc64(grads, *, beta1, beta2, phi, gamma_prime):
    """DP-AdamBC as the paper's algorithm 1 has it, float64; η = 1, sign of the update +."""
    m = [np.zeros_like(g) for g in grads[0]]
    v = [np.zeros_like(g) for g in grads[0]]
    out = []
    for t, g_tilde in enumerate(grads, start=1):
        step = []
        for i, g in enumerate(g_tilde):
            m[i] = beta1 * m[i] + (1 - beta1) * g
            v[i] = beta2 * v[i] + (1 - beta2) * g**2
            m_hat = m[i] / (1 - beta1**t)
            v_hat = v[i] / (1 - beta2**t)
            step.append(m_hat / np.sqrt(np.maximum(v_hat - phi, gamma_prime)))
        out.append(step)
    return out


@pytest.mark.parametrize(("b1", "b2"), [(0.9, 0.999), (0.0, 0.9), (0.5, 0.0)])
def test_without_noise_it_is_adam(b1, b2):
    grads = gradients(12)
    ours, _ = run(scale_by_dp_adam(0.0, b1=b1, b2=b2, floor=1e-12), grads)
    with jax.numpy_dtype_promotion("standard"):  # Optax's Adam is not strict
        adam, _ = run(optax.scale_by_adam(b1=b1, b2=b2, eps=0.0), grads)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(adam), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5)


@pytest.mark.parametrize(
    ("std", "floor"), [(0.5, None), (0.5, 0.1), (2.0, 0.5), (0.0, None), (1e-3, 1e-6)]
)
def test_against_the_papers_algorithm_in_float64(std, floor):
    grads = gradients(30, seed=1)
    ours, _ = run(scale_by_dp_adam(std, b1=0.9, b2=0.99, floor=floor), grads)
    least = floor if floor is not None else (std or 1e-8)
    wide = [[np.asarray(x, np.float64) for x in jax.tree.leaves(g)] for g in grads]
    expected = dp_adam_bc64(wide, beta1=0.9, beta2=0.99, phi=std**2, gamma_prime=least**2)
    for t, (a, b) in enumerate(zip(ours, expected, strict=True)):
        for x, y in zip(jax.tree.leaves(a), b, strict=True):
            # v̂ − φ cancels; relative to the floor what float32 leaves is below this.
            np.testing.assert_allclose(x, y, rtol=2e-3, atol=1e-6, err_msg=f"step {t}")
    assert np.isfinite(np.concatenate([np.ravel(x) for x in jax.tree.leaves(ours)])).all()


def test_the_floor_binds_where_the_noise_is_all_there_is():
    """v̂ < φ gives a negative difference: the divisor is the floor, never NaN."""
    (first,), _ = run(scale_by_dp_adam(1.0, floor=0.25), [{"w": jnp.array([0.5, -0.1, 0.0])}])
    np.testing.assert_allclose(first["w"], [2.0, -0.4, 0.0], rtol=1e-4)
    (default,), _ = run(scale_by_dp_adam(1.0), [{"w": jnp.array([0.5, -0.1, 0.0])}])
    np.testing.assert_allclose(default["w"], [0.5, -0.1, 0.0], rtol=1e-4)


def test_a_zero_gradient_without_noise_stays_zero():
    out, _ = run(scale_by_dp_adam(0.0), [jax.tree.map(jnp.zeros_like, PARAMS)] * 3)
    assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves(out))


def test_the_correction_recovers_the_signals_second_moment():
    """Gradient 1 under noise of std 3: E[g̃²] = 10, of which 9 is known."""
    steps, width, std = 4000, 512, 3.0
    # One coordinate's v̂ has std √(2·81 + 4·9)·√((1−b2)/2) = 0.31; the mean of 512: 0.014.
    noise = jax.random.normal(jax.random.key(0), (steps, width)) * std

    def last(noise_std_assumed):
        tx = scale_by_dp_adam(noise_std_assumed, floor=0.2)

        def body(state, n):
            out, state = tx.update(1.0 + n, state)
            return state, out

        state, out = jax.lax.scan(body, tx.init(jnp.zeros(width)), noise)
        return state, jnp.mean(out[-500:], axis=0)

    state, corrected = jax.jit(lambda: last(std))()
    v_hat = np.asarray(state.nu, np.float64) / (1 - 0.999**steps)
    assert v_hat.mean() - std**2 == pytest.approx(1.0, abs=0.1)
    # m̂/√(v̂ − φ) is about 1/√1; uncorrected Adam gives 1/√10.
    assert np.median(corrected) == pytest.approx(1.0, abs=0.1)
    _, plain = jax.jit(lambda: last(0.0))()
    assert np.median(plain) == pytest.approx(10**-0.5, abs=0.05)


def test_it_knows_the_noise_that_add_noise_makes():
    """noise_std is what stands in the second moment of a release of nothing."""
    clip, z, batch = 0.4, 2.0, 16.0
    for adjacency in ("add_remove", "replace_one"):
        std = noise_std(clip, z, batch, adjacency)
        tx = optax.chain(
            add_noise(clip, z, batch, keys.reproducible_key(0), adjacency=adjacency),
            scale_by_dp_adam(std, b2=0.9),
        )
        zeros = jnp.zeros(20_000)
        _, state = tx.update(zeros, tx.init(zeros), zeros)
        v_hat = np.asarray(state[1].nu, np.float64) / (1 - 0.9)
        assert v_hat.mean() == pytest.approx(std**2, rel=6 * np.sqrt(2 / 20_000))


def test_dp_adamw_is_decoupled_decay_and_a_schedule():
    schedule = optax.linear_schedule(1.0, 0.0, transition_steps=10)
    params = jax.tree.map(lambda p: p + 2.0, PARAMS)
    grads = gradients(5)
    whole, _ = run(dp_adamw(schedule, 0.5, floor=0.3, weight_decay=0.1), grads, params)
    core, _ = run(scale_by_dp_adam(0.5, floor=0.3), grads, params)
    for t, (a, b) in enumerate(zip(whole, core, strict=True)):
        rate = 1.0 - t / 10
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            np.testing.assert_allclose(x, -rate * (np.asarray(y) + 0.1 * 2.0), rtol=1e-5, atol=1e-6)


def test_dp_adamw_without_noise_is_adamw():
    params = jax.tree.map(lambda p: p + 2.0, PARAMS)
    grads = gradients(6)
    ours, _ = run(dp_adamw(0.01, 0.0, floor=1e-12, weight_decay=0.1), grads, params)
    with jax.numpy_dtype_promotion("standard"):  # Optax's Adam is not strict
        adamw, _ = run(optax.adamw(0.01, eps=0.0, weight_decay=0.1), grads, params)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(adamw), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_updates_keep_the_gradients_dtype_and_the_state_scans(dtype):
    """Under strict promotion (conftest)."""
    params = jax.tree.map(lambda p: p.astype(dtype), PARAMS)
    grads = jax.tree.map(lambda *x: jnp.stack(x), *gradients(4, scale=0.5, dtype=dtype))
    tx = dp_adamw(1e-2, 0.1, weight_decay=0.1)

    def body(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        return (optax.apply_updates(params, updates), state), updates

    (last, _), updates = jax.lax.scan(body, (params, tx.init(params)), grads)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    assert {x.dtype for x in jax.tree.leaves(last)} == {jnp.dtype(dtype)}
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(last))


@pytest.mark.parametrize("bad", [-0.1, float("nan"), float("inf"), "1", None])
def test_noise_std_that_is_not_allowed(bad):
    with pytest.raises(ValueError, match="noise_std="):
        scale_by_dp_adam(bad)
    with pytest.raises(ValueError, match="noise_std="):
        dp_adamw(1e-3, bad)


@pytest.mark.parametrize("name", ["b1", "b2"])
@pytest.mark.parametrize("bad", [-0.1, 1.0, 2.0, float("nan")])
def test_decays_that_are_not_allowed(name, bad):
    with pytest.raises(ValueError, match=f"{name}="):
        scale_by_dp_adam(0.1, **{name: bad})


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_floors_that_are_not_allowed(bad):
    with pytest.raises(ValueError, match="floor="):
        scale_by_dp_adam(0.1, floor=bad)
