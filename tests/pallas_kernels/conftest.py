"""As fixtures: the oracles, written from the mathematics in float64, and absent devices."""

import importlib.util
from pathlib import Path

import jax
import pytest


def _load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session", params=["xla", "reference"])
def implementation(request):
    """The implementations that run on any machine, one after the other."""
    return request.param


@pytest.fixture(scope="session")
def plain():
    return _load(Path(__file__).parent / "plain_chacha.py")


@pytest.fixture(scope="session")
def oracle():
    return _load(Path(__file__).parent / "attention" / "oracle.py")


@pytest.fixture(scope="session")
def offline():
    return _load(Path(__file__).parent / "offline.py")


@pytest.fixture
def no_cache():
    """A program for a chip that is not there can be put into JAX's cache, but not read."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", before)


@pytest.fixture
def ptxas(offline, monkeypatch, capfd):
    """Compiles a Hopper kernel for an H100 and returns what ptxas reports of it."""

    def compile_and_read(fn, *operands):
        monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
        capfd.readouterr()
        offline.compile_for("h100", fn, *operands)
        return offline.read_report("".join(capfd.readouterr()))

    return compile_and_read
