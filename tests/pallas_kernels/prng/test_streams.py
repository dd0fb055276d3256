"""Streams made together are those made one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import prng
from pallas_kernels.prng import streams

KEY = jnp.arange(11, 19, dtype=jnp.uint32)


@settings(max_examples=4, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 12_000), min_size=1, max_size=4), st.sampled_from([1, 2, 1000]))
def test_the_kernel_makes_the_streams(sizes, chunks):
    """Streams that end within a chunk, and that go on in the next launch."""
    asked = [(n, (i, 2**32 - 1, 3)) for i, n in enumerate(sizes)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "_MOST_CHUNKS", chunks)
        made = prng.normal_streams(KEY, asked, implementation="triton", interpret=True)
    for x, (size, nonce) in zip(made, asked, strict=True):
        expected = prng.normal_stream(KEY, size, nonce)
        assert x.shape == expected.shape
        np.testing.assert_allclose(x, expected, atol=1e-6)


def test_a_path_of_children():
    path = [(1, jnp.uint32(2**32 - 5)), (18, 0)]
    expected = prng.derive_key(prng.derive_key(KEY, *path[0]), *path[1])
    for options in ({}, {"implementation": "triton", "interpret": True}):
        np.testing.assert_array_equal(prng.derive_path(KEY, path, **options), expected)


def test_refusals():
    with pytest.raises(ValueError, match="two have one name"):
        prng.normal_streams(KEY, [(3, (0, 0, 1)), (4, (0, 0, 1))])
    with pytest.raises(ValueError, match="implementation='cuda'"):
        prng.normal_streams(KEY, [], implementation="cuda")
    if jax.default_backend() == "cpu":
        with pytest.raises(ValueError, match="needs a GPU"):
            prng.normal_streams(KEY, [], implementation="triton")


ASKED = [(1, (1, 2, 3)), (5121, (1, 2, 4)), (3_000_000, (1, 2, 5))]


@pytest.mark.gpu
def test_on_a_gpu():
    plain, kernel = (prng.normal_streams(KEY, ASKED, implementation=i) for i in ("xla", "triton"))
    for x, y in zip(plain, kernel, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-6)


@pytest.mark.aot
@pytest.mark.parametrize("card", ["a100", "h100", "rtx4090"])
def test_compiles_to_a_kernel_each_without_spills(offline, card, monkeypatch):
    monkeypatch.setattr("pallas_kernels.prng.streams.wrong_device", lambda name: None)
    key = jax.ShapeDtypeStruct((8,), jnp.uint32)
    run = lambda key: prng.normal_streams(prng.derive_path(key, [(1, 5), (18, 0)]), ASKED)  # noqa: E731
    text = offline.compile_for(card, run, key, allow_spills=False).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 2
    assert " while(" not in text
