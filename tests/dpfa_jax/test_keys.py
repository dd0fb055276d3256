"""Noise keys: where they come from, what derives from them, and that none is used twice."""

import copy
import gc
import hashlib
import pickle
import re
import secrets
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from dpfa_jax import SecureKey, keys
from pallas_kernels import prng


def data(key):
    return np.asarray(jax.random.key_data(key))


@pytest.fixture
def fresh():
    """A key that no other test has used."""
    return SecureKey.generate().key()


# --- SecureKey --------------------------------------------------------------------------


def test_a_key_is_32_bytes_of_the_operating_system(monkeypatch):
    asked = []

    def token_bytes(n):
        asked.append(n)
        return bytes(range(32))

    monkeypatch.setattr(secrets, "token_bytes", token_bytes)
    secure = SecureKey.generate()
    assert asked == [32]
    # Eight little-endian words, in order: no bit is lost.
    assert data(secure.key()).tolist() == list(np.frombuffer(bytes(range(32)), "<u4"))
    assert data(secure.key()).dtype == np.uint32
    assert str(secure.key().dtype) == "key<chacha20>"
    assert secure.key().shape == ()


def test_generated_keys_differ_in_every_word():
    words = np.stack([data(SecureKey.generate().key()) for _ in range(20)])
    assert all(len(np.unique(column)) == 20 for column in words.T)


def test_nothing_that_is_printed_shows_the_key():
    secret = bytes(range(200, 232))
    secure = SecureKey(secret)
    for text in (repr(secure), str(secure), f"{secure}", secure.fingerprint, repr([secure])):
        assert secure.fingerprint in text
        assert len(text) < 60
        for length in (4, 8):
            pieces = [secret[i : i + length] for i in range(0, 32, length)]
            shown = [p.hex() for p in pieces] + [repr(p) for p in pieces]
            shown += [str(int.from_bytes(p, "little")) for p in pieces]
            assert not any(s in text for s in shown)


def test_fingerprints_name_keys():
    assert SecureKey(bytes(32)).fingerprint == SecureKey(bytes(32)).fingerprint
    assert re.fullmatch("[0-9a-f]{16}", SecureKey.generate().fingerprint)
    assert len({SecureKey.generate().fingerprint for _ in range(50)}) == 50
    # No plain hash of the secret, which others may hold for other reasons.
    assert not hashlib.sha256(bytes(32)).hexdigest().startswith(SecureKey(bytes(32)).fingerprint)


@pytest.mark.parametrize(
    "copier", [pickle.dumps, copy.copy, copy.deepcopy, lambda k: pickle.dumps({"key": [k]})]
)
def test_a_key_is_neither_pickled_nor_copied(copier):
    with pytest.raises(TypeError, match="A SecureKey is not pickled"):
        copier(SecureKey.generate())


@pytest.mark.parametrize("bad", [b"", b"31 bytes" * 3, bytes(33), "x" * 32, None, 7])
def test_a_bad_secret_is_refused_and_not_shown(bad):
    with pytest.raises(ValueError, match="secret: 32 bytes are needed") as caught:
        SecureKey(bad)
    assert not bad or str(bad) not in str(caught.value)


# --- reproducible keys and derivation ---------------------------------------------------


def test_reproducible_keys_are_fixed_for_ever():
    """The stream of a seed is the same in every version, or stored results change."""
    for seed in (0, 1, 2**40, -3):
        digest = hashlib.sha256(f"dpfa_jax reproducible key {seed}".encode()).digest()
        expected = np.frombuffer(digest, "<u4")
        assert data(keys.reproducible_key(seed)).tolist() == expected.tolist()
    rows = np.stack([data(keys.reproducible_key(i)) for i in range(50)])
    assert len(np.unique(rows[:, 0])) == 50


