"""No two releases share noise: steps, leaves, layers, calls, rows, heads, elements, restarts.

On the public grid of about σ/2¹⁰ two independent numbers agree with probability below 2⁻¹⁰ (the
chance is Σp² <= max p): of 64 in place, more than eight with probability below 10⁻¹⁵ a pair.
"""

import importlib
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpfa_jax import AttentionPrivacy, SecureKey, add_noise, keys
from dpfa_jax.attention import dp_dot_product_attention
from dpfa_jax.attention_fn import noise_key
from dpfa_jax.linen import DPMultiHeadDotProductAttention

attention_fn = importlib.import_module("dpfa_jax.attention_fn").attention_fn
BOUNDARIES = [0, 1, 2, 255, 256, 65_535, 65_536, 2**24, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1]


@pytest.fixture(autouse=True)
def _streams_are_compared():
    with keys.allow_reuse_for_tests():
        yield


def releases(key, steps, leaves=("a", "b")):
    zeros = {name: jnp.zeros(64) for name in leaves}
    tx = add_noise(1.0, 1.0, 1.0, key)
    state = tx.init(zeros)
    out = {}
    for step in steps:
        updates, _ = tx.update(zeros, state._replace(step=jnp.uint32(step)))
        out |= {f"step {step}, leaf {k}": np.asarray(v) for k, v in updates.items()}
    return out


def test_steps_share_no_noise():
    """And leaves do not; counters are tried where they would wrap in 8, 16, 24 and 31 bits."""
    found = releases(keys.reproducible_key(300), BOUNDARIES)
    for (a, x), (b, y) in itertools.combinations(found.items(), 2):
        assert np.sum(x == y) <= 8, f"{a} and {b} share noise"
        assert np.sum(x == -y) <= 8, f"{a} and {b} share noise"


def test_restarts_share_no_noise():
    """A key that the operating system gives; a start that restores the step has another."""
    first, second = SecureKey.generate(), SecureKey.generate()
    one, two = releases(first, [7]), releases(second, [7])
    assert np.sum(one["step 7, leaf a"] == two["step 7, leaf a"]) <= 8


SEQUENCE = AttentionPrivacy(
    unit="sequence", noise_multiplier=1.0, value_clip=1.0, adjacency="replace_one"
)


def test_rows_heads_elements_and_calls_share_no_noise():
    """Zero values: what comes out is the noise. Two layers' calls in one, and one after it."""
    query, key = jnp.ones((3, 5, 4, 64)), jnp.zeros((3, 6, 2, 64))
    layer = attention_fn(SEQUENCE, implementation="xla")
    with noise_key(keys.reproducible_key(301)):
        calls = [layer(query, key, key), layer(query, key, key)]
    other = keys.reproducible_key(302)
    calls.append(dp_dot_product_attention(query, key, key, privacy=SEQUENCE, rng=other))
    found = {
        f"call {c}, element {b}, row {t}, head {h}": np.asarray(out[b, t, h])
        for c, out in enumerate(calls)
        for b in range(3)
        for t in range(5)
        for h in range(4)
    }
    assert len(found) == 180
    rows = np.stack(list(found.values()))
    same = (rows[:, None] == rows[None]).sum(-1) - 64 * np.eye(len(rows), dtype=int)
    assert same.max() <= 8
    assert (rows[:, None] == -rows[None]).sum(-1).max() <= 8


class _Two(nn.Module):
    @nn.compact
    def __call__(self, x):
        out = []
        for name in ("first", "second"):
            layer = DPMultiHeadDotProductAttention(
                num_heads=1, privacy=SEQUENCE, use_bias=False, name=name,
                out_kernel_init=lambda *_: jnp.eye(64).reshape(1, 64, 64),
            )  # fmt: skip
            out.append(layer(x))
        return out


def test_layers_of_a_flax_model_share_no_noise():
    rngs = {"params": jax.random.key(0), "privacy": keys.reproducible_key(303)}
    (first, second), _ = _Two().init_with_output(rngs, jnp.zeros((1, 3, 64)))
    assert np.std(first) > 0.1
    assert np.sum(np.asarray(first) == np.asarray(second)) <= 12


def test_one_key_folded_with_the_device_gives_each_its_noise():
    """As the op demands inside ``shard_map``; without it, it refuses (test_attention.py)."""
    zeros = jnp.zeros((1, 2, 1, 64))
    attend = jax.jit(
        lambda key, i: dp_dot_product_attention(
            zeros, zeros, zeros, privacy=SEQUENCE, rng=jax.random.fold_in(key, i)
        )
    )
    key = keys.reproducible_key(304)
    found = [np.asarray(attend(key, jnp.uint32(i))).ravel() for i in range(8)]
    for x, y in itertools.combinations(found, 2):
        assert np.sum(x == y) <= 12
