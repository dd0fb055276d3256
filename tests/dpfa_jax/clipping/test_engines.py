"""Every engine against brute force: one call of ``jax.grad`` an example, clipped in float64."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clipping_models import MODELS

from dpfa_jax import clipped_grad
from dpfa_jax.clipping import plan


@functools.cache
def case(name):
    """A model with the float64 gradients of its examples, and a clip norm that clips half."""
    loss, params, batch = MODELS[name]()
    grad = jax.jit(jax.grad(loss))
    singles = [
        [np.asarray(g, np.float64) for g in jax.tree.leaves(grad(params, *(x[i] for x in batch)))]
        for i in range(len(batch[0]))
    ]
    norms = [math.sqrt(sum(np.sum(g**2) for g in single)) for single in singles]
    return loss, params, batch, singles, float(np.median(norms)) * 1.001


def expected(singles, l2_clip_norm, groups=None):
    """Σ clip(g), flat or group by group (``groups``: of each leaf, its group)."""
    groups = groups or [0] * len(singles[0])
    count = len(set(groups))
    total = [np.zeros_like(g) for g in singles[0]]
    for single in singles:
        for group in set(groups):
            mine = [i for i, g in enumerate(groups) if g == group]
            norm = math.sqrt(sum(np.sum(single[i] ** 2) for i in mine))
            for i in mine:
                total[i] += single[i] * min(
                    1.0, l2_clip_norm / math.sqrt(count) / max(norm, 1e-300)
                )
    return total


def assert_close(actual, wanted, tolerance):
    actual = jax.tree.leaves(actual)
    largest = max(np.abs(x).max() for x in wanted)
    assert len(actual) == len(wanted)
    for x, y in zip(actual, wanted, strict=True):
        assert x.dtype == jnp.float32
        assert x.shape == y.shape
        np.testing.assert_allclose(np.asarray(x), y, rtol=0, atol=tolerance * largest)


FORMS = {"gram": math.inf, "materialised": 0.0}


def choose(form, monkeypatch):
    """One form for every leaf that has a choice."""
    monkeypatch.setattr(plan, "_PREFERENCE", FORMS[form])
    monkeypatch.setattr(plan, "_MEMORY_SHARE", math.inf)
    if form == "materialised":
        monkeypatch.setattr(plan, "has_one_product", lambda groups: False)


def tolerance_of(name):
    return 2e-2 if name in ("bfloat16_mlp", "slices_and_casts") else 2e-5


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("engine", "form"),
    [
        ("bookkeeping", "gram"),
        ("bookkeeping", "materialised"),
        ("two_pass", "gram"),
        ("per_layer", "gram"),
    ],
)
def test_engines_against_single_gradients(name, engine, form, monkeypatch):
    choose(form, monkeypatch)
    loss, params, batch, singles, clip = case(name)
    grad = clipped_grad(
        loss, l2_clip_norm=clip, engine=engine, batch_argnums=range(1, 1 + len(batch))
    )
    assert form in {p.form for p in grad.explain(params, *batch).leaves}
    groups = list(range(len(singles[0]))) if engine == "per_layer" else None
    # two_pass aims 2⁻¹² below its bound.
    slack = 3e-4 if engine == "two_pass" else 0.0
    actual = jax.jit(grad)(params, *batch)
    assert_close(actual, expected(singles, clip, groups), tolerance_of(name) + slack)


@pytest.mark.parametrize(
    ("engine", "dtype"),
    [
        ("bookkeeping", jnp.float32),
        ("per_layer", jnp.float32),
        ("bookkeeping", jnp.bfloat16),
    ],
)
def test_the_product_of_a_tied_embedding_is_materialised_alone(engine, dtype, monkeypatch):
    monkeypatch.setattr(plan, "_PREFERENCE", 0.0)
    monkeypatch.setattr(plan, "_MEMORY_SHARE", math.inf)
    loss, params, batch, *_ = case("tied_decoder")

    @jax.numpy_dtype_promotion("standard")  # Flax's norms
    def short(p, row):
        return loss(jax.tree.map(lambda x: x.astype(dtype), p), row).astype(jnp.float32)

    singles = [
        [np.asarray(g, np.float64) for g in jax.tree.leaves(jax.grad(short)(params, row))]
        for row in batch[0]
    ]
    norms = [math.sqrt(sum(np.sum(g**2) for g in single)) for single in singles]
    clip = float(np.median(norms))
    grad = clipped_grad(short, l2_clip_norm=clip, engine=engine)
    (tied,) = (p for p in grad.explain(params, *batch).leaves if p.product)
    assert (tied.form, tied.dtype) == ("gram", dtype)
    groups = list(range(len(singles[0]))) if engine == "per_layer" else None
    actual = jax.jit(grad)(params, *batch)
    tolerance = 2e-5 if dtype == jnp.float32 else 2e-2
    assert_close(actual, expected(singles, clip, groups), tolerance)
    # An example that is not finite is left out of the product too.
    rows = batch[0]

    def with_a_bad_one(p, row):
        return short(p, row) * jnp.where(jnp.all(row == rows[1]), jnp.inf, 1.0)

    grad = clipped_grad(with_a_bad_one, l2_clip_norm=clip, engine=engine)
    actual = jax.jit(grad)(params, *batch)
    del singles[1]
    assert_close(actual, expected(singles, clip, groups), tolerance)


# Of each model, what must be handled without materialising anything; what is left out here
# is added or multiplied entry by entry, or is listed in `MATERIALISED`.
SITES = {
    "mlp": "ac", "bfloat16_mlp": "ac", "cnn": ["first", "second", "head"],
    "padded_encoder": ["embed", "qkv", "out", "head"], "experts": ["router", "up", "down"],
    "routed_experts": ["router", "expert"], "rnn": ["embed", "w", "u", "out"],
    "nested_scans": "wvz", "shared_weights": ["w", "table"], "out_of_range_rows": "abw",
    "slices_and_casts": ["qkv", "table"], "unrecognised_paths": "f",
}  # fmt: skip
KERNELS = ("kernel", "weight", "embed", "['w']")


@pytest.mark.parametrize("name", MODELS)
def test_what_is_recognised(name, monkeypatch):
    """So that a change which quietly materialises more is seen."""
    choose("gram", monkeypatch)
    loss, params, batch, *_ = case(name)
    told = clipped_grad(
        loss, l2_clip_norm=1.0, engine="bookkeeping", batch_argnums=range(1, 1 + len(batch))
    ).explain(params, *batch)
    gram = {n for n, p in zip(told.names, told.leaves, strict=True) if p.form == "gram"}
    if name in SITES:
        assert gram == {f"['{leaf}']" for leaf in SITES[name]}
    elif name in ("lora", "scanned_layers"):
        assert len(gram) == {"lora": 4, "scanned_layers": 3}[name]
    else:
        assert gram == {n for n in told.names if any(k in n for k in KERNELS)}
        assert gram


def test_leaves_of_no_known_use_are_materialised_and_say_why(monkeypatch):
    choose("gram", monkeypatch)
    loss, params, batch, *_ = case("unrecognised_paths")
    told = clipped_grad(loss, l2_clip_norm=1.0, engine="bookkeeping").explain(params, *batch)
    why = {n[2]: (p.form, p.why) for n, p in zip(told.names, told.leaves, strict=True)}
    assert why.pop("u") == ("unused", "no path to the loss")
    assert {k: v[1] for k, v in why.items() if v[0] == "materialised"} == {
        "a": "used by mul", "b": "used by dot_general", "c": "used by dot_general",
        "d": "used by custom_vjp_call", "e": "used by cond",
        "i": "carried from step to step of a scan", "g": "carried from step to step of a scan",
        "h": "used by square",
    }  # fmt: skip


@pytest.mark.parametrize("engine", ["bookkeeping", "two_pass", "per_layer", "vmap"])
@pytest.mark.parametrize("size", [1, 2])
def test_microbatches_change_nothing_but_cost(engine, size):
    loss, params, batch, singles, clip = case("shared_weights")
    grad = clipped_grad(
        loss, l2_clip_norm=clip, engine=engine, batch_argnums=(1, 2), microbatch_size=size
    )
    groups = list(range(len(singles[0]))) if engine == "per_layer" else None
    slack = 3e-4 if engine == "two_pass" else 0.0
    assert_close(jax.jit(grad)(params, *batch), expected(singles, clip, groups), 2e-5 + slack)


@pytest.mark.parametrize("engine", ["bookkeeping", "two_pass", "per_layer", "vmap"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_padding_and_bad_examples_contribute_exactly_zero(engine, bad):
    """Also where the readings of a site, not only the loss, are not finite."""
    loss, params, (x,), _, clip = case("scanned_layers")
    padding = jnp.asarray([False, True, False, False, False])
    grad = clipped_grad(loss, l2_clip_norm=clip, engine=engine)
    call = jax.jit(lambda x, p: grad(params, x, is_padding_example=p))
    clean = call(x, jnp.asarray([False, True, False, True, False]))
    for where in (x.at[1, 0].set(bad).at[3].set(bad), x.at[1].set(bad).at[3, 5, 2].set(bad)):
        for a, b in zip(jax.tree.leaves(call(where, padding)), jax.tree.leaves(clean), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    nothing = call(x.at[:].set(bad), padding)
    assert all((np.asarray(v) == 0).all() for v in jax.tree.leaves(nothing))


@pytest.mark.parametrize("engine", ["bookkeeping", "two_pass", "per_layer", "vmap"])
def test_aux_is_that_of_each_example_and_costs_no_materialised_leaf(engine):
    loss, params, batch, singles, clip = case("tied_decoder")

    def with_aux(p, row):
        value = loss(p, row)
        size = sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(p))
        return value, {"loss": value, "first": row[0], "size": size}

    grad = clipped_grad(with_aux, l2_clip_norm=clip, engine=engine, has_aux=True, microbatch_size=3)
    total, aux = jax.jit(grad)(params, *batch)
    groups = list(range(len(singles[0]))) if engine == "per_layer" else None
    assert_close(total, expected(singles, clip, groups), 4e-4)
    np.testing.assert_allclose(aux["loss"], [loss(params, row) for row in batch[0]], rtol=1e-5)
    np.testing.assert_array_equal(aux["first"], batch[0][:, 0])
    plain = clipped_grad(loss, l2_clip_norm=clip, engine=engine).explain(params, *batch)
    assert grad.explain(params, *batch).leaves == plain.leaves


@pytest.mark.parametrize("engine", ["auto", "bookkeeping", "vmap"])
def test_groups_are_clipped_by_themselves(engine):
    loss, params, batch, singles, clip = case("tied_decoder")
    attention = ["Multi" in jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(params)]
    grad = clipped_grad(
        loss, l2_clip_norm=clip, engine=engine, groups=lambda path: "Multi" in str(path)
    )
    wanted = expected(singles, clip, [int(x) for x in attention])
    assert_close(jax.jit(grad)(params, *batch), wanted, 2e-5)
    assert grad.sensitivity("add_remove") == clip


@pytest.mark.parametrize("engine", ["bookkeeping", "two_pass", "vmap"])
def test_automatic_clipping(engine):
    loss, params, batch, singles, _ = case("mlp")
    grad = clipped_grad(loss, l2_clip_norm=0.3, engine=engine, batch_argnums=(1, 2), automatic=0.01)
    norms = [math.sqrt(sum(np.sum(g**2) for g in single)) for single in singles]
    wanted = [
        sum(0.3 * s[i] / (n + 0.01) for s, n in zip(singles, norms, strict=True))
        for i in range(len(singles[0]))
    ]
    assert_close(grad(params, *batch), wanted, 5e-4)


@pytest.mark.parametrize("engine", ["bookkeeping", "two_pass", "per_layer", "vmap"])
def test_frozen_leaves_are_constants(engine):
    """Equal to clipping the trainable part alone; frozen leaves may even be integers."""
    loss, params, batch, *_ = case("mlp")
    grad = clipped_grad(
        lambda p, x, y: loss(p["net"], x, y) * p["times"].astype(jnp.float32),
        l2_clip_norm=0.5,
        engine=engine,
        batch_argnums=(1, 2),
        trainable=lambda path, leaf: path[-1].key in ("a", "d"),
    )
    total = grad({"net": params, "times": jnp.int32(2)}, *batch)
    assert total["times"] is None
    assert total["net"]["b"] is None
    part = clipped_grad(
        lambda p, x, y: 2.0 * loss({**params, **p}, x, y),
        l2_clip_norm=0.5,
        engine="per_layer" if engine == "per_layer" else "vmap",
        batch_argnums=(1, 2),
    )({"a": params["a"], "d": params["d"]}, *batch)
    for name, value in part.items():
        np.testing.assert_allclose(total["net"][name], value, rtol=0, atol=2e-4)


def test_auto_says_what_it_picked(monkeypatch):
    choose("gram", monkeypatch)
    loss, params, batch, *_ = case("tied_decoder")
    told = clipped_grad(loss, l2_clip_norm=1.0).explain(params, *batch)
    assert told.engine == "bookkeeping"
    assert "one pass" in told.why
    text = str(told)
    assert all(name in text for name in told.names)
    only_bias = clipped_grad(lambda b, x: jnp.sum(jnp.tanh(x + b)), l2_clip_norm=1.0)
    assert only_bias.explain(jnp.zeros(3), jnp.ones((4, 3))).engine == "vmap"
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, *batch))
    assert clipped_grad(loss, l2_clip_norm=1.0).explain(*shapes) == told


def test_auto_takes_two_passes_where_one_would_not_fit(monkeypatch):
    choose("gram", monkeypatch)
    loss, params, batch, singles, clip = case("tied_decoder")
    grad = clipped_grad(loss, l2_clip_norm=clip)
    held = int(grad.explain(params, *batch).held_bytes)
    monkeypatch.setattr("dpfa_jax.clipping.explain.device_memory", lambda: held)
    assert grad.explain(params, *batch).engine == "two_pass"
    assert_close(grad(params, *batch), expected(singles, clip), 4e-4)
    monkeypatch.setattr("dpfa_jax.clipping.explain.device_memory", lambda: 3 * held)
    assert grad.explain(params, *batch).engine == "bookkeeping"


def test_auto_counts_what_one_device_holds(monkeypatch):
    choose("gram", monkeypatch)
    loss, params, batch, _, clip = case("tied_decoder")
    held = int(clipped_grad(loss, l2_clip_norm=clip).explain(params, *batch).held_bytes)
    monkeypatch.setattr("dpfa_jax.clipping.explain.device_memory", lambda: held)
    monkeypatch.setattr("dpfa_jax.clipping.api.parts_of", lambda sharding: 4)
    assert clipped_grad(loss, l2_clip_norm=clip).explain(params, *batch).engine == "bookkeeping"


def test_auto_prefers_one_pass_by_predicted_time(monkeypatch):
    """The prediction ranks the engines as their work does: a second pass costs a pass."""
    choose("gram", monkeypatch)

    def loss(w, x):
        return jnp.sum(jnp.square(jnp.tanh(x @ w) @ w))

    w, x = jnp.full((256, 256), 0.01), jnp.ones((16, 32, 256))
    told = clipped_grad(loss, l2_clip_norm=1.0).explain(w, x)
    one, two = map(float, re.findall(r"[(,] ?([\d.e+-]+) ms", told.why))
    assert told.engine == "bookkeeping"
    assert one < two
    work = {}
    for engine in ("bookkeeping", "two_pass"):
        run = jax.jit(clipped_grad(loss, l2_clip_norm=1.0, engine=engine))
        work[engine] = run.lower(w, x).compile().cost_analysis()["flops"]
    assert work["bookkeeping"] < 0.9 * work["two_pass"]
