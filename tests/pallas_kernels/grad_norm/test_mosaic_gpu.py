"""The Hopper kernels in Pallas's interpreter, which looks for races; and GPU kernels on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grad_norm import (
    grad_norm_squared,
    grad_norms_with_rows,
    mosaic_gpu,
    upper_bound,
)


def make(shape, dtype):
    batch, length, rows, columns = shape
    random = np.random.default_rng(0)
    operands = (random.normal(size=(batch, length, n)) for n in (rows, columns))
    return [jnp.asarray(y, jnp.float32).astype(dtype) for y in operands]


def exact(x, g):
    x, g = (np.asarray(y, np.float64) for y in (x, g))
    return np.sum(np.matmul(np.swapaxes(x, 1, 2), g) ** 2, axis=(1, 2))


# More jobs than blocks and more steps than slots: rings go round within and across jobs.
CASES = [
    ((1, 300, 64, 130), "bfloat16", "gram", 3),
    ((1, 200, 130, 320), "float16", "direct", 2),
    ((2, 130, 70, 9), "float16", "gram", 2),
    ((1, 1, 1, 1), "bfloat16", "direct", 4),
]


@pytest.mark.parametrize(("shape", "dtype", "form", "stages"), CASES)
def test_interpreted_without_races(shape, dtype, form, stages, caplog, capfd):
    x, g = make(shape, dtype)
    blocks = mosaic_gpu.Blocks(gram_stages=stages, direct_stages=stages, thread_blocks=2)
    got = mosaic_gpu.grad_norm_squared(x, g, form, blocks=blocks, interpret=True)
    np.testing.assert_allclose(got, exact(x, g), rtol=1e-5)
    assert "RACE" not in caplog.text + "".join(capfd.readouterr())


@pytest.mark.parametrize("widths", [[(70, 9)], [(9, 70), (130, 200), (64, 3)]], ids=str)
def test_interpreted_with_rows(widths, caplog, capfd):
    leaves = [make((2, 200, *pair), "bfloat16") for pair in widths]
    blocks = mosaic_gpu.Blocks(gram_stages=2, thread_blocks=2)
    operands = (y for pair in leaves for y in pair)
    got = mosaic_gpu.gram_with_rows(*operands, blocks=blocks, interpret=True)
    assert len(got) == len(leaves)
    for norms, pair in zip(got, leaves, strict=True):
        check_rows(norms, *pair)
    assert "RACE" not in caplog.text + "".join(capfd.readouterr())


def check_rows(norms, x, g, rtol=1e-5):
    np.testing.assert_allclose(norms.squared, exact(x, g), rtol=rtol)
    a, b = (np.linalg.norm(np.asarray(y, np.float64), axis=2) for y in (x, g))
    for part, expected in zip(norms[1:], (a * b, a**2, b**2), strict=True):
        np.testing.assert_allclose(part, np.sum(expected, axis=1), rtol=rtol)


def test_interpreted_through_the_entry_point_and_vmap():
    x, g = make((4, 20, 5, 7), "bfloat16")
    call = functools.partial(
        grad_norm_squared, implementation="mosaic_gpu", form="gram", interpret=True
    )
    got = jax.vmap(call)(x[:, None], g[:, None])
    np.testing.assert_allclose(got[:, 0], exact(x, g), rtol=1e-5)


# (B, T, P, Q)
ON_GPU = [
    (1, 1, 1, 1),
    (5, 77, 33, 13),
    (3, 300, 200, 1000),
    (64, 256, 768, 768),
    (3, 1024, 768, 16),
    (150, 130, 64, 64),
    (2, 2048, 640, 384),
]


@pytest.mark.gpu
def test_leaves_that_share_launches_on_a_gpu():
    widths = [(768, 2304), (768, 768), (768, 3072), (3072, 768), (16, 33), (33, 16)] * 2
    leaves = [make((11, 256, *pair), "bfloat16") for pair in widths]
    leaves.append(make((3, 77, 40, 200), "float32"))
    got = jax.jit(grad_norms_with_rows)(leaves)
    assert len(got) == len(leaves)
    for norms, pair in zip(got, leaves, strict=True):
        # Matrix units cut each of the float32 sums of 16 products: 2⁻²³ of it at most.
        check_rows(norms, *pair, rtol=1e-5 + sum(y.shape[2] for y in pair) / 16 * 2.0**-23)


@functools.partial(jax.jit, static_argnames=("name", "form"))
def run(x, g, *, name, form):
    return grad_norm_squared(x, g, implementation=name, form=form)


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["gram", "direct"])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("mosaic_gpu", "bfloat16"),
        ("mosaic_gpu", "float16"),
        ("triton", "bfloat16"),
        ("triton", "float16"),
        ("triton", "float32"),
        ("xla", "bfloat16"),
        ("xla", "float32"),
    ],
)
class TestOnGpu:
    @pytest.mark.parametrize("shape", ON_GPU)
    def test_is_the_norm_in_float64(self, name, dtype, form, shape):
        x, g = make(shape, dtype)
        got, expected = run(x, g, name=name, form=form), exact(x, g)
        # TF32 would err by 1e-4 and more.
        np.testing.assert_allclose(got, expected, rtol=2e-5)
        assert (np.asarray(upper_bound(got, x, g, form), np.float64) >= expected).all()

    def test_repeats_to_the_last_bit(self, name, dtype, form):
        x, g = make((40, 300, 200, 1000), dtype)
        first, *others = (np.asarray(run(x, g, name=name, form=form)) for _ in range(5))
        for other in others:
            np.testing.assert_array_equal(first, other)

    def test_vmap(self, name, dtype, form):
        x, g = make((6, 140, 64, 72), dtype)
        call = functools.partial(run, name=name, form=form)
        got = jax.vmap(call)(*(y.reshape(2, 3, *y.shape[1:]) for y in (x, g)))
        np.testing.assert_allclose(got.reshape(6), exact(x, g), rtol=2e-5)

    def test_what_is_not_finite_shows_in_its_own_example_only(self, name, dtype, form):
        x, g = make((3, 140, 64, 72), dtype)
        got = np.asarray(run(x.at[1, 135, 2].set(jnp.nan), g, name=name, form=form))
        np.testing.assert_array_equal(np.isfinite(got), [True, False, True])
