"""The oracles, as fixtures: modules that are written from the mathematics, in float64."""

import importlib.util
from pathlib import Path

import pytest


def _load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def plain():
    return _load(Path(__file__).parent / "plain_chacha.py")


@pytest.fixture(scope="session")
def oracle():
    return _load(Path(__file__).parent / "attention" / "oracle.py")
