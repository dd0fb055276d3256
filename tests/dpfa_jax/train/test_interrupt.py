"""Real processes, killed for real at random moments."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from small_runs import small, to_toml

from dpfa_jax.ledger import Ledger
from dpfa_jax.train.config import parse_config

# A shell that starts the tests in the background has its children ignore Ctrl-C.
PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from dpfa_jax.cli import main
sys.exit(main())
"""
TABLE = small(training__steps=100, training__checkpoint_every=1)


def _start(path, run_dir):
    command = [sys.executable, "-c", PROGRAM, "train", str(path), "--run-dir", str(run_dir)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )


def _charged(run_dir, fingerprint):
    path = run_dir / "ledger.sqlite"
    if not path.exists():
        return []
    try:
        return Ledger(path).charges(f"run {fingerprint}")
    except ValueError:
        return []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_at_random_moments_it_ends_with_the_same_accounting(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(to_toml(TABLE))
    run_dir = tmp_path / "run"
    fingerprint = parse_config(TABLE).fingerprint
    choose = random.Random(20260)
    charges = []
    for attempt in range(3):
        process = _start(path, run_dir)
        # Once training steps, wait for a random moment: in a step, a charge, a commit.
        for line in process.stdout:
            if line.startswith("private: step"):
                break
        time.sleep(choose.uniform(0.0, 0.4))
        process.send_signal(signal.SIGINT if attempt == 1 else signal.SIGKILL)
        output = process.stdout.read()
        code = process.wait()
        assert code in (-signal.SIGKILL, 130), f"start {attempt} ended with {code}: {output}"
        now = _charged(run_dir, fingerprint)
        assert [c.label for c in now[: len(charges)]] == [c.label for c in charges]
        charges = now
    process = _start(path, run_dir)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    report = json.loads((run_dir / "report.json").read_text())
    assert report["steps"] == report["steps_charged"] == 100
    final = _charged(run_dir, fingerprint)
    assert [c.label for c in final] == [f"steps {i} to {i}" for i in range(100)]
    assert report["starts"] == 4
    starts = json.loads((run_dir / "starts.json").read_text())
    assert len({s["key_fingerprint"] for s in starts}) == 4
    assert report["epsilon"] <= 8.0
