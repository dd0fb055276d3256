"""Every implementation that runs on any machine, against float64.

Kernels run in Pallas's interpreter; those for Hopper in test_mosaic_gpu.py, where it looks
for races and takes seconds a call.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.grad_norm import grad_norm_squared, upper_bound, xla

KERNELS = ("triton", "mosaic_tpu")
NAMES = ("reference", "xla", *KERNELS)
# (B, T, P, Q): nothing to sum, one tile, a bit more than a tile, several tiles.
SHAPES = [(1, 1, 1, 1), (3, 17, 5, 9), (2, 129, 40, 8), (2, 40, 130, 270), (1, 290, 33, 140)]


def exact(x, g):
    """The squared norms in float64, from the operands as they are held."""
    weight = np.einsum("btp,btq->bpq", *(np.asarray(y, np.float64) for y in (x, g)))
    return np.sum(weight**2, axis=(1, 2))


def make(shape, dtype, seed=0):
    batch, length, rows, columns = shape
    random = np.random.default_rng(seed)
    scale = 10.0 ** random.uniform(-3, 1, size=(batch, length, 1))
    x, g = (random.normal(size=(batch, length, n)) * scale for n in (rows, columns))
    return jnp.asarray(x).astype(dtype), jnp.asarray(g).astype(dtype)


@functools.partial(jax.jit, static_argnames=("name", "form"))
def run(x, g, *, name, form):
    return grad_norm_squared(x, g, implementation=name, form=form, interpret=name in KERNELS)


@pytest.mark.parametrize("form", ["gram", "direct"])
@pytest.mark.parametrize("name", NAMES)
class TestImplementation:
    @pytest.mark.parametrize(
        ("shape", "dtype"),
        [*((s, "float32") for s in SHAPES), (SHAPES[2], "bfloat16"), (SHAPES[3], "float16")],
    )
    def test_is_the_norm_in_float64(self, name, form, shape, dtype):
        if name == "mosaic_tpu" and dtype == "float16":  # which TPUs do not have
            dtype = "bfloat16"
        x, g = make(shape, dtype)
        got, expected = run(x, g, name=name, form=form), exact(x, g)
        assert got.shape == expected.shape
        assert got.dtype == jnp.float32
        # A product shortened to TF32 or bfloat16 errs by 1e-3.
        np.testing.assert_allclose(got, expected, rtol=1e-5)
        assert (np.asarray(upper_bound(got, x, g, form), np.float64) >= expected).all()

    @settings(max_examples=5, deadline=None, derandomize=True)
    @given(
        st.tuples(*(st.integers(1, n) for n in (3, 140, 140, 140))),
        st.sampled_from(["float32", "bfloat16"]),
        st.integers(0, 99),
    )
    def test_any_shape(self, name, form, shape, dtype, seed):
        x, g = make(shape, dtype, seed)
        np.testing.assert_allclose(run(x, g, name=name, form=form), exact(x, g), rtol=1e-5)

    def test_padding_changes_nothing(self, name, form):
        x, g = make((2, 150, 24, 40), "float32")
        keep = jnp.arange(150)[None, :, None] < jnp.asarray([150, 37])[:, None, None]
        expected = [exact(x[:1], g[:1])[0], exact(x[1:, :37], g[1:, :37])[0]]
        # What stands against a row of zeros does not count.
        np.testing.assert_allclose(
            run(jnp.where(keep, x, 0), g, name=name, form=form), expected, rtol=1e-5
        )
        np.testing.assert_array_equal(run(x * 0, g, name=name, form=form), 0.0)

    def test_vmap(self, name, form):
        x, g = make((6, 20, 7, 9), "float32")
        lanes = [y.reshape(2, 3, *y.shape[1:]) for y in (x, g)]
        call = functools.partial(run, name=name, form=form)
        got = jax.vmap(call)(*lanes)
        np.testing.assert_allclose(got.reshape(6), exact(x, g), rtol=1e-5)
        got = jax.vmap(jax.vmap(call, in_axes=(0, None)), in_axes=(0, None))(
            x.reshape(2, 3, 1, 20, 7), g[:1]
        )
        expected = exact(x, np.broadcast_to(g[:1], g.shape))
        np.testing.assert_allclose(got.reshape(6), expected, rtol=1e-5)

    def test_the_bound_holds_where_rows_cancel(self, name, form):
        """Rows in pairs whose products cancel but for a millionth."""
        x, g = make((4, 64, 48, 60), "float32", seed=1)
        x = jnp.repeat(x, 2, axis=1)
        signs = jnp.where(jnp.arange(128) % 2 == 0, 1.0, -1.0 + 1e-6)[:, None]
        g = jnp.repeat(g, 2, axis=1) * signs
        got = run(x, g, name=name, form=form)
        bound = np.asarray(upper_bound(got, x, g, form), np.float64)
        assert (np.asarray(got) >= 0).all()
        assert (bound >= exact(x, g)).all()
        if form == "direct":  # which errs by a part of the norm, not of its square
            rows = [np.linalg.norm(np.asarray(y, np.float64), axis=2) for y in (x, g)]
            assert (bound <= (1e-3 * np.sum(rows[0] * rows[1], axis=1)) ** 2).all()

    @pytest.mark.parametrize("exponent", [-22, 17])
    def test_numbers_that_under_and_overflow_fail_closed(self, name, form, exponent):
        """Squares of these are no float32: the bound, or a NaN or inf, says so."""
        x, g = make((2, 30, 8, 9), "float32")
        x, g = x * jnp.float32(10.0**exponent), g * jnp.float32(10.0**-exponent)
        got = run(x, g, name=name, form=form)
        bound = np.asarray(upper_bound(got, x, g, form), np.float64)
        assert not (bound < exact(x, g)).any()

    @pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
    def test_what_is_not_finite_shows_in_its_own_example_only(self, name, form, bad):
        x, g = make((3, 140, 8, 16), "float32")
        got = np.asarray(run(x.at[1, 135, 2].set(bad), g, name=name, form=form))
        np.testing.assert_array_equal(np.isfinite(got), [True, False, True])

    def test_repeats_to_the_last_bit(self, name, form):
        x, g = make((2, 200, 140, 20), "bfloat16")
        first, second = (run(x, g, name=name, form=form) for _ in range(2))
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("form", ["gram", "direct"])
def test_xla_in_many_tiles_is_the_same(form, monkeypatch):
    x, g = make((3, 600, 300, 280), "float32")
    monkeypatch.setattr(xla, "BOUND", 1)
    got = xla.grad_norm_squared(x, g, form)
    np.testing.assert_allclose(got, exact(x, g), rtol=1e-5)


@pytest.mark.parametrize(
    ("form", "shape"), [("gram", (16, 4096, 64, 64)), ("direct", (16, 16, 4096, 8192))]
)
def test_xla_keeps_no_whole_matrix(form, shape):
    batch, length, rows, columns = shape
    x, g = (jax.ShapeDtypeStruct((batch, length, n), jnp.float32) for n in (rows, columns))
    compiled = jax.jit(functools.partial(xla.grad_norm_squared, form=form)).lower(x, g).compile()
    whole = 4 * batch * (length**2 if form == "gram" else rows * columns)
    operands = 4 * batch * length * (rows + columns)
    kept = compiled.memory_analysis().temp_size_in_bytes
    assert kept <= 3 * 4 * xla.BOUND + 2 * operands < whole


def test_many_equal_terms_are_added_without_loss():
    """One float32 sum, term after term, would be off by far more."""
    x, g = jnp.full((1, 1, 1500), 1.1), jnp.full((1, 1, 1700), 1.1)
    got = grad_norm_squared(x, g, implementation="reference", form="direct")
    np.testing.assert_allclose(got, exact(x, g), rtol=1e-6)
