"""The wheel, built from this tree: what is in it, and that it works where it is installed."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*command, **options):
    result = subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, timeout=240, **options
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built with the build requirements of this environment: nothing is downloaded."""
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT)
    (path,) = out.iterdir()
    return path


@pytest.mark.slow
def test_contents(wheel):
    assert wheel.name.startswith("dpfa_jax-")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert archive.testzip() is None
        names = archive.namelist()
        metadata = archive.read(next(n for n in names if n.endswith(".dist-info/METADATA")))
    tops = {n.split("/")[0] for n in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"dpfa_jax", "pallas_kernels"}
    # Every module of the tree is there, and nothing that is not of the tree.
    for package in ("dpfa_jax", "pallas_kernels"):
        assert f"{package}/py.typed" in names
        packed = {n for n in names if n.startswith(f"{package}/")}
        tree = {
            str(path.relative_to(ROOT))
            for path in (ROOT / package).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        presets = {
            f"dpfa_jax/policy/presets/{p.name}" for p in (ROOT / "configs/policies").iterdir()
        }
        assert packed == (tree | presets if package == "dpfa_jax" else tree)
    unwanted = ("test", "benchmark", "config", "example", "conftest", "__pycache__", ".sqlite")
    named = [n for n in names if any(Path(n).parts[0].startswith(u) for u in unwanted)]
    assert not named
    assert not [n for n in names if "tests" in Path(n).parts or "/test_" in n or ".pyc" in n]
    assert any(n.endswith("/licenses/LICENSE") for n in names)
    text = metadata.decode()
    assert "Requires-Python: >=3.12" in text
    assert "git+" not in text  # dependencies come from the package index


@pytest.mark.slow
def test_installed_into_an_empty_environment(wheel, tmp_path):
    environment = tmp_path / "environment"
    run(sys.executable, "-m", "venv", environment)
    python = environment / "bin" / "python"
    install = ("-m", "pip", "--disable-pip-version-check", "install", "--no-deps", "--no-index")
    run(python, *install, wheel, cwd=tmp_path)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    assert site.is_relative_to(environment)
    # Dependencies are looked up in this environment, behind the new one. Its own .pth files
    # (an editable install of this tree) are not read from there.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    script = """
import importlib.metadata, pathlib, sys
import dpfa_jax, dpfa_jax.train, dpfa_jax.keys, pallas_kernels, pallas_kernels.attention
import jax.numpy as jnp
site = pathlib.Path(sys.argv[1]).resolve()
for module in (dpfa_jax, pallas_kernels, dpfa_jax.train, pallas_kernels.attention):
    assert pathlib.Path(module.__file__).resolve().is_relative_to(site), module.__file__
for package in (dpfa_jax, pallas_kernels):
    assert (pathlib.Path(package.__file__).parent / "py.typed").is_file()
assert pathlib.Path(sys.prefix).resolve() in site.parents
version = importlib.metadata.version("dpfa_jax")
# One release, to be sure that more than the import works.
tx = dpfa_jax.dp_aggregate(1.0, 1.0, 2.0, dpfa_jax.SecureKey.generate())
mean, _ = tx.update(jnp.ones((2, 3)), tx.init(jnp.zeros(3)))
assert mean.shape == (3,)
print("works", version)
"""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    out = run(python, "-c", script, site, cwd=tmp_path, env=clean | {"JAX_PLATFORMS": "cpu"})
    assert out.splitlines()[-1].startswith("works 0.")