@jax.jit
def _derived(key):
    """What JAX derives, beside the children it must be."""
    words = jax.random.key_data(key)
    seven = jax.random.key_data(jax.random.fold_in(key, 7)), prng.derive_key(words, 1, 7)
    index = jnp.arange(6, dtype=jnp.uint32).reshape(2, 3)
    split = jax.random.key_data(jax.random.split(key, (2, 3))), prng.derive_key(words, 2, index)
    stream = prng.stream_words(prng.derive_key(words, 3), 3).reshape(-1)[:40].reshape(5, 8)
    dtypes = (jnp.uint8, jnp.uint16, jnp.uint32)
    bits = [(jax.random.bits(key, (5, 8), d), stream.astype(d)) for d in dtypes]
    return [seven, split, *bits]


def test_derivation_is_by_purpose_and_index():
    for got, expected in _derived(SecureKey.generate().key()):
        np.testing.assert_array_equal(got, expected)


def test_all_children_of_a_key_differ():
    parent = keys.reproducible_key(11)
    family = [
        data(parent)[None],
        data(jax.random.split(parent, 40)),
        data(jax.vmap(lambda i: jax.random.fold_in(parent, i))(jnp.arange(40, dtype=jnp.uint32))),
        *(np.asarray(prng.derive_key(data(parent), p))[None] for p in (16, 17, keys.GRADIENT)),
        data(jax.random.split(jax.random.fold_in(parent, 0), 40)),
        data(jax.random.fold_in(parent, 2**32 - 1))[None],
    ]
    rows = np.concatenate(family)
    assert len(np.unique(rows, axis=0)) == len(rows)


def test_derivation_under_vmap_and_jit_is_the_same():
    many = jax.random.split(keys.reproducible_key(12), 3)
    fold = jax.jit(jax.vmap(lambda k, i: jax.random.fold_in(k, i)))
    folded = fold(many, jnp.arange(3, dtype=jnp.uint32))
    split = jax.jit(jax.vmap(lambda k: jax.random.split(k, 2)))(many)
    for i in range(3):
        assert (data(folded[i]) == data(jax.random.fold_in(many[i], i))).all()
        assert (data(split[i]) == data(jax.random.split(many[i], 2))).all()


def test_jax_random_draws_from_it():
    """P(sup|F_n - F| > x/√n) <= 2 exp(-2x²): 1e-6 at x = 2.70; the key is fixed."""
    n = 20_000
    x = np.sort(np.asarray(jax.random.normal(keys.reproducible_key(13), (n,)), np.float64))
    steps = np.arange(n + 1) / n
    law = special.ndtr(x)
    assert max(np.max(steps[1:] - law), np.max(law - steps[:-1])) < 2.70 / np.sqrt(n)


def test_64_bit_draws_use_two_words():
    key = keys.reproducible_key(14)
    with jax.enable_x64(True):
        bits = np.asarray(jax.random.bits(key, (9,), jnp.uint64))
        child = prng.derive_key(jax.random.key_data(key), 3)
        words = np.asarray(prng.stream_words(child, 2)).reshape(-1)[:18].astype(np.uint64)
    assert (bits == (words[0::2] << np.uint64(32) | words[1::2])).all()


def test_a_seed_is_no_way_to_make_a_key():
    implementation = jax.random.key_impl(keys.reproducible_key(0))
    with pytest.raises(ValueError, match="a 32-bit seed is not a noise key"):
        jax.random.key(0, impl=implementation)


# --- which keys are accepted ------------------------------------------------------------


def test_accepted_keys(fresh):
    assert keys.check_noise_key(fresh) is fresh
    secure = SecureKey.generate()
    assert (data(keys.check_noise_key(secure)) == data(secure.key())).all()
    assert keys.is_noise_key(jax.random.split(fresh, 3))
    jax.eval_shape(keys.check_noise_key, fresh)  # traced


