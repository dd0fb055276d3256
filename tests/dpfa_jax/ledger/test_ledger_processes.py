"""The budget on disk when processes race for it, and when one is killed."""

import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import dp_accounting
import pytest

import dpfa_jax
from dpfa_jax import Accountant, Ledger
from dpfa_jax.ledger import BudgetExceededError

DELTA = 1e-5


def between(z, fits):
    """A budget that ``fits`` releases keep and one more passes."""
    low, high = (
        Accountant("add_remove").compose(dp_accounting.GaussianDpEvent(z), n).epsilon(DELTA)
        for n in (fits, fits + 1)
    )
    return (low + high) / 2


WATCH = """
import os, threading, time
def end_with_the_test(parent):
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(3)
threading.Thread(target=end_with_the_test, args=(os.getppid(),), daemon=True).start()
"""


def spawn(script, *args):
    """A Python process of its own that imports the same package, outside the repository."""
    root = str(Path(dpfa_jax.__file__).parents[1])
    return subprocess.Popen(
        [sys.executable, "-c", WATCH + textwrap.dedent(script), *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root, "JAX_PLATFORMS": "cpu"},
    )


RACE = """
    import pathlib, sys, time
    import dp_accounting
    from dpfa_jax.ledger import BudgetExceededError, Ledger
    path, epsilon, z, name = sys.argv[1], float(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
    event = dp_accounting.GaussianDpEvent(z)
    pathlib.Path(f"{path}.ready{name}").touch()
    while not pathlib.Path(f"{path}.go").exists():
        time.sleep(0.002)
    # Also the file and the budget are made by whoever comes first.
    ledger = Ledger(path)
    ledger.open_budget("s", epsilon=epsilon, delta=1e-5, adjacency="add_remove", unit="u")
    print("shared", ledger.charge("s", "shared", event), flush=True)
    step = 0
    while True:
        try:
            print("own", ledger.charge("s", f"{name} {step}", event), flush=True)
        except BudgetExceededError:
            break
        step += 1
"""


@pytest.mark.slow
def test_four_racing_processes_take_exactly_what_fits(tmp_path):
    z, fits = 100.0, 23  # much noise is quick to account for
    path = tmp_path / "l.sqlite"
    processes = [spawn(RACE, path, between(z, fits), z, i) for i in range(4)]
    deadline = time.monotonic() + 120
    while not all(Path(f"{path}.ready{i}").exists() for i in range(4)):
        assert time.monotonic() < deadline
        assert all(p.poll() is None for p in processes), [p.communicate() for p in processes]
        time.sleep(0.01)
    Path(f"{path}.go").touch()
    outputs = [p.communicate(timeout=120) for p in processes]
    assert [p.returncode for p in processes] == [0] * 4, outputs
    lines = [line for out, _ in outputs for line in out.splitlines()]
    assert lines.count("shared True") == 1  # one label, four processes, one charge
    assert lines.count("shared False") == 3
    assert lines.count("own True") == fits - 1
    ledger = Ledger(path)
    labels = [c.label for c in ledger.charges("s")]
    assert len(set(labels)) == len(labels) == fits
    assert ledger.spent("s") < between(z, fits)


def test_racing_threads_take_exactly_what_fits(tmp_path):
    z, fits = 100.0, 12
    path = tmp_path / "l.sqlite"
    budget = between(z, fits)
    taken, failures = [], []
    barrier = threading.Barrier(6)
    shared = Ledger(path)

    def work(name):
        try:
            barrier.wait()
            ledger = shared if name % 2 else Ledger(path)
            ledger.open_budget("s", epsilon=budget, delta=DELTA, adjacency="add_remove", unit="u")
            for step in range(fits + 1):
                ledger.charge("s", f"{name} {step}", dp_accounting.GaussianDpEvent(z))
                taken.append((name, step))
        except BudgetExceededError:
            pass
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    assert len(taken) == fits
    assert {c.label for c in shared.charges("s")} == {f"{n} {s}" for n, s in taken}


LOOP = """
    import sys
    import dp_accounting
    from dpfa_jax.ledger import Ledger
    ledger = Ledger(sys.argv[1])
    ledger.open_budget("s", epsilon=5.0, delta=1e-5, adjacency="add_remove", unit="u")
    acknowledged = open(sys.argv[2], "a")
    step = 0
    while True:
        assert ledger.charge("s", f"step {step}", dp_accounting.GaussianDpEvent(300.0))
        print(step, file=acknowledged, flush=True)  # from here on it may be released
        step += 1
"""


@pytest.mark.slow
def test_kill_minus_nine_forgets_no_acknowledged_charge(tmp_path):
    """Four processes, each killed at a random moment of its loop, on ledgers of their own."""
    rng = random.Random(0)
    ledgers = [tmp_path / f"{i}.sqlite" for i in range(4)]
    acks = [tmp_path / f"{i}.txt" for i in range(4)]
    processes = [spawn(LOOP, *paths) for paths in zip(ledgers, acks, strict=True)]
    event = dp_accounting.GaussianDpEvent(300.0)
    for path, ack, process in zip(ledgers, acks, processes, strict=True):
        few = 1 + rng.randrange(30)
        while not (ack.exists() and ack.read_text().count("\n") >= few):
            assert process.poll() is None, process.communicate()
            time.sleep(0.001)
        time.sleep(rng.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
        acknowledged = ack.read_text().count("\n")  # whole lines only
        ledger = Ledger(path)
        labels = [c.label for c in ledger.charges("s")]
        # At most one more is on disk and was not yet acknowledged.
        assert acknowledged <= len(labels) <= acknowledged + 1
        assert labels == [f"step {s}" for s in range(len(labels))]
        exact = Accountant("add_remove").compose(event, len(labels)).epsilon(DELTA)
        assert ledger.spent("s") == pytest.approx(exact, rel=1e-6)
        # It can be charged again at once: no lock is left behind.
        started = time.monotonic()
        assert not ledger.charge("s", "step 0", event)
        assert ledger.charge("s", "after", event)
        assert time.monotonic() - started < 10
