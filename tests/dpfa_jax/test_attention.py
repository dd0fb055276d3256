"""The public op: exact mode, what each argument does in the private ones, and refusals."""

import functools
import itertools
import math
import re

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpfa_jax import AttentionPrivacy, SecureKey, attention_event, dp_dot_product_attention, keys
from pallas_kernels.attention import AttentionSpec, attention

RECORD = AttentionPrivacy(
    unit="record",
    noise_multiplier=0.8,
    value_clip=1.5,
    adjacency="add_remove",
    logit_bound=0.4,
)
SEQUENCE = AttentionPrivacy(
    unit="sequence", noise_multiplier=0.8, value_clip=1.5, adjacency="replace_one"
)
PRIVACY = {"record": RECORD, "sequence": SEQUENCE}
KEY = keys.reproducible_key(2024)
IMPLEMENTATIONS = ("reference", "xla")


def make(batch=2, num_rows=5, num_keys=7, heads=4, kv_heads=2, depth=8, dtype=jnp.float32):
    random = np.random.default_rng(0)
    shapes = [(batch, num_rows, heads, depth)] + [(batch, num_keys, kv_heads, depth)] * 2
    return [jnp.asarray(random.normal(size=s), dtype) for s in shapes]


# --- privacy=None: what jax.nn.dot_product_attention does -------------------------------