REFUSED = {
    "missing": (lambda: None, "rng=None: noise needs a key; there is no default"),
    "threefry": (lambda: jax.random.key(0), "rng is a key<fry>: its key is too short"),
    "rbg": (lambda: jax.random.key(0, impl="rbg"), "rng is a key<rbg>: its key is too short"),
    "raw words": (lambda: jnp.zeros(8, jnp.uint32), "rng is a ArrayImpl: a key<chacha20> array"),
    "old style": (lambda: jax.random.PRNGKey(0), "a key<chacha20> array is needed"),
    "numpy": (lambda: np.zeros(8, np.uint32), "rng is a ndarray: a key<chacha20> array"),
    "seed": (lambda: 0, "rng is a int: a key<chacha20> array is needed"),
    "bytes": (lambda: bytes(32), "rng is a bytes: a key<chacha20> array is needed"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_keys(kind):
    make, message = REFUSED[kind]
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        keys.check_noise_key(make())
    assert "SecureKey.generate()" in str(caught.value)  # and what to do instead
    assert not keys.is_noise_key(make())
    with pytest.raises(ValueError, match="my_key"):
        keys.check_noise_key(make(), "my_key")


# --- used once --------------------------------------------------------------------------

AGAIN = "rng: this key has made noise before"
CONSTANT = "rng: the key comes from outside the function that JAX is tracing"


def test_the_same_value_twice_raises_also_through_another_array(fresh):
    words = keys.consume(fresh)
    assert (np.asarray(words) == data(fresh)).all()
    for same in (fresh, keys.wrap(jnp.asarray(data(fresh))), jax.random.split(fresh, 2)):
        if same.shape == ():
            with pytest.raises(ValueError, match=AGAIN):
                keys.consume(same)
        else:  # children are other keys
            keys.consume(same)
    keys.consume(jax.random.fold_in(fresh, 0))


def test_a_batch_of_keys_counts_each():
    batch = jax.random.split(SecureKey.generate().key(), 3)
    keys.consume(batch)
    with pytest.raises(ValueError, match=AGAIN):
        keys.consume(batch[1])
    doubled = keys.wrap(jnp.zeros((2, 8), jnp.uint32) + jnp.uint32(secrets.randbits(32)))
    with pytest.raises(ValueError, match=AGAIN):
        keys.consume(doubled)


def test_a_key_that_is_kept_is_taken_once():
    secure = SecureKey.generate()
    assert (data(keys.take_key(secure)) == data(secure.key())).all()
    with pytest.raises(ValueError, match=AGAIN):
        keys.take_key(secure.key())
    with pytest.raises(ValueError, match=r"rng has shape \(2,\): one key is needed"):
        keys.take_key(jax.random.split(SecureKey.generate().key(), 2))
    with pytest.raises(ValueError, match="rng=None: noise needs a key"):
        keys.take_key(None)


def test_a_secure_key_is_recognised_again():
    secure = SecureKey.generate()
    keys.consume(keys.check_noise_key(secure))
    with pytest.raises(ValueError, match=AGAIN):
        keys.consume(keys.check_noise_key(secure))


def test_the_same_traced_key_twice_in_one_trace_raises(fresh):
    def twice(key):
        return keys.consume(key), keys.consume(key)

    def derived(key):
        return [keys.consume(jax.random.fold_in(key, i)) for i in range(3)]

    for transform in (jax.jit, jax.vmap):
        argument = fresh if transform is jax.jit else jax.random.split(fresh, 2)
        with pytest.raises(ValueError, match=AGAIN):
            transform(twice)(argument)
        transform(derived)(argument)
    # Another trace of the same function starts afresh, and so do two calls of one trace.
    once = jax.jit(keys.consume)
    for _ in range(2):
        once(fresh)
        jax.eval_shape(keys.consume, fresh)


def test_a_key_from_outside_a_loop_raises_and_one_that_goes_through_it_does_not(fresh):
    """Each iteration would draw the same noise, though the key is traced."""

    def outside(key):
        return jax.lax.map(lambda x: (keys.consume(key), x), jnp.arange(3))

    def inside(key):
        return jax.lax.map(keys.consume, jax.random.split(key, 3))

    def folded(key):
        step = lambda key, i: (key, keys.consume(jax.random.fold_in(key, i)))  # noqa: E731
        return jax.lax.scan(step, key, jnp.arange(3, dtype=jnp.uint32))[1]

    with pytest.raises(ValueError, match=CONSTANT):
        jax.jit(outside)(fresh)
    for f in (inside, folded):
        assert len(np.unique(jax.jit(f)(fresh), axis=0)) == 3


def test_transformations_inside_jit_keep_the_key_usable(fresh):
    x = jnp.ones(3)
    use = lambda key: lambda x: x * keys.consume(key)[0].astype(jnp.float32)  # noqa: E731
    jax.jit(lambda k: jax.grad(lambda x: use(k)(x).sum())(x))(fresh)
    jax.jit(lambda k: jax.vmap(use(k))(x))(fresh)
    jax.jit(lambda k: jax.vmap(jax.grad(use(k)))(x))(fresh)
    jax.jit(lambda k: jax.vmap(lambda k: use(k)(x))(k))(jax.random.split(fresh, 2))
    jax.jit(lambda k: jax.checkpoint(lambda k, x: use(k)(x))(k, x))(fresh)


@pytest.mark.parametrize("kind", ["key array", "SecureKey", "SecureKey.key()"])
def test_a_key_that_is_a_constant_of_a_traced_function_raises(kind, fresh):
    """It would be compiled in: the same noise at every call."""
    secure = SecureKey.generate()
    use = {
        "key array": lambda: keys.consume(fresh),
        "SecureKey": lambda: keys.consume(keys.check_noise_key(secure)),
        "SecureKey.key()": lambda: keys.consume(secure.key()),
    }[kind]
    with pytest.raises(ValueError, match=CONSTANT):
        jax.jit(lambda x: (use(), x))(1.0)
    with pytest.raises(ValueError, match=CONSTANT):
        jax.lax.map(lambda x: (use(), x), jnp.arange(3))
    with pytest.raises(ValueError, match=CONSTANT):
        jax.checkpoint(lambda x: (use(), x)[1])(1.0)
    # vmap and grad outside jit run the function once: nothing is compiled in.
    jax.vmap(lambda x: (use(), x)[1])(jnp.arange(3))
    with pytest.raises(ValueError, match=AGAIN):
        jax.grad(lambda x: (use(), x)[1])(1.0)


def test_reuse_can_be_allowed_for_tests_and_only_there(fresh):
    with keys.allow_reuse_for_tests():
        keys.consume(fresh)
        with keys.allow_reuse_for_tests():
            keys.consume(fresh)
        keys.consume(fresh)
    keys.consume(fresh)  # those uses were not recorded
    with pytest.raises(ValueError, match=AGAIN):
        keys.consume(fresh)


def test_the_permission_ends_with_an_exception_and_with_the_thread(fresh):
    def fail():
        with keys.allow_reuse_for_tests():
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    keys.consume(fresh)
    outcome = []

    def elsewhere():
        try:
            keys.consume(fresh)
            outcome.append("allowed")
        except ValueError:
            outcome.append("refused")

    with keys.allow_reuse_for_tests():
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert outcome == ["refused"]


def test_of_many_threads_with_one_key_one_wins(fresh):
    barrier, wins = threading.Barrier(8), []

    def race():
        barrier.wait()
        try:
            keys.consume(fresh)
            wins.append(1)
        except ValueError:
            wins.append(0)

    threads = [threading.Thread(target=race) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(wins) == [0] * 7 + [1]


def test_the_memory_is_bounded_and_holds_no_key(monkeypatch, fresh):
    monkeypatch.setattr(keys, "_MEMORY", 4)
    monkeypatch.setattr(keys, "_used_values", type(keys._used_values)())
    keys.consume(fresh)
    assert not any(data(fresh).tobytes()[:8] in name for name in keys._used_values)
    keys.consume(jax.random.split(fresh, 9))
    assert len(keys._used_values) == 4


def test_traces_leave_nothing_behind(fresh):
    gc.collect()
    before = len(keys._used_tracers)
    for _ in range(5):
        jax.eval_shape(lambda k: keys.consume(jax.random.fold_in(k, 1)), fresh)
    gc.collect()
    assert len(keys._used_tracers) <= before + 1
