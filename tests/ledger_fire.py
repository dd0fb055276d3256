"""Starts ``dpfa_jax/ledger/fire.py`` for the ledger's tests, and judges what it left."""

import collections
import os
import subprocess
import sys
import time
from pathlib import Path

import dp_accounting
import pytest

import dpfa_jax
from dpfa_jax import Accountant, Ledger

EVENT = dp_accounting.GaussianDpEvent(400.0)
SCRIPT = Path(__file__).with_name("dpfa_jax") / "ledger" / "fire.py"


def fire(*args):
    """A process of its own that imports the same package."""
    root = str(Path(dpfa_jax.__file__).parents[1])
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root, "JAX_PLATFORMS": "cpu"},
    )


def check_after_kills(where, said):
    """Nothing acknowledged is lost, nothing is there twice, and the chain holds."""
    ledger = Ledger(where)
    ledger.verify()
    entries = [e for e in ledger.entries() if e.kind in ("charge", "release")]
    there = collections.Counter(f"{e.kind} {e.label}" for e in entries)
    assert set(there.values()) == {1}
    assert set(said["acknowledged"]) <= set(there)
    # What was written and not yet acknowledged: at most one entry a life.
    extra = collections.Counter(
        name.split()[1].split(".")[0] for name in set(there) - set(said["acknowledged"])
    )
    assert all(count == 1 for count in extra.values())
    charges = sum(e.kind == "charge" for e in entries)
    exact = Accountant("add_remove").compose(EVENT, charges).epsilon(1e-5)
    assert ledger.spent("s") == pytest.approx(exact, rel=1e-6)
    # It can be charged again at once: no lock is left behind.
    started = time.monotonic()
    assert ledger.charge("s", "after", EVENT)
    assert time.monotonic() - started < 5
    return charges
