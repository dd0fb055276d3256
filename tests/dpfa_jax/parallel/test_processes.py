"""Real processes train together, four and then two; one is killed each time; one continues."""

import json
import os
import re
import signal
import socket
import subprocess
import sys

import jax
import pytest
from small_runs import small, to_toml

from dpfa_jax.ledger import Ledger
from dpfa_jax.parallel import processes
from dpfa_jax.train import loop
from dpfa_jax.train.config import parse_config

COMMAND = [sys.executable, "-m", "dpfa_jax.cli", "train"]
STEPS = 8
TABLE = small(training__steps=STEPS, training__checkpoint_every=1, privacy__reproducible_seed=5)
LINE = re.compile(r"private: step (\d+)/\d+, validation loss ([\d.]+)")


def free_port():
    with socket.socket() as made:
        made.bind(("localhost", 0))
        return made.getsockname()[1]


def options(mesh, count, port, number):
    text = f"--mesh {mesh} --coordinator localhost:{port}"
    return f"{text} --processes {count} --process-id {number}".split()


def start(path, run_dir, mesh="data=2", count=2):
    port = free_port()
    env = {**os.environ, "PYTHONUNBUFFERED": "1", "JAX_PLATFORMS": "cpu"}
    return [
        subprocess.Popen(
            [*COMMAND, str(path), "--run-dir", str(run_dir), *options(mesh, count, port, i)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=env,
        )
        for i in range(count)
    ]


def kill_after(group, victim, lines):
    """Kills one process when the first has shown so many checkpoints; what both then said."""
    shown, said = {}, ""
    for line in group[0].stdout:
        said += line
        if match := LINE.match(line):
            shown[int(match[1])] = float(match[2])
            if len(shown) == lines:
                break
    assert len(shown) == lines, said + group[1].stdout.read()
    group[victim].send_signal(signal.SIGKILL)
    texts = [process.communicate(timeout=120)[0] for process in group]
    return shown, texts, [process.returncode for process in group]


def state_of(run_dir, fingerprint):
    charges = Ledger(run_dir / "ledger.sqlite").charges(f"run {fingerprint}")
    kept = sorted(int(p.name) for p in (run_dir / "checkpoints").iterdir() if p.name.isdecimal())
    return charges, kept[-1]


@pytest.fixture
def _as_in_a_process():
    # The optimiser library's schedules mix Python and array numbers.
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("_as_in_a_process")
def test_four_processes_then_two_then_one_train_as_one_and_survive_being_killed(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(to_toml(TABLE))
    run_dir, config = tmp_path / "run", parse_config(TABLE)

    # Four split the batch in two, and the last dimension of each matrix in two.
    four = start(path, run_dir, "data=2,model=2", 4)
    shown, texts, codes = kill_after(four, victim=1, lines=3)
    assert codes[:2] == [3, -signal.SIGKILL], texts
    assert all(codes), texts
    assert not any(LINE.search(text) for text in texts[1:])  # one of them speaks
    assert "dpfa: process 0: another process stopped or cannot be reached" in texts[0]
    assert "Nothing was released after the last checkpoint" in texts[0]
    charges, last = state_of(run_dir, config.fingerprint)
    # Nothing was released without its charge, and at most the block under way was not released.
    assert [c.released for c in charges[:last]] == [True] * last
    assert last <= len(charges) <= last + 1

    more, texts, codes = kill_after(start(path, run_dir), victim=0, lines=2)
    assert min(more) == last + 1
    assert codes[0] == -signal.SIGKILL, texts
    # Whichever sees it first ends it: the collective that fails, or JAX's coordination service.
    assert codes[1] != 0, texts
    assert not LINE.search(texts[1])  # the other never shows a thing
    before = charges
    charges, last = state_of(run_dir, config.fingerprint)
    assert [c.label for c in charges[: len(before)]] == [c.label for c in before]

    report = loop.run(config, run_dir)  # one process, one device
    assert report["steps"] == report["steps_charged"] == STEPS
    charges, _ = state_of(run_dir, config.fingerprint)
    assert [c.label for c in charges] == [f"steps {i} to {i}" for i in range(STEPS)]
    assert all(c.released for c in charges)
    assert report["starts"] == 3

    # The first start's noise and batches, in one process: the same losses, to what is printed.
    alone = loop.run(config, tmp_path / "alone")
    losses = {h["step"]: h["validation_loss"] for h in alone["history"]}
    assert all(abs(losses[step] - loss) < 2e-3 for step, loss in shown.items())
    kept = json.loads((run_dir / "report.json").read_text())["history"]
    assert all(abs(losses[h["step"]] - h["validation_loss"]) < 1e-4 for h in kept[: len(shown)])


_KEYS = """
import json, sys
import jax, numpy as np
from dpfa_jax import keys
from dpfa_jax.parallel import processes

processes.start("localhost:" + sys.argv[1], 2, int(sys.argv[2]))
def words(key):
    return np.asarray(jax.random.key_data(key)).tolist()
drawn = keys.SecureKey.generate()
own = drawn.fingerprint
found = {"key": words(drawn.key()), "again": words(drawn.key()), "fingerprint": drawn.fingerprint}
found["taken"] = words(keys.take_key(keys.SecureKey.generate()))
keys._of_first_process = lambda words: words
print(json.dumps([found, own, words(keys.SecureKey.generate().key())]))
"""


def test_every_process_has_the_key_of_the_first():
    """Each draws its own: without the exchange, the planted bug, they would make two noises."""
    port = str(free_port())
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    group = [
        subprocess.Popen(
            [sys.executable, "-c", _KEYS, port, str(i)], stdout=subprocess.PIPE, text=True, env=env
        )
        for i in range(2)
    ]
    first, second = (json.loads(p.communicate(timeout=120)[0].splitlines()[-1]) for p in group)
    assert first[0] == second[0]
    assert first[0]["key"] == first[0]["again"] != first[0]["taken"]
    assert first[0]["fingerprint"] == first[1] != second[1]
    assert first[2] != second[2]


def test_what_starts_processes_is_checked():
    with pytest.raises(ValueError, match="allowed are all three, or none"):
        processes.start("localhost:1", None, 0)
    with pytest.raises(ValueError, match="process_id=2: allowed is a whole number from 0 to 1"):
        processes.start("localhost:1", 2, 2)


def test_an_error_of_the_first_process_stays_its_own():
    def fail():
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        processes.on_first(fail)
    assert processes.agreed({"a": [1, None]}) == {"a": [1, None]}