CASES = {
    "plain": ({}, {}),
    "causal": ({}, {"is_causal": True}),
    "causal, more keys": ({"num_rows": 3}, {"is_causal": True}),
    "causal, more rows": ({"num_keys": 3}, {"is_causal": True}),
    "lengths": ({}, {"key_value_seq_lengths": jnp.asarray([3, 7], jnp.int32)}),
    "window": ({"num_rows": 7}, {"local_window_size": 2}),
    "window 0": ({"num_rows": 7}, {"local_window_size": 0}),
    "window pair": ({"num_rows": 7}, {"local_window_size": (1, 3)}),
    "causal window": ({"num_rows": 7}, {"local_window_size": (2, 0), "is_causal": True}),
    "scale": ({}, {"scale": -0.3}),
    "multi-query": ({"kv_heads": 1}, {}),
    "no groups": ({"kv_heads": 4}, {}),
    "one head": ({"heads": 1, "kv_heads": 1}, {}),
    "odd depth": ({"depth": 11}, {}),
    "mask": ({}, {"mask": jnp.asarray(np.random.default_rng(1).random((2, 4, 5, 7)) < 0.7)}),
    "mask of columns": ({}, {"mask": jnp.asarray([[[[True] * 4 + [False] * 3]]])}),
    "everything": (
        {"num_rows": 300, "num_keys": 300, "depth": 4},
        {
            "is_causal": True,
            "local_window_size": (20, 4),
            "key_value_seq_lengths": jnp.asarray([300, 290], jnp.int32),
            "scale": 0.7,
        },
    ),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", CASES)
def test_exact_mode_is_that_of_jax_nn(name, implementation):
    shape, options = CASES[name]
    x = make(**shape)
    cotangent = jnp.cos(jnp.arange(x[0].size, dtype=jnp.float32)).reshape(x[0].shape)

    def ours(q, k, v):
        return dp_dot_product_attention(q, k, v, implementation=implementation, **options)

    def theirs(q, k, v):
        with jax.numpy_dtype_promotion("standard"):
            return jax.nn.dot_product_attention(q, k, v, **options)

    outs = []
    for f in (ours, theirs):
        value, pull = jax.vjp(jax.jit(f), *x)
        outs.append((value, *pull(cotangent)))
    for got, want in zip(*outs, strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_exact_mode_in_short_formats(dtype):
    x = make(dtype=dtype)
    wide = jax.nn.dot_product_attention(*(a.astype(jnp.float32) for a in x))
    for name in IMPLEMENTATIONS:
        out = dp_dot_product_attention(*x, implementation=name)
        assert out.dtype == dtype
        np.testing.assert_allclose(out.astype(jnp.float32), wide, atol=2e-2)


# --- from AttentionPrivacy to the kernel's numbers --------------------------------------

NUMBERS = {"scale": 0.25, "head_dim": 16, "num_keys": 1, "dtype": "float32"}


@pytest.mark.parametrize("z", [0.5, 4.0])
@pytest.mark.parametrize(
    ("adjacency", "m"),
    list(itertools.product(("add_remove", "replace_one"), (1, 3))),
)
def test_record_noise_follows_from_the_formulas(adjacency, m, z):
    privacy = AttentionPrivacy(
        unit="record",
        noise_multiplier=z,
        value_clip=2.0,
        adjacency=adjacency,
        logit_bound=-3.0,
        rows_per_record=m,
    )
    spec = privacy.spec(**NUMBERS, is_causal=True, window=(1, 2))
    if adjacency == "add_remove":
        weight = 2.0 * 16**-0.25
        joint = m * math.hypot(2.0, weight)
    else:
        weight, joint = 2.0 * math.sqrt(3), m * 2 * 2.0
    assert spec.numerator_std == pytest.approx(z * joint, rel=1e-4)
    assert spec.numerator_std >= z * joint
    assert spec.denominator_std == pytest.approx(z * joint / weight, rel=1e-4)
    assert spec.denominator_floor == spec.denominator_std
    assert (spec.mode, spec.value_clip, spec.logit_bound) == ("record", 2.0, -3.0)
    assert (spec.scale, spec.is_causal, spec.window) == (0.25, True, (1, 2))
    # Never without the public grid, never fewer rounds than the analysed cipher has.
    assert (spec.grid, spec.rounds) == (10, 20)


def test_sequence_noise_follows_from_the_formula():
    spec = SEQUENCE.spec(**NUMBERS, is_causal=True, window=(4, 0))
    assert spec.numerator_std == pytest.approx(0.8 * 2 * 1.5, rel=1e-4)
    assert spec.numerator_std >= 0.8 * 2 * 1.5
    assert (spec.mode, spec.value_clip) == ("sequence", 1.5)
    assert (spec.scale, spec.is_causal, spec.window) == (0.25, True, (4, 0))
    assert (spec.grid, spec.rounds) == (10, 20)


def test_a_floor_that_is_given_is_used():
    privacy = AttentionPrivacy(
        unit="record",
        noise_multiplier=1.0,
        value_clip=1.0,
        adjacency="add_remove",
        logit_bound=0.0,
        denominator_floor=0.125,
    )
    assert privacy.spec(**NUMBERS).denominator_floor == 0.125


@pytest.mark.parametrize(("unit", "implementation"), [("record", "xla"), ("sequence", "reference")])
def test_every_argument_reaches_the_kernel(unit, implementation):
    q, k, v = make(num_rows=7)
    lengths = jnp.asarray([4, 7], jnp.int32)
    mask = jnp.asarray(np.random.default_rng(1).random((1, 4, 7, 7)) < 0.8)

    @jax.jit
    def op(q, k, v, rng):
        return dp_dot_product_attention(
            q,
            k,
            v,
            privacy=PRIVACY[unit],
            rng=rng,
            scale=0.3,
            is_causal=True,
            key_value_seq_lengths=lengths,
            local_window_size=(3, 2),
            mask=mask,
            implementation=implementation,
        )

    @jax.jit
    def kernel(q, k, v, words):
        spec = PRIVACY[unit].spec(
            scale=0.3, head_dim=8, num_keys=7, dtype="float32", is_causal=True, window=(3, 2)
        )
        return attention(
            q,
            k,
            v,
            spec,
            key_words=words,
            lengths=lengths,
            mask=mask,
            implementation=implementation,
        )

    out = op(q, k, v, KEY)
    assert bool((out == kernel(q, k, v, jax.random.key_data(KEY))).all())
    assert bool((out != op(q, k, v, jax.random.fold_in(KEY, 1))).any(axis=-1).all())


def test_a_secure_key_is_accepted_and_its_noise_is_that_of_its_key():
    x = make()
    secure = SecureKey.generate()
    call = functools.partial(dp_dot_product_attention, *x, privacy=SEQUENCE)
    out = call(rng=secure)
    with keys.allow_reuse_for_tests():
        np.testing.assert_array_equal(out, call(rng=secure.key()))
    with pytest.raises(ValueError, match="rng: this key has made noise before"):
        call(rng=secure)


def test_privacy_is_static_and_hashable():
    call = jax.jit(dp_dot_product_attention, static_argnames="privacy")
    x = make()
    assert call.eval_shape(*x, privacy=SEQUENCE, rng=KEY).shape == x[0].shape
    assert hash(RECORD) == hash(AttentionPrivacy(**vars(RECORD)))
    with pytest.raises(AttributeError):
        RECORD.noise_multiplier = 0.0


@pytest.mark.parametrize("unit", PRIVACY)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_short_formats_leave_in_the_dtype_of_the_query(unit, dtype):
    out = jax.eval_shape(
        lambda q, k, v, rng: dp_dot_product_attention(q, k, v, privacy=PRIVACY[unit], rng=rng),
        *make(dtype=dtype),
        KEY,
    )
    assert (out.shape, out.dtype) == ((2, 5, 4, 8), dtype)
    float32 = PRIVACY[unit].spec(scale=1.0, head_dim=8, num_keys=7, dtype="float32")
    short = PRIVACY[unit].spec(scale=1.0, head_dim=8, num_keys=7, dtype=jnp.dtype(dtype).name)
    assert short.numerator_std > float32.numerator_std  # rounding is paid for


# --- rows of one record -----------------------------------------------------------------

M_ROWS = AttentionPrivacy(
    unit="record",
    noise_multiplier=1.0,
    value_clip=1.0,
    adjacency="add_remove",
    logit_bound=0.4,
    rows_per_record=2,
)


@jax.jit
def _with_ids(q, k, v, ids, mask, rng):
    return dp_dot_product_attention(q, k, v, privacy=M_ROWS, rng=rng, record_ids=ids, mask=mask)


def test_rows_beyond_the_first_m_of_a_record_are_hidden():
    ids = jnp.asarray([[5, 5, -1, 5, 2**31 - 1, -1, -1], [0, 1, 2, 3, 4, 5, 6]], jnp.int32)
    first_two = np.array([[1, 1, 1, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1]], bool)
    first_two = jnp.asarray(first_two)[:, None, None, :]
    apart = jnp.broadcast_to(jnp.arange(7, dtype=jnp.int32), (2, 7))  # as many records as rows
    q, k, v = make()

    def run(k, v, ids, mask):
        mask = jnp.broadcast_to(mask, (2, 4, 5, 7))
        return np.asarray(_with_ids(q, k, v, ids, mask, KEY))

    everyone = jnp.ones((1, 1, 1, 1), jnp.bool_)
    out = run(k, v, ids, everyone)
    np.testing.assert_array_equal(out, run(k, v, apart, first_two))
    assert np.any(out != run(k, v, apart, everyone))
    # Whatever stands in the dropped rows, it is not read.
    bad = jnp.where(first_two.swapaxes(1, 3), 0.0, jnp.nan)
    np.testing.assert_array_equal(out, run(k + bad, v + bad, ids, everyone))
    # A mask of the caller's is kept.
    other = jnp.asarray(np.random.default_rng(2).random((1, 4, 5, 7)) < 0.6)
    both = run(k, v, ids, other)
    np.testing.assert_array_equal(both, run(k, v, apart, other & first_two))


def test_64_bit_mode_changes_no_type():
    """Under strict promotion one default integer of 64 bits would raise."""
    with jax.enable_x64(True):
        lengths, ids = jnp.asarray([3, 7]), jnp.zeros((2, 7), jnp.int64)
        x = make()

        def loss(q, rng):
            out = dp_dot_product_attention(
                q,
                *x[1:],
                privacy=M_ROWS,
                rng=rng,
                is_causal=True,
                key_value_seq_lengths=lengths,
                record_ids=ids,
            )
            return jnp.sum(out)

        assert jax.eval_shape(jax.grad(loss), x[0], KEY).dtype == jnp.float32


def test_random_ids_against_counting():
    from dpfa_jax.attention import _keep_first_rows

    random = np.random.default_rng(3)
    for most in (1, 2, 5):
        ids = random.integers(-3, 4, size=(6, 40)).astype(np.int32)
        got = np.asarray(_keep_first_rows(jnp.asarray(ids), most))
        for row, kept in zip(ids, got, strict=True):
            for s in range(40):
                assert kept[s] == (np.sum(row[:s] == row[s]) < most)


# --- the cost ---------------------------------------------------------------------------


@pytest.mark.parametrize("unit", PRIVACY)
def test_each_row_of_each_query_head_of_each_call_is_one_release(unit):
    """Query heads, also where several share keys and values; the batch holds others' data."""
    for shape, calls, releases in (
        ((1, 1, 1, 1), 1, 1),
        ((9, 5, 4, 8), 1, 20),
        ((2, 5, 4, 8), 3, 60),
    ):
        event = attention_event(PRIVACY[unit], shape, calls)
        assert event == dp_accounting.SelfComposedDpEvent(
            dp_accounting.GaussianDpEvent(0.8), releases
        )


def test_one_release_of_multiplier_one_costs_what_it_should():
    """μ = 1 is ε = 4.38 at δ = 1e-5 (privacy.md, section 6)."""
    privacy = AttentionPrivacy(
        unit="sequence", noise_multiplier=2.0, value_clip=1.0, adjacency="replace_one"
    )
    accountant = dp_accounting.pld.PLDAccountant()
    accountant.compose(attention_event(privacy, (1, 2, 2, 8)))  # 4 releases at z = 2
    assert accountant.get_epsilon(1e-5) == pytest.approx(4.38, abs=0.01)


def test_no_privacy_costs_everything():
    assert attention_event(None, (1, 2, 3, 4)) == dp_accounting.NonPrivateDpEvent()


@pytest.mark.parametrize(
    "shape", [(), (1, 2, 3), (1, 2, 3, 4, 5), (1, 0, 3, 4), (1, 2, -3, 4), (1, 2.5, 3, 4)]
)
def test_event_shapes(shape):
    for privacy in (None, RECORD):
        with pytest.raises(ValueError, match=re.escape(f"query_shape={shape!r}: four positive")):
            attention_event(privacy, shape)


@pytest.mark.parametrize("calls", [0, -1, 1.5, True, None, "2"])
def test_event_calls(calls):
    with pytest.raises(ValueError, match=re.escape(f"calls={calls!r}: allowed is a whole")):
        attention_event(RECORD, (1, 2, 3, 4), calls)


# --- AttentionPrivacy refuses -----------------------------------------------------------

NAN, INF = math.nan, math.inf
BAD_RECORD = {
    "unit": ["example", None, "Record", ""],
    "noise_multiplier": [0, 0.0, -1.0, NAN, INF, None, "1", True],
    "value_clip": [0, -1, NAN, INF, None, "1", True, 1e-16, 1e16],
    "adjacency": ["swap", None, "", "ADD_REMOVE"],
    "logit_bound": [None, NAN, INF, -INF, "0", True, 1e31, -1e31],
    "rows_per_record": [0, -1, 1.0, True, None, "2"],
    "denominator_floor": [0, -0.5, NAN, INF, "1", True],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, vs in BAD_RECORD.items() for v in vs])
def test_bad_record_options(name, value):
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r}: ")) as caught:
        AttentionPrivacy(**{**vars(RECORD), name: value})
    assert re.search("allowed|needs", str(caught.value))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("adjacency", "add_remove"),
        ("logit_bound", 0.0),
        ("rows_per_record", 2),
        ("denominator_floor", 1.0),
        ("noise_multiplier", NAN),
        ("value_clip", -1.0),
    ],
)
def test_bad_sequence_options(name, value):
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r}: ")) as caught:
        AttentionPrivacy(**{**vars(SEQUENCE), name: value})
    assert "allowed" in str(caught.value)


