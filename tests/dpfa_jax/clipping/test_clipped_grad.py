"""``clipped_grad`` against gradients taken one example at a time and clipped in float64.

Flax models are in test_engines.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpfa_jax
from dpfa_jax import clipped_grad, keys

MICROBATCH_SIZES = [None, 1, 3, 7, 100]
BATCH = 7


def clip64(tree, l2_clip_norm):
    """One gradient, clipped in float64 NumPy."""
    tree = jax.tree.map(lambda x: np.asarray(x).astype(np.float64), tree)
    norm = np.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(tree)))
    factor = min(1.0, l2_clip_norm / norm) if norm > 0 else 1.0
    return jax.tree.map(lambda x: factor * x, tree), norm


def brute_force(loss, args, batch_argnums, l2_clip_norm, argnums=0):
    """Σ clip(∇) with one call of ``jax.grad`` for each example. Also the norms."""
    batch = jax.tree.leaves(args[batch_argnums[0]])[0].shape[0]
    grad = jax.jit(jax.grad(loss, argnums=argnums))
    total, norms = None, []
    for b in range(batch):
        row = [
            jax.tree.map(lambda x: x[b], a) if i in batch_argnums else a  # noqa: B023
            for i, a in enumerate(args)
        ]
        clipped, norm = clip64(grad(*row), l2_clip_norm)
        norms.append(norm)
        total = clipped if total is None else jax.tree.map(np.add, total, clipped)
    return total, np.array(norms)


def assert_trees_close(actual, expected, tolerance=2e-5):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(expected))
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert x.dtype == jnp.float32
        np.testing.assert_allclose(np.asarray(x), y, rtol=0, atol=tolerance * largest)


# --- a model ---------------------------------------------------------------------------


def mlp():
    rng = np.random.default_rng(0)
    params = {
        "w1": rng.normal(size=(5, 8)),
        "b1": rng.normal(size=8),
        "w2": rng.normal(size=(8, 3)),
        "b2": rng.normal(size=3),
    }
    params = {k: jnp.asarray(v, jnp.float32) for k, v in params.items()}
    # Scales from tiny to huge: some examples are clipped and some are not.
    x = rng.normal(size=(BATCH, 5)) * np.geomspace(1e-3, 10, BATCH)[:, None]
    y = rng.integers(0, 3, BATCH)
    return params, jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.int32)


def mlp_loss(params, x, y):
    hidden = jnp.tanh(x @ params["w1"] + params["b1"])
    return -jax.nn.log_softmax(hidden @ params["w2"] + params["b2"])[y]


def mlp_gradient64(params, x, y):
    """Backpropagation written out in float64 NumPy: no JAX in it."""
    p = {k: np.asarray(v, np.float64) for k, v in params.items()}
    hidden = np.tanh(x @ p["w1"] + p["b1"])
    logits = hidden @ p["w2"] + p["b2"]
    d_logits = np.exp(logits - logits.max())
    d_logits /= d_logits.sum()
    d_logits[y] -= 1.0
    d_hidden = (p["w2"] @ d_logits) * (1 - hidden**2)
    return {
        "w1": np.outer(x, d_hidden),
        "b1": d_hidden,
        "w2": np.outer(hidden, d_logits),
        "b2": d_logits,
    }


# --- the sum ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("l2_clip_norm", "microbatch_size"),
    [(1e-3, 3), (1e3, 3), *((1.0, size) for size in MICROBATCH_SIZES)],
)
def test_mlp_against_float64_backpropagation(l2_clip_norm, microbatch_size):
    params, x, y = mlp()
    expected, norms = None, []
    for row, label in zip(np.asarray(x, np.float64), np.asarray(y), strict=True):
        clipped, norm = clip64(mlp_gradient64(params, row, label), l2_clip_norm)
        norms.append(norm)
        expected = clipped if expected is None else jax.tree.map(np.add, expected, clipped)
    if l2_clip_norm == 1.0:  # the case must contain both kinds
        assert min(norms) < 1.0 < max(norms)
    grad = clipped_grad(
        mlp_loss,
        l2_clip_norm=l2_clip_norm,
        batch_argnums=(1, 2),
        microbatch_size=microbatch_size,
    )
    assert_trees_close(jax.jit(grad)(params, x, y), expected)


def test_tied_parameter_is_clipped_by_its_whole_gradient():
    """A parameter used twice: the norm is that of the summed gradient, not of each use."""

    def loss(w, x):
        return jnp.sum(w * x) + 2.0 * jnp.sum(w * x)

    x = jnp.array([[3.0, 4.0]])
    total = clipped_grad(loss, l2_clip_norm=1.0)(jnp.ones(2), x)
    np.testing.assert_allclose(total, [0.6, 0.8], rtol=1e-5)


@pytest.mark.parametrize("microbatch_size", [None, 3])
def test_the_norm_is_joint_over_all_differentiated_arguments(microbatch_size):
    def loss(a, x, b, y):
        return jnp.sum(a["u"] * x) + b * y

    args = ({"u": jnp.zeros(2)}, jnp.full((BATCH, 2), 3.0), jnp.float32(0), jnp.full(BATCH, 4.0))
    grad = clipped_grad(
        loss,
        l2_clip_norm=1.0,
        argnums=(0, 2),
        batch_argnums=(1, 3),
        microbatch_size=microbatch_size,
    )
    total = grad(*args)
    assert isinstance(total, tuple)
    expected, _ = brute_force(loss, args, (1, 3), 1.0, argnums=(0, 2))
    assert_trees_close(total, expected)
    joint = np.sqrt(np.sum(np.asarray(total[0]["u"]) ** 2) + float(total[1]) ** 2)
    assert joint == pytest.approx(BATCH, rel=1e-5)  # seven parallel gradients of norm 1


def test_argument_order_is_free_and_a_batched_argument_may_be_a_tree():
    def loss(example, scale, w):
        return scale * jnp.sum(w * example["x"]) * example["y"]

    args = (
        {"x": jnp.arange(21.0).reshape(7, 3), "y": jnp.linspace(-1, 1, 7)},
        jnp.float32(0.1),
        jnp.ones(3),
    )
    grad = clipped_grad(loss, l2_clip_norm=0.5, argnums=2, batch_argnums=[0], microbatch_size=2)
    expected, _ = brute_force(loss, args, (0,), 0.5, argnums=2)
    assert_trees_close(grad(*args), expected)


def test_a_batch_of_one():
    grad = clipped_grad(lambda w, x: jnp.sum(w * x), l2_clip_norm=1.0, microbatch_size=4)
    np.testing.assert_allclose(grad(jnp.ones(2), jnp.array([[30.0, 40.0]])), [0.6, 0.8], rtol=1e-5)


def test_zero_gradients_are_zero_and_not_nan():
    grad = clipped_grad(lambda w, x: jnp.sum(w * x), l2_clip_norm=1.0)
    assert (np.asarray(grad(jnp.ones(2), jnp.zeros((3, 2)))) == 0).all()


def test_the_parameters_may_have_an_unused_leaf():
    grad = clipped_grad(lambda p, x: jnp.sum(p["a"] * x), l2_clip_norm=1.0)
    total = grad({"a": jnp.ones(2), "b": jnp.ones(3)}, jnp.ones((3, 2)))
    assert (np.asarray(total["b"]) == 0).all()


def test_jit_gives_what_eager_gives_and_the_sum_differentiates_nothing_else():
    params, x, y = mlp()
    grad = clipped_grad(mlp_loss, l2_clip_norm=1.0, batch_argnums=(1, 2), microbatch_size=3)
    eager, compiled = grad(params, x, y), jax.jit(grad)(params, x, y)
    expected = jax.tree.map(lambda v: np.asarray(v, np.float64), eager)
    assert_trees_close(compiled, expected, tolerance=1e-6)


# --- padding ---------------------------------------------------------------------------


@pytest.mark.parametrize("microbatch_size", [None, 3])
def test_padding_contributes_exactly_zero(microbatch_size):
    params, x, y = mlp()
    padding = jnp.array([False, True, False, False, True, True, False])
    grad = clipped_grad(
        mlp_loss, l2_clip_norm=1.0, batch_argnums=(1, 2), microbatch_size=microbatch_size
    )
    call = jax.jit(lambda x, padding: grad(params, x, y, is_padding_example=padding))
    total = call(x, padding)
    for garbage in (0.0, 1e6, np.nan, np.inf, 1e30):
        again = call(jnp.where(padding[:, None], jnp.float32(garbage), x), padding)
        for a, b in zip(jax.tree.leaves(total), jax.tree.leaves(again), strict=True):
            np.testing.assert_array_equal(a, b)
    kept = ~np.asarray(padding)
    expected, _ = brute_force(mlp_loss, (params, x[kept], y[kept]), (1, 2), 1.0)
    assert_trees_close(total, expected)
    nothing = call(x, jnp.ones(BATCH, jnp.bool_))
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(nothing))


@pytest.mark.parametrize("microbatch_size", [None, 2])
def test_a_bad_example_contributes_zero_and_harms_no_other(microbatch_size):
    """Example 0 matters too: the last microbatch is filled up with copies of it."""
    grad = clipped_grad(
        lambda w, x: jnp.sum(w["a"] * x) + w["b"] * x[1],
        l2_clip_norm=1.0,
        microbatch_size=microbatch_size,
    )
    w = {"a": jnp.ones(3), "b": jnp.float32(1)}
    call = jax.jit(lambda x, padding: grad(w, x, is_padding_example=padding))
    x = np.random.default_rng(0).normal(size=(BATCH, 3)).astype(np.float32)
    for where in (0, 3, BATCH - 1):
        expected = call(x, np.arange(BATCH) == where)
        for bad in (np.nan, np.inf, -np.inf, 1e30):
            poisoned = x.copy()
            poisoned[where, 2] = bad
            total = call(poisoned, np.zeros(BATCH, bool))
            for a, b in zip(jax.tree.leaves(total), jax.tree.leaves(expected), strict=True):
                np.testing.assert_array_equal(a, b)
                assert np.isfinite(np.asarray(a)).all()


def test_a_finite_loss_with_a_nan_gradient_contributes_zero():
    grad = clipped_grad(lambda w, x: jnp.sqrt(jnp.sum((w * x) ** 2)), l2_clip_norm=1.0)
    x = jnp.array([[0.0, 0.0], [3.0, 4.0]])  # √ has no derivative at 0
    assert np.isnan(np.asarray(jax.grad(grad.loss_fn)(jnp.ones(2), x[0]))).any()
    total = grad(jnp.ones(2), x)
    np.testing.assert_array_equal(total, grad(jnp.ones(2), x[1:]))


# --- auxiliary outputs, keys, dtypes ---------------------------------------------------


@pytest.mark.parametrize("microbatch_size", MICROBATCH_SIZES)
def test_aux_is_stacked_in_the_order_of_the_batch(microbatch_size):
    def loss(w, x, number):
        return jnp.sum(w * x), {"number": number, "twice": (2.0 * x, jnp.sum(x) > 0)}

    x = jnp.asarray(np.random.default_rng(0).normal(size=(BATCH, 3)), jnp.float32)
    grad = clipped_grad(
        loss,
        l2_clip_norm=1.0,
        batch_argnums=(1, 2),
        has_aux=True,
        microbatch_size=microbatch_size,
    )
    padding = jnp.arange(BATCH) == 2
    total, aux = jax.jit(grad)(jnp.ones(3), x, jnp.arange(BATCH), is_padding_example=padding)
    assert total.shape == (3,)
    real = ~np.asarray(padding)  # what padding gives may not have been computed
    np.testing.assert_array_equal(aux["number"][real], np.arange(BATCH)[real])
    assert aux["number"].dtype == jnp.int32
    np.testing.assert_array_equal(aux["twice"][0][real], 2.0 * x[real])
    np.testing.assert_array_equal(aux["twice"][1][real], (jnp.sum(x, axis=1) > 0)[real])


@pytest.mark.parametrize("make_key", [jax.random.key, keys.reproducible_key])
@pytest.mark.parametrize("microbatch_size", [None, 3])
def test_typed_keys_are_a_batched_argument(make_key, microbatch_size):
    """Dropout of its own for each example; keys have no zeros to pad with."""

    def loss(w, x, key):
        mask = jax.random.bernoulli(key, 0.5, x.shape)
        return jnp.sum(jnp.where(mask, w * x, 0.0))

    x = jnp.asarray(np.random.default_rng(0).normal(size=(BATCH, 16)), jnp.float32)
    args = (jnp.ones(16), x, jax.random.split(make_key(3), BATCH))
    grad = clipped_grad(
        loss, l2_clip_norm=2.0, batch_argnums=(1, 2), microbatch_size=microbatch_size
    )
    expected, _ = brute_force(loss, args, (1, 2), 2.0)
    assert_trees_close(jax.jit(grad)(*args), expected)


def test_a_key_shared_by_all_examples_stays_unbatched():
    def loss(w, x, key):
        return jnp.sum(w * x * jax.random.normal(key, x.shape))

    x = jnp.ones((BATCH, 4))
    args = (jnp.ones(4), x, jax.random.key(0))
    expected, _ = brute_force(loss, args, (1,), 1.0)
    assert_trees_close(clipped_grad(loss, l2_clip_norm=1.0, microbatch_size=2)(*args), expected)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("microbatch_size", [None, 16])
def test_short_parameters_give_a_float32_sum(dtype, microbatch_size):
    """Accumulated in bfloat16, 1,000 terms of one size would stop growing at 256."""

    def loss(w, x):
        return jnp.sum(w * x)

    x = jnp.full((1000, 2), 1.0, dtype)
    grad = clipped_grad(loss, l2_clip_norm=10.0, microbatch_size=microbatch_size)
    total = grad(jnp.ones(2, dtype), x)
    assert total.dtype == jnp.float32
    np.testing.assert_array_equal(total, [1000.0, 1000.0])


def test_bfloat16_norms_are_taken_in_float32():
    n = 4096  # 64² ones: a bfloat16 sum of squares would stall at 256, and the norm at 16
    grad = clipped_grad(lambda w, x: jnp.sum(w * x), l2_clip_norm=1.0)
    total = grad(jnp.ones(n, jnp.bfloat16), jnp.ones((1, n), jnp.bfloat16))
    assert np.linalg.norm(np.asarray(total, np.float64)) == pytest.approx(1.0, rel=1e-5)


def test_numpy_arguments_are_accepted():
    grad = clipped_grad(lambda w, x: jnp.sum(w * x), l2_clip_norm=1.0, microbatch_size=2)
    x = np.eye(3, dtype=np.float32)
    np.testing.assert_allclose(
        grad(np.ones(3, np.float32), x, is_padding_example=np.zeros(3, bool)), [1, 1, 1], rtol=1e-5
    )


# --- sensitivity -----------------------------------------------------------------------


def test_sensitivity_is_the_clip_norm_and_twice_it():
    grad = clipped_grad(mlp_loss, l2_clip_norm=0.7)
    assert grad.sensitivity("add_remove") == 0.7
    assert grad.sensitivity("replace_one") == 1.4
    with pytest.raises(ValueError, match="adjacency='add'"):
        grad.sensitivity("add")


@pytest.mark.parametrize("microbatch_size", [None, 3])
def test_neighbouring_sums_differ_by_at_most_the_sensitivity(microbatch_size):
    """Over random batches, and reached by the worst pair."""
    grad = clipped_grad(
        lambda w, x: jnp.sum(w * x), l2_clip_norm=0.7, microbatch_size=microbatch_size
    )
    call = jax.jit(lambda x, p: grad(jnp.ones(5), x, is_padding_example=p))
    rng = np.random.default_rng(0)
    absent = np.arange(BATCH) == 4
    rounding = 1 + 1e-5
    worst = dict.fromkeys(("add_remove", "replace_one"), 0.0)
    for _ in range(40):
        x = (rng.normal(size=(BATCH, 5)) * 10.0 ** rng.uniform(-4, 4, (BATCH, 1))).astype("f4")
        other = x.copy()
        other[4] = rng.normal(size=5) * 10.0 ** rng.uniform(-4, 4)
        opposite = x.copy()
        opposite[4] = -x[4]
        base = np.asarray(call(x, np.zeros(BATCH, bool)), np.float64)
        without = np.asarray(call(x, absent), np.float64)
        worst["add_remove"] = max(worst["add_remove"], np.linalg.norm(base - without))
        for y in (other, opposite):
            moved = np.asarray(call(y, np.zeros(BATCH, bool)), np.float64)
            worst["replace_one"] = max(worst["replace_one"], np.linalg.norm(base - moved))
    for adjacency, reached in worst.items():
        bound = grad.sensitivity(adjacency)
        assert 0.999 * bound <= reached <= bound * rounding, adjacency


def test_it_is_the_public_name():
    assert dpfa_jax.clipped_grad is clipped_grad


@pytest.mark.parametrize("engine", ["bookkeeping", "two_pass", "vmap"])
def test_microbatches_of_padding_alone_are_not_computed(engine):
    """A loss that counts its runs; six of eight examples are padding, two microbatches."""
    runs = []

    def loss(w, x):
        jax.debug.callback(lambda x: runs.append(float(x)), x[0], ordered=False)
        return jnp.sum(jnp.square(x @ w))

    w, x = jnp.ones((3, 2)), jnp.arange(24.0).reshape(8, 3)
    grad = clipped_grad(loss, l2_clip_norm=1.0, engine=engine, microbatch_size=2)
    padding = jnp.arange(8) >= 2
    total = jax.jit(grad)(w, x, is_padding_example=padding)
    jax.effects_barrier()
    assert set(runs) == {0.0, 3.0}
    np.testing.assert_allclose(total, grad(w, x[:2]), atol=1e-6)
