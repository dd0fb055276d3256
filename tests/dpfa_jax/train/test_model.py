import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import small

from dpfa_jax.train.config import parse_config
from dpfa_jax.train.model import losses, make_model, window_mask


def _models():
    linen = parse_config(small(model__layers=2))
    nnx = parse_config(small(model__layers=2, model__flax_api="nnx"))
    return [make_model(c.model, c.data.chunk_bytes) for c in (linen, nnx)]


def _shapes(model):
    return jax.eval_shape(model.init, jax.random.key(0))


def _randomised(params, seed=0):
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    new = [0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, new)


def _to_nnx(linen_params, nnx_params):
    """The Linen weights in the NNX tree, matched by name."""
    flat = {
        tuple(k.key for k in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(linen_params["params"])
    }

    def find(path, leaf):
        # The last step of an NNX path leads from the variable to its value.
        names = [k.key for k in path if isinstance(k, jax.tree_util.DictKey)]
        if names[0] == "layers":
            index, part = names[1], names[2]
            names = [f"{part}_{index}", *names[3:]]
        value = flat.pop(tuple(names))
        assert value.shape == leaf.shape
        return value

    out = jax.tree_util.tree_map_with_path(find, nnx_params)
    assert not flat, f"left over: {list(flat)}"
    return out


def test_linen_and_nnx_agree_for_equal_weights():
    linen, nnx = _models()
    params = _randomised(_shapes(linen))
    nnx_params = _to_nnx(params, _shapes(nnx))
    symbols = jax.random.randint(jax.random.key(2), (3, 16), 0, 97)

    @functools.partial(jax.jit, static_argnums=1)
    def run(params, apply):
        def total(p):
            logits = apply(p, symbols)
            return jnp.sum(logits**2), logits

        gradient, logits = jax.grad(total, has_aux=True)(params)
        return logits, gradient

    (a, g), (b, h) = run(params, linen.apply), run(nnx_params, nnx.apply)
    assert float(jnp.abs(a).max()) > 0.1
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    g = _to_nnx(g, nnx_params)
    for x, y in zip(jax.tree.leaves(g), jax.tree.leaves(h), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4 * float(jnp.abs(y).max() + 1))


@pytest.mark.parametrize("which", [0, 1], ids=["linen", "nnx"])
def test_no_symbol_sees_itself_or_the_future(which):
    model = _models()[which]
    params = _randomised(_shapes(model))
    symbols = jax.random.randint(jax.random.key(2), (1, 16), 0, 97)
    base = model.apply(params, symbols)
    for t in (0, 5, 15):
        changed = model.apply(params, symbols.at[0, t].set((symbols[0, t] + 7) % 97))
        differs = np.asarray(jnp.abs(changed - base).max(axis=-1)[0] > 0)
        assert not differs[: t + 1].any()
        assert t == 15 or differs[t + 1]


def test_window_mask_by_definition():
    windows = [[1, 1], [0, 2], [3, 9]]
    mask = window_mask(windows, 8)
    for head, (near, far) in enumerate(windows):
        for t in range(8):
            sees = {s for s in range(8) if near <= t - s <= far} or {0}
            assert set(np.flatnonzero(mask[0, head, t])) == sees


def test_losses_ignore_padding():
    logits = jax.random.normal(jax.random.key(0), (2, 4, 97))
    symbols = jnp.array([[1, 2, -1, -1], [3, -1, -1, -1]])
    total, count = losses(logits, symbols)
    log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
    assert float(count) == 3
    expected = -(log_p[0, 0, 1] + log_p[0, 1, 2] + log_p[1, 0, 3])
    assert float(total) == pytest.approx(expected, rel=1e-5)
