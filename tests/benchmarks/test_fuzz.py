"""Bad input at scale: the targets of ``python -m benchmarks.fuzz``, driven by hypothesis."""

import importlib.util
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpfa_jax.ledger import Ledger, LedgerUnavailableError
from dpfa_jax.train.config import load_config
from dpfa_jax.train.schema import ConfigError

_FILE = Path(__file__).parents[2] / "benchmarks" / "fuzz.py"
_SPEC = importlib.util.spec_from_file_location("fuzz", _FILE)
fuzz = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(fuzz)

# Longer inputs make more edits; most of what was found took few.
_INPUT = st.binary(min_size=1, max_size=64)
_EXAMPLES = {"config": 400, "ledger": 60, "checkpoint": 12}


@pytest.mark.parametrize("target", list(_EXAMPLES))
def test_no_input_does_anything_but_work_or_fail_clearly(target, tmp_path):
    run = fuzz.TARGETS[target](tmp_path)

    @settings(
        max_examples=_EXAMPLES[target],
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(_INPUT)
    def attack(data):
        run(data)

    attack()


def test_command_lines_in_a_process_of_their_own(tmp_path):
    """It replaces what takes long, so not in this process; seconds, and it counts."""
    out = tmp_path / "counts.json"
    arguments = ["--target", "cli", "--seconds", "3", "--random", "--seed", "1"]
    assert fuzz.main([*arguments, "--json", str(out)]) == 0
    facts = json.loads(out.read_text())
    assert facts["findings"] == 0
    assert facts["targets"]["cli"]["executions"] > 50


def test_a_finding_is_found(tmp_path, monkeypatch):
    """With each target, what it must not let pass."""
    run = fuzz.config_target(tmp_path)
    monkeypatch.setattr("dpfa_jax.train.config.load_config", lambda path: {})
    run = fuzz.config_target(tmp_path)
    with pytest.raises((fuzz.Finding, AttributeError)):
        run(b"\x01")
    run = fuzz.ledger_target(tmp_path)
    monkeypatch.setattr(Ledger, "spent", lambda self, scope: 0.0)
    with pytest.raises(fuzz.Finding, match=r"spent 0\.0"):
        run(b"\x03")


# --- what fuzzing found -------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 99, 511])
def test_a_ledger_cut_off_within_its_header_does_not_begin_anew(size, tmp_path):
    path = tmp_path / "ledger.sqlite"
    Ledger(path).close()
    path.write_bytes(path.read_bytes()[:size])
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    with pytest.raises(LedgerUnavailableError, match="damaged, or no ledger"):
        Ledger(path)


def test_a_schema_that_is_no_text(tmp_path):
    path = tmp_path / "ledger.sqlite"
    Ledger(path).close()
    whole = path.read_bytes()
    at = whole.index(b"CREATE TRIGGER ") + 8
    path.write_bytes(whole[:at] + b"\x98" + whole[at + 1 :])
    with pytest.raises(LedgerUnavailableError, match="damaged, or no ledger"):
        Ledger(path)


@pytest.mark.parametrize("key", ["steps", "learning_rate"])
def test_numbers_with_no_float(key, tmp_path):
    path = tmp_path / "config.toml"
    text = (_FILE.parents[1] / "configs" / "chat_user_level.toml").read_text()
    lines = [
        f"{key} = {'9' * 400}" if line.startswith(f"{key} = ") else line
        for line in text.splitlines()
    ]
    path.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=rf"training\.{key} = 9+: allowed is"):
        load_config(path)