def test_nothing_has_a_default_that_weakens_privacy():
    for name in ("noise_multiplier", "value_clip", "adjacency", "unit"):
        options = {**vars(RECORD)}
        del options[name]
        with pytest.raises(TypeError, match=name):
            AttentionPrivacy(**options)
    assert not RECORD.public_queries


# --- the op refuses, while tracing ------------------------------------------------------


def _shape(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


IDS = jnp.zeros((2, 7), jnp.int32)
REFUSED = {
    "missing key": ({"rng": None}, "rng=None: noise needs a key; there is no default."),
    "threefry key": ({"rng": "fry"}, "rng is a key<fry>: its key is too short"),
    "raw key": ({"rng": "raw"}, "a key<chacha20> array is needed"),
    "several keys": ({"rng": "many"}, "rng has shape (2,): one key is needed, shape ()"),
    "key without privacy": ({"privacy": None}, "rng: privacy=None adds no noise"),
    "ids without privacy": (
        {"privacy": None, "rng": None, "record_ids": IDS},
        "record_ids: has no meaning without privacy",
    ),
    "privacy": ({"privacy": "record"}, "privacy is a str: AttentionPrivacy or None"),
    "ids at one row": (
        {"privacy": RECORD, "record_ids": IDS},
        "rows_per_record=1 with record_ids=an array: record_ids is needed above 1",
    ),
    "no ids above one row": (
        {"privacy": M_ROWS},
        "rows_per_record=2 with record_ids=None: record_ids is needed above 1",
    ),
    "ids shape": (
        {"privacy": M_ROWS, "record_ids": jnp.zeros((7,), jnp.int32)},
        "record_ids has shape (7,): (2, 7) is needed",
    ),
    "infinite scale": ({"scale": INF}, "scale=inf: a finite Python number is needed"),
    "NaN scale": ({"scale": NAN}, "scale=nan: a finite Python number is needed"),
    "traced scale": ({"scale": "traced"}, "a finite Python number is needed; it is public"),
    "negative window": ({"local_window_size": -1}, "local_window_size=-1: allowed is a whole"),
    "negative pair": ({"local_window_size": (1, -1)}, "local_window_size=(1, -1): allowed is"),
    "triple": ({"local_window_size": (1, 2, 3)}, "local_window_size=(1, 2, 3): allowed is"),
    "float pair": ({"local_window_size": (1.0, 2)}, "local_window_size=(1.0, 2): allowed is"),
    "float window": ({"local_window_size": 1.5}, "local_window_size=1.5: allowed is a whole"),
    "implementation": (
        {"implementation": "flash"},
        "implementation='flash': allowed are None, 'mosaic_gpu', 'triton', 'mosaic_tpu', 'xla', "
        "'reference'.",
    ),
    "kernels that are not for this device": (
        {"implementation": "mosaic_tpu"},
        "implementation='mosaic_tpu' cannot do this call: needs a TPU, the default backend is",
    ),
    "mask": (
        {"mask": jnp.ones((5, 7), jnp.bool_)},
        "mask has shape (5, 7): it must broadcast to (2, 4, 5, 7)",
    ),
    "float mask": ({"mask": jnp.ones((1, 1, 5, 7))}, "mask is float32: bool is needed"),
    "lengths": (
        {"key_value_seq_lengths": jnp.zeros((3,), jnp.int32)},
        "lengths has shape (3,): (2,) is needed",
    ),
    "query": ({"query": _shape(5, 4, 8)}, "query has shape (5, 4, 8): four axes are needed"),
    "empty depth": (
        {"query": _shape(2, 5, 4, 0), "key": _shape(2, 7, 2, 0), "value": _shape(2, 7, 2, 0)},
        "query has shape (2, 5, 4, 0): no axis may be empty",
    ),
    "no keys": (
        {"key": _shape(2, 0, 2, 8), "value": _shape(2, 0, 2, 8)},
        "key has shape (2, 0, 2, 8): no axis may be empty",
    ),
    "integers": ({"query": _shape(2, 5, 4, 8, dtype=jnp.int32)}, "int32"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_the_argument(case):
    changes, message = REFUSED[case]
    options = {
        "query": _shape(2, 5, 4, 8),
        "key": _shape(2, 7, 2, 8),
        "value": _shape(2, 7, 2, 8),
        "privacy": SEQUENCE,
        "rng": "good",
    } | changes
    q, k, v = (options.pop(name) for name in ("query", "key", "value"))
    made = {
        "good": lambda rng: rng,
        "fry": lambda rng: jax.random.key(0),
        "raw": jax.random.key_data,
        "many": lambda rng: jax.random.split(rng, 2),
    }
    rng = options.pop("rng")

    def call(q, k, v, key, number):
        if options.get("scale") == "traced":
            options["scale"] = number
        return dp_dot_product_attention(q, k, v, rng=rng and made[rng](key), **options)

    with pytest.raises(ValueError, match=re.escape(message)):
        jax.jit(call).lower(q, k, v, _shape(dtype=KEY.dtype), _shape())


# --- a key is used once -----------------------------------------------------------------


def test_a_key_used_again_raises_outside_jit_and_inside_one_trace():
    x = make()
    op = functools.partial(dp_dot_product_attention, privacy=SEQUENCE)
    key = SecureKey.generate().key()
    op(*x, rng=key)
    with pytest.raises(ValueError, match="rng: this key has made noise before"):
        op(*x, rng=key)

    def twice(q, k, v, rng):
        return op(q, k, v, rng=rng) + op(q, k, v, rng=rng)

    def layers(q, k, v, rng):
        first, second = jax.random.split(rng)
        return op(op(q, k, v, rng=first), k, v, rng=second)

    with pytest.raises(ValueError, match="rng: this key has made noise before"):
        jax.eval_shape(twice, *x, KEY)
    assert jax.eval_shape(layers, *x, KEY).shape == x[0].shape


@pytest.mark.parametrize("kind", ["key", "SecureKey"])
def test_a_key_that_would_be_compiled_in_raises(kind):
    secure = SecureKey.generate()
    rng = secure if kind == "SecureKey" else secure.key()
    q, k, v = make()
    call = lambda q: dp_dot_product_attention(q, k, v, privacy=SEQUENCE, rng=rng)  # noqa: E731
    with pytest.raises(ValueError, match="rng: the key comes from outside the function"):
        jax.eval_shape(call, q)


@pytest.mark.parametrize("what", ["value", "lengths", "mask", "record_ids"])
def test_lanes_of_vmap_never_share_noise(what):
    """One key, and only one of the inputs differs: releases still need their own noise."""
    q, k, v = make()
    random = np.random.default_rng(4)
    lanes = {
        "value": jnp.zeros((3, *v.shape)),
        "lengths": jnp.asarray(random.integers(8, size=(3, 2)), jnp.int32),
        "mask": jnp.asarray(random.random((3, 1, 1, 1, 7)) < 0.5),
        "record_ids": jnp.asarray(random.integers(3, size=(3, 2, 7)), jnp.int32),
    }
    privacy = M_ROWS if what == "record_ids" else SEQUENCE

    def call(x, rng):
        name = {"lengths": "key_value_seq_lengths"}.get(what, what)
        value = x if what == "value" else 0 * v
        options = {} if what == "value" else {name: x}
        return dp_dot_product_attention(q, k, value, privacy=privacy, rng=rng, **options)

    out = np.asarray(jax.jit(jax.vmap(call, in_axes=(0, None)))(lanes[what], KEY))
    for i, j in ((0, 1), (0, 2), (1, 2)):
        # Gaussians on a grid of a thousandth: about 1 in 3000 agree by chance.
        assert np.mean(out[i] == out[j]) < 0.05


# --- shard_map --------------------------------------------------------------------------

DEVICES = "devices"
OPERANDS = ("query", "key", "value", "lengths", "mask", "record_ids")


def _local(x, rng):
    return dp_dot_product_attention(
        x["query"],
        x["key"],
        x["value"],
        privacy=M_ROWS,
        rng=rng,
        key_value_seq_lengths=x["lengths"],
        mask=x["mask"],
        record_ids=x["record_ids"],
    )


@pytest.mark.parametrize("varying", OPERANDS)
def test_shard_map_needs_a_key_of_its_own_on_every_device(varying):
    """Data that differs between devices under a key that does not: equal noise."""
    mesh = jax.make_mesh((1,), (DEVICES,), axis_types=(jax.sharding.AxisType.Auto,))
    q, k, v = make()
    lengths = jnp.asarray([3, 7], jnp.int32)
    mask = jnp.ones((2, 1, 1, 7), jnp.bool_)
    arguments = dict(zip(OPERANDS, (q, k, v, lengths, mask, IDS), strict=True))
    specs = {name: jax.P(DEVICES) if name == varying else jax.P() for name in OPERANDS}

    def build(fold):
        def local(x, rng):
            if fold:
                rng = jax.random.fold_in(rng, jax.lax.axis_index(DEVICES))
            return _local(x, rng)

        return jax.shard_map(local, mesh=mesh, in_specs=(specs, jax.P()), out_specs=jax.P(DEVICES))

    with pytest.raises(ValueError, match=rf"rng: the data differs along the mesh axis {DEVICES}"):
        jax.eval_shape(build(fold=False), arguments, KEY)
    if varying == "query":  # one device: what its folded key gives outside
        out = jax.jit(build(fold=True))(arguments, KEY)
        expected = jax.jit(_local)(arguments, jax.random.fold_in(KEY, 0))
        np.testing.assert_allclose(out, expected, atol=1e-5)


def test_shard_map_with_data_that_is_the_same_everywhere_accepts_one_key():
    mesh = jax.make_mesh((1,), (DEVICES,), axis_types=(jax.sharding.AxisType.Auto,))
    x = make()
    local = lambda q, k, v, rng: dp_dot_product_attention(  # noqa: E731
        q, k, v, privacy=SEQUENCE, rng=rng
    )
    mapped = jax.shard_map(local, mesh=mesh, in_specs=jax.P(), out_specs=jax.P())
    out = jax.jit(mapped)(*x, KEY)
    np.testing.assert_allclose(out, jax.jit(local)(*x, KEY), atol=1e-6)


def test_the_spec_of_the_kernel_is_not_an_argument_of_the_op():
    """Options that would weaken the noise (grid, rounds) cannot be passed in."""
    for name in ("grid", "rounds", "numerator_std", "spec"):
        assert name in AttentionSpec.__dataclass_fields__ or name == "spec"
        with pytest.raises(TypeError, match=name):
            dp_dot_product_attention(*make(), **{name: None})
