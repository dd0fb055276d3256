"""What the entry point refuses, what it picks, and why."""

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels.grad_norm import (
    api,
    best_form,
    explain,
    grad_norm_squared,
    implementations,
    multiply_adds,
)
from pallas_kernels.grad_norm.common import pair

X, G = jnp.ones((2, 3, 4)), jnp.ones((2, 3, 5))


@pytest.mark.parametrize(
    ("x", "g", "options", "message"),
    [
        (X[0], G, {}, r"x has shape \(3, 4\): three axes"),
        (X, G[None], {}, r"g has shape \(1, 2, 3, 5\): three axes"),
        (X.astype(int), G, {}, "x is int32: allowed are float32, bfloat16 and float16"),
        (X[:, :0], G[:, :0], {}, r"x has shape \(2, 0, 4\): no axis may be empty"),
        (X, G.astype(jnp.bfloat16), {}, "x is float32 and g is bfloat16: one dtype"),
        (X, G[:1], {}, r"x has shape \(2, 3, 4\) and g \(1, 3, 5\)"),
        (X, G[:, :2], {}, r"x has shape \(2, 3, 4\) and g \(2, 2, 5\)"),
        (X, G, {"form": "ghost"}, "form='ghost': allowed are None, 'gram', 'direct'"),
        (X, G, {"implementation": "cuda"}, "implementation='cuda': allowed are None, 'mosaic_gpu'"),
        (X, G, {"interpret": True}, "interpret=True with implementation=None"),
        (X, G, {"interpret": True, "implementation": "xla"}, "name the kernels"),
        (
            X,
            G,
            {"interpret": True, "implementation": "mosaic_gpu"},
            "'mosaic_gpu' cannot do this call: float32 operands",
        ),
    ],
)
def test_refused(x, g, options, message):
    with pytest.raises(ValueError, match=message):
        grad_norm_squared(x, g, **options)


@pytest.mark.parametrize("name", ["mosaic_gpu", "triton", "mosaic_tpu"])
def test_a_forced_name_raises_where_its_device_is_absent(name, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    with pytest.raises(ValueError, match=f"'{name}' cannot do this call: needs a"):
        grad_norm_squared(X, G, implementation=name)


def test_none_takes_the_first_that_can(monkeypatch):
    taken = []
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    monkeypatch.setitem(api._PLAIN, "xla", lambda x, g, form: taken.append(form))
    grad_norm_squared(X, G)
    assert taken == [best_form(3, 4, 5)]


def test_explain_names_all_and_gives_reasons(monkeypatch):
    reasons = explain(X, G)
    assert tuple(name for name, _ in reasons) == implementations()
    monkeypatch.setattr(api, "_wrong_device", lambda name: None)
    on_any_device = dict(explain(X, G))
    assert "float32" in on_any_device["mosaic_gpu"]
    assert on_any_device["triton"] is None
    half = [jax.ShapeDtypeStruct(y.shape, jnp.float16) for y in (X, G)]
    assert "float16" in dict(explain(*half))["mosaic_tpu"]
    assert dict(explain(*half))["mosaic_gpu"] is None
    with pytest.raises(ValueError, match="x has shape"):
        explain(X, G[:1])


class TestForm:
    @pytest.mark.parametrize(
        ("shape", "form"),
        [
            ((256, 768, 3072), "gram"),
            ((1024, 768, 3072), "gram"),  # by a little: 2.21e9 against 2.42e9
            ((1024, 768, 768), "direct"),
            ((1024, 768, 16), "direct"),
            ((64, 768, 768), "gram"),
            ((1, 1, 1), "direct"),
        ],
    )
    def test_of_layers(self, shape, form):
        assert best_form(*shape) == form

    @given(*(st.integers(1, 5000) for _ in range(3)))
    def test_is_the_cheaper_one(self, length, rows, columns):
        shape = (length, rows, columns)
        costs = {form: multiply_adds(*shape, form) for form in ("gram", "direct")}
        assert costs[best_form(*shape)] == min(costs.values())

    @given(st.integers(1, 20), st.integers(1, 99), st.integers(1, 99))
    def test_count_is_what_tiles_do(self, tiles, rows, columns):
        """T a multiple of the tile: n(n + 1)/2 tiles of both Gram matrices."""
        expected = tiles * (tiles + 1) // 2 * 128 * 128 * (rows + columns)
        assert multiply_adds(128 * tiles, rows, columns, "gram") == expected


@pytest.mark.parametrize("tiles", range(1, 12))
def test_pairs_are_the_lower_triangle_once(tiles):
    count = tiles * (tiles + 1) // 2
    places = [tuple(map(int, pair(jnp.int32(i), tiles))) for i in range(count)]
    assert sorted(places) == [(i, j) for i in range(tiles) for j in range(i + 1)]


def products(jaxpr):
    """All matrix products, those of nested programs included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        nested = jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")
        )
        for x in nested:
            x = getattr(x, "jaxpr", x)
            if hasattr(x, "eqns"):
                yield from products(x)


@pytest.mark.parametrize("form", ["gram", "direct"])
@pytest.mark.parametrize("name", ["reference", "xla", "triton", "mosaic_tpu"])
def test_float32_is_never_shortened(name, form):
    """A CPU multiplies float32 as it is whatever the precision says; other devices do not."""
    x, g = jnp.ones((2, 300, 64)), jnp.ones((2, 300, 200))
    interpret = name not in ("reference", "xla")

    def call(x, g):
        return grad_norm_squared(x, g, implementation=name, form=form, interpret=interpret)

    found = list(products(jax.make_jaxpr(call)(x, g).jaxpr))
    assert len(found) == (2 if form == "gram" else 1)
    highest = jax.lax.Precision.HIGHEST
    assert all(equation.params["precision"] == (highest, highest) for equation in found)
    assert all(equation.outvars[0].aval.dtype == jnp.float32 for equation in found)
