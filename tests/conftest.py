"""Every test runs with strict dtype promotion, on CPU unless it is marked gpu."""

import os
from pathlib import Path

# Compiled programs are shared between the tests, their workers and the processes that
# they start; most of the suite's time would go into compiling the same again.
_CACHE = Path(__file__).parents[1] / ".cache" / "tests-jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax  # noqa: E402
import pytest  # noqa: E402


@pytest.fixture(autouse=True)
def _strict_dtypes():
    with jax.numpy_dtype_promotion("strict"):
        yield


def pytest_collection_modifyitems(config, items):
    """Deselects (and counts) GPU tests where there is no GPU; they run on a device run."""
    if any(d.platform == "gpu" for d in jax.devices()):
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if item not in gpu]
