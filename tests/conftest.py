"""Every test runs with strict dtype promotion, on CPU unless it is marked gpu."""

import jax
import pytest

jax.config.update("jax_threefry_partitionable", True)


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
