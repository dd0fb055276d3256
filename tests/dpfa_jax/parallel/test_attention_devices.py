"""Attention on eight CPU devices: they need a process of their own, one for all checks."""

import json
import re
from pathlib import Path

import pytest
from once import output_of

SCRIPT = Path(__file__).with_name("attention_devices.py")
CHECKS = re.findall(r"^def (check_\w+)", SCRIPT.read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return json.loads(output_of(SCRIPT, tmp_path_factory).splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_on_eight_devices(check, results):
    assert results[check] is None, results[check]
