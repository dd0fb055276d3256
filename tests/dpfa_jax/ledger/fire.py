"""What the tests under fire do in a process of their own: ``python fire.py ACTION ARGUMENTS``.

One process imports the library once and forks; a fork costs milliseconds, an import seconds.
"""

import json
import os
import random
import resource
import signal
import sqlite3
import sys
import threading
import time
import traceback

import dp_accounting

from dpfa_jax import Accountant
from dpfa_jax.ledger import BudgetExceededError, Ledger, LedgerError

EVENT = dp_accounting.GaussianDpEvent(400.0)


def end_with_the_test(parent):
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(3)


def forked(work):
    """Runs ``work(write)`` in a fork; returns its process and the end of a pipe to read."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    try:
        os.close(reading)
        work(lambda text: os.write(writing, f"{text}\n".encode()))
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def lines(reading):
    with os.fdopen(reading) as file:
        return [line for line in file.read().split("\n")[:-1] if line]


def kill(where, times):
    """Charges and releases in a loop, killed at random moments; what was acknowledged."""
    rng = random.Random(1)
    ledger = Ledger(where)
    ledger.open_budget("s", epsilon=5.0, delta=1e-5, adjacency="add_remove", unit="u")
    acknowledged, ended = [], 0
    started = time.monotonic()
    for i in range(10):
        ledger.charge("s", f"before.{i}", EVENT)
        acknowledged.append(f"charge before.{i}")
    # A kill comes somewhere in the first four charges, however fast the disk is.
    shortest = longest = 0.01 + 4 * (time.monotonic() - started) / 10

    for life in range(int(times)):

        def loop(write, life=life):
            step = 0
            while True:
                label = f"{life}.{step}"
                assert ledger.charge("s", label, EVENT)
                write(f"charge {label}")  # From here on it may be released.
                ledger.mark_released("s", label)
                write(f"release {label}")
                step += 1

        child, reading = forked(loop)
        time.sleep(rng.random() * longest)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        ended += status == signal.SIGKILL
        said = lines(reading)
        acknowledged += said
        # Other work on the machine may come and go: longer lives where most are in vain.
        longest = min(1.0, max(shortest, longest * (0.95 if said else 1.1)))
        ledger.head()  # Reads on, checking the chain; so the next life starts with it.
    return {"acknowledged": acknowledged, "killed": ended}


def race(where, rounds, runners):
    """Who gets the last unit of a budget, in each round."""
    winners = []
    ledger = Ledger(where)
    event = dp_accounting.GaussianDpEvent(100.0)  # Quick to account for.
    four, five = (Accountant("add_remove").compose(event, n).epsilon(1e-5) for n in (4, 5))
    between_4_and_5 = (four + five) / 2
    # Refused once here: the forks inherit what a refusal loads to say so.
    ledger.open_budget("warm", epsilon=1e-3, delta=1e-5, adjacency="add_remove", unit="u")
    try:
        ledger.charge("warm", "too much", event)
        raise AssertionError("it does not fit")
    except BudgetExceededError as refused:
        str(refused)
    for number in range(int(rounds)):
        scope = f"round {number}"
        ledger.open_budget(
            scope, epsilon=between_4_and_5, delta=1e-5, adjacency="add_remove", unit="u"
        )
        for i in range(3):
            ledger.charge(scope, str(i), event)
        start = time.time() + 0.05

        def run(write, name, scope=scope, start=start):
            mine = Ledger(where) if name % 2 else ledger
            time.sleep(max(0.0, start - time.time()))
            try:
                mine.charge(scope, f"runner {name}", event)
            except BudgetExceededError:
                write("lost")
            else:
                write("won")

        started = [
            forked(lambda write, name=name: run(write, name)) for name in range(int(runners))
        ]
        said = [line for _, reading in started for line in lines(reading)]
        codes = [os.waitpid(child, 0)[1] for child, _ in started]
        winners.append([said.count("won"), said.count("lost"), codes.count(0)])
    return winners


def full_disk(where):
    """Charges until the disk takes no more, and what can be said then."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    ledger = Ledger(where)
    ledger.open_budget("s", epsilon=5.0, delta=1e-5, adjacency="add_remove", unit="u")
    # Held open, so that the log is not emptied after each charge and grows.
    reader = sqlite3.connect(where)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM ledger_entries").fetchone()
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, unlimited[1]))
    charged, error = [], None
    while error is None and len(charged) < 1000:
        try:
            ledger.charge("s", str(len(charged)), EVENT)
        except LedgerError as refused:
            error = [type(refused).__name__, str(refused)]
        else:
            charged.append(str(len(charged)))
    again = None
    try:
        ledger.charge("s", "again", EVENT)
    except LedgerError as refused:
        again = type(refused).__name__
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    reader.close()
    after = ledger.charge("s", "after", EVENT)
    found = [c.label for c in Ledger(where).charges("s")]
    return {"charged": charged, "error": error, "again": again, "after": after, "found": found}


def read_only(where):
    """As somebody who may read the file and not write it."""
    if os.geteuid() == 0:
        os.setgid(65534)
        os.setuid(65534)
    try:
        ledger = Ledger(where)
        ledger.charge("s", "b", EVENT)
    except LedgerError as refused:
        return [type(refused).__name__, str(refused)]
    return None


def hold_lock(where):
    """Takes the file's lock and keeps it until killed."""
    database = sqlite3.connect(where, isolation_level=None)
    database.execute("BEGIN IMMEDIATE")
    print(json.dumps("locked"), flush=True)
    time.sleep(600)


if __name__ == "__main__":
    threading.Thread(target=end_with_the_test, args=(os.getppid(),), daemon=True).start()
    action = globals()[sys.argv[1]]
    print(json.dumps(action(*sys.argv[2:])), flush=True)
