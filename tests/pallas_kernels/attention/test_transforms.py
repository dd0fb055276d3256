"""The kernels under JAX's transformations: the same numbers, and never the same noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import AttentionSpec, attention, common

WORDS = jnp.arange(31, 39, dtype=jnp.uint32)
RECORD = AttentionSpec(
    mode="record",
    scale=0.4,
    value_clip=1.0,
    logit_bound=0.3,
    numerator_std=1.0,
    denominator_std=0.7,
    denominator_floor=0.6,
    grid=None,
)
SEQUENCE = AttentionSpec(mode="sequence", scale=0.4, value_clip=1.0, numerator_std=1.0, grid=None)
SPECS = {"record": RECORD, "sequence": SEQUENCE}


def _inputs(*lead, num_rows=4, num_keys=6):
    random = np.random.default_rng(0)
    shapes = [(*lead, 2, num_rows, 2, 5), (*lead, 2, num_keys, 1, 5), (*lead, 2, num_keys, 1, 5)]
    return [jnp.asarray(random.normal(size=s), jnp.float32) for s in shapes]


def _flat(x):
    return x.reshape(-1, *x.shape[-3:])


def _call(spec, implementation, words=WORDS):
    return lambda q, k, v: attention(q, k, v, spec, key_words=words, implementation=implementation)


def _distinct(noise):
    """No two of [lanes, ...] share a Gaussian at the same place."""
    x = np.asarray(noise).reshape(len(noise), -1)
    return all(not np.any(x[i] == x[j]) for i in range(len(x)) for j in range(i))


@pytest.mark.parametrize("mode", SPECS)
def test_a_vmapped_call_equals_a_batched_one_with_its_gradients(mode, implementation):
    """Three lanes of two elements are a batch of six, with one key."""
    call = _call(SPECS[mode], implementation)
    x = _inputs(3)

    def loss(f, x):
        out = f(*x)
        return jnp.sum(out * jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape))

    lanes = jax.jit(jax.value_and_grad(lambda x: loss(jax.vmap(call), x)))(x)
    batched = jax.jit(jax.value_and_grad(lambda x: loss(call, x)))([_flat(a) for a in x])
    assert float(lanes[0]) == pytest.approx(float(batched[0]), rel=1e-5)
    for a, b in zip(lanes[1], batched[1], strict=True):
        np.testing.assert_allclose(_flat(a), b, rtol=1e-4, atol=1e-5)


def _noise_of_lanes(f, *args):
    """Sequence mode with zero values releases the noise itself."""
    return np.asarray(jax.jit(f)(*args))


def _silent(q, k, words=WORDS, **options):
    value = jnp.zeros((*k.shape[:1], *k.shape[1:]), jnp.float32)
    return attention(q, k, value, SEQUENCE, key_words=words, **options)


@pytest.mark.parametrize("what", ["query", "key", "lengths", "mask"])
def test_lanes_that_differ_in_anything_get_distinct_noise(what):
    """Equal noise on two releases would show their private difference exactly."""
    q, k, _ = _inputs()
    lanes = {
        "query": (lambda x: _silent(x, k), jnp.stack([q, 2 * q, q])),
        "key": (lambda x: _silent(q, x), jnp.stack([k, 2 * k, k])),
        "lengths": (
            lambda x: _silent(q, k, lengths=x),
            jnp.asarray([[6, 6], [2, 6], [0, 1]], jnp.int32),
        ),
        "mask": (
            lambda x: _silent(q, k, mask=x),
            jnp.asarray(np.random.default_rng(1).random((3, 1, 1, 1, 6)) < 0.5),
        ),
    }
    f, x = lanes[what]
    noise = _noise_of_lanes(jax.vmap(f), x)
    assert _distinct(noise)
    # The elements of a lane's batch differ as well, and from those of other lanes.
    assert _distinct(noise.reshape(6, -1))


def test_values_alone_may_be_mapped_and_differentiated():
    q, k, v = _inputs()
    values = jnp.stack([0 * v, 0 * v])

    def noise_and_slope(v):
        return jax.value_and_grad(lambda v: jnp.sum(_call(SEQUENCE, None)(q, k, v)))(v)

    noise, slope = jax.jit(jax.vmap(noise_and_slope))(values)
    assert noise[0] != noise[1]
    np.testing.assert_allclose(slope[0], slope[1], rtol=1e-6)


def test_nested_lanes_all_differ():
    """Maps over queries around maps over queries, and around or inside maps over noise keys."""
    q, k, _ = _inputs()
    qs = jnp.stack([q, q])
    words = jnp.stack([WORDS, WORDS + jnp.uint32(1), WORDS + jnp.uint32(2)])

    @jax.jit
    def noise(qs, words):
        twice = jax.vmap(jax.vmap(lambda q: _silent(q, k)))(jnp.stack([qs, qs, qs]))
        own_inside = jax.vmap(lambda q: jax.vmap(lambda w: _silent(q, k, w))(words))(qs)
        own_outside = jax.vmap(lambda w: jax.vmap(lambda q: _silent(q, k, w))(qs))(words)
        single = jax.vmap(lambda w: _silent(q, k, w))(words)
        return twice, own_inside, own_outside, single[1], _silent(q, k, words[1])

    *nested, single, unmapped = noise(qs, words)
    for lanes in nested:
        assert _distinct(np.asarray(lanes).reshape(12, -1))
    # Lanes with a noise key of their own are the single calls with that key.
    np.testing.assert_allclose(single, unmapped, atol=1e-6)


def test_batch_counters_number_lanes_then_elements():
    operands = (jnp.zeros((4, 3, 1)),)
    assert common.batch_counters(WORDS, 3, operands).tolist() == [0, 1, 2]
    lanes = jax.vmap(lambda x: common.batch_counters(WORDS, 3, (x,)))(operands[0])
    assert lanes.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    in_axes = jax.vmap(lambda x: common.batch_counters(WORDS, 3, (x,)), in_axes=1)(operands[0])
    assert in_axes.shape == (3, 3)
    assert sorted(in_axes.ravel().tolist()) == list(range(9))


def test_jit_checkpoint_and_scan_give_the_same_release():
    q, k, v = _inputs()
    words = jnp.stack([WORDS, WORDS + jnp.uint32(9)])

    def loss(q, wrap):
        out = wrap(_call(RECORD, "xla"))(q, k, v)
        return jnp.sum(jnp.sin(out)), out

    both = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    (plain, out), slope = both(q, lambda f: f)
    (saved, _), saved_slope = both(q, jax.checkpoint)
    assert float(plain) == pytest.approx(float(saved), rel=1e-6)
    np.testing.assert_allclose(saved_slope, slope, rtol=1e-4, atol=1e-6)

    step = lambda q, w: (q, _call(RECORD, "xla", w)(q, k, v))  # noqa: E731
    scanned = jax.jit(lambda q: jax.lax.scan(step, q, words)[1])(q)
    np.testing.assert_allclose(scanned[0], out, rtol=1e-4, atol=1e-6)
    assert _distinct(scanned)


def test_a_chunked_call_draws_the_noise_of_its_rows():
    """The first rows of a call of 300 rows are the call of those rows (no causal mask)."""
    q, k, v = _inputs(num_rows=300)
    call = jax.jit(_call(SEQUENCE, "xla"))
    whole, part = call(q, k, 0 * v), call(q[:, :200], k, 0 * v)
    np.testing.assert_allclose(whole[:, :200], part, atol=1e-6)
    # Zero values release the noise itself: no two rows have a Gaussian in common.
    first = np.asarray(whole)[..., 0].ravel()
    assert len(np.unique(first)) > 0.99 * first.size


@pytest.mark.parametrize("mode", ["exact", "record", "sequence"])
def test_xla_never_holds_all_rows_of_weights(mode):
    """Scratch memory of the compiled call with its gradients, at T = 4096, S = 2048."""
    num_rows, num_keys, heads, depth = 4096, 2048, 2, 16
    spec = {"exact": AttentionSpec(mode="exact", scale=0.2), **SPECS}[mode]
    everything = 4 * heads * num_rows * num_keys

    def scratch(f):
        sizes = (num_rows, num_keys, num_keys)
        shapes = [jax.ShapeDtypeStruct((1, n, heads, depth), jnp.float32) for n in sizes]
        return jax.jit(f).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    def gradients(implementation):
        call = _call(spec, implementation)
        return jax.grad(lambda q, k, v: jnp.sum(call(q, k, v) ** 2), argnums=(0, 1, 2))

    # A chunk of 256 rows is a sixteenth; it is held a few times over.
    assert scratch(gradients("xla")) < 0.6 * everything
    if mode == "exact":  # the definition does hold them all: the bound means something
        assert scratch(gradients("reference")) > everything


def test_scratch_memory_grows_linearly_with_the_rows():
    def scratch(num_rows):
        q = jax.ShapeDtypeStruct((1, num_rows, 1, 16), jnp.float32)
        k = jax.ShapeDtypeStruct((1, 512, 1, 16), jnp.float32)
        f = jax.grad(lambda q, k: jnp.sum(_call(RECORD, "xla")(q, k, k)), argnums=(0, 1))
        return jax.jit(f).lower(q, k).compile().memory_analysis().temp_size_in_bytes

    small, large = scratch(1024), scratch(4096)
    # 3072 more rows cost inputs and outputs, 16 floats a row, some of them twice.
    assert large - small < 3072 * 16 * 4 * 10
