"""Every test runs with strict dtype promotion, on CPU unless it is marked gpu."""

import gc
import importlib.util
import os
import shutil
from pathlib import Path

# Compiled programs are shared between the tests, their workers and the processes that
# they start; most of the suite's time would go into compiling the same again.
_CACHE = Path(__file__).parents[1] / ".cache" / "tests-jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# A CPU program is compiled once here and run a few times, so that LLVM's optimiser costs more
# than it saves. With another back end's plug-in it stays on: it would change what is compiled
# there.
_FLAGS = os.environ.get("XLA_FLAGS", "")
if "xla_backend_optimization_level" not in _FLAGS and not importlib.util.find_spec("jax_plugins"):
    os.environ["XLA_FLAGS"] = f"{_FLAGS} --xla_backend_optimization_level=0".strip()

import jax  # noqa: E402
import pytest  # noqa: E402


@pytest.fixture(autouse=True)
def _strict_dtypes():
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(autouse=True, scope="module")
def _few_maps():
    """A process may have 65,530 memory maps, and each compiled program takes some.

    Where they run out XLA dies of a segmentation fault; what is dropped here is compiled again,
    or read from the cache.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 25_000:
        jax.clear_caches()
        gc.collect()


def pytest_collection_finish():
    # What the libraries made when they were imported stays; no collection needs to look at it.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)


def pytest_collection_modifyitems(config, items):
    """Deselects (and counts) tests for what is not here; puts the slow ones first.

    GPU tests where there is no GPU: they run on a device run. Tests of PostgreSQL where its
    server is not installed; CI installs it. Tests that compile for other machines unless ``-m``
    asks for them: they need compilers that the suite does without.
    """
    absent = set()
    if not (shutil.which("initdb") or list(Path("/usr/lib/postgresql").glob("*/bin/initdb"))):
        absent.add("postgres")
    if "aot" not in config.getoption("markexpr"):
        absent.add("aot")
    if not any(d.platform == "gpu" for d in jax.devices()):
        absent.add("gpu")
    out = [item for item in items if any(item.get_closest_marker(mark) for mark in absent)]
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in set(out)]
    # What takes longest comes first: a worker that is done takes over what is last.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
