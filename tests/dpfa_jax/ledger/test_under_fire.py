"""The SQLite ledger under kill -9, races, full disks, dead locks, damage and wrong clocks."""

import contextlib
import gc
import json
import random
import shutil
import sqlite3
import tempfile
from pathlib import Path

import dp_accounting
import pytest
from ledger_fire import check_after_kills, fire

from dpfa_jax import Ledger
from dpfa_jax.ledger import LedgerDamagedError, LedgerError, LedgerUnavailableError

Gaussian = dp_accounting.GaussianDpEvent
DELTA = 1e-5


@pytest.mark.slow
def test_kill_minus_nine_500_times(tmp_path, under_fire):
    said = under_fire("kill", tmp_path / "l.sqlite", 500)
    assert said["killed"] == 500
    assert check_after_kills(tmp_path / "l.sqlite", said) > 100


@pytest.mark.slow
def test_eight_racing_for_the_last_unit(tmp_path, under_fire):
    for won, lost, ended in under_fire("race", tmp_path / "l.sqlite", 15, 8):
        assert (won, lost, ended) == (1, 7, 8)
    Ledger(tmp_path / "l.sqlite").verify()


def test_a_full_disk(tmp_path, under_fire):
    said = under_fire("full_disk", tmp_path / "l.sqlite")
    assert 3 < len(said["charged"]) < 1000
    kind, text = said["error"]
    assert kind == said["again"] == "LedgerUnavailableError"
    assert "Nothing was charged, so nothing may be released" in text
    # Room again: it goes on, and exactly what was acknowledged is there.
    assert said["after"] is True
    assert said["found"] == [*said["charged"], "after"]
    Ledger(tmp_path / "l.sqlite").verify()


def test_a_file_that_may_only_be_read(under_fire):
    folder = Path(tempfile.mkdtemp())  # pytest's own folders are closed to other users
    try:
        path = folder / "l.sqlite"
        ledger = Ledger(path)
        ledger.open_budget("s", epsilon=5.0, delta=DELTA, adjacency="add_remove", unit="u")
        ledger.charge("s", "a", Gaussian(400.0))
        path.chmod(0o444)
        folder.chmod(0o555)
        kind, text = under_fire("read_only", path)
        assert kind == "LedgerUnavailableError"
        assert "readonly" in text or "unable to open" in text
        folder.chmod(0o755)
        path.chmod(0o644)
        assert [c.label for c in Ledger(path).charges("s")] == ["a"]
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)


def test_a_lock_held_and_the_holder_dead(tmp_path):
    path = tmp_path / "l.sqlite"
    ledger = Ledger(path, timeout=0.2)
    ledger.open_budget("s", epsilon=5.0, delta=DELTA, adjacency="add_remove", unit="u")
    holder = fire("hold_lock", path)
    assert json.loads(holder.stdout.readline()) == "locked"
    with pytest.raises(LedgerUnavailableError, match=r"held the lock for more than 0\.2 s"):
        ledger.charge("s", "a", Gaussian(400.0))
    assert ledger.spent("s") == 0.0  # Reading needs no lock.
    holder.kill()
    holder.communicate()
    assert ledger.charge("s", "a", Gaussian(400.0)) is True
    assert [c.label for c in ledger.charges("s")] == ["a"]


def test_a_clock_that_goes_back(tmp_path):
    now = [1_700_000_000.0]
    ledger = Ledger(tmp_path / "l.sqlite", clock=lambda: now[0])
    ledger.open_budget("s", epsilon=5.0, delta=DELTA, adjacency="add_remove", unit="u")
    assert ledger.charge("s", "a", Gaussian(400.0))
    now[0] -= 3.0  # Hosts differ by this much; the record's times still never fall.
    assert ledger.charge("s", "b", Gaussian(400.0))
    times = [c.time for c in ledger.charges("s")]
    assert times == sorted(times)
    now[0] -= 3600.0
    before = ledger.head()
    with pytest.raises(LedgerUnavailableError, match=r"the clock says Nov 14, 2023.*9:13"):
        ledger.charge("s", "c", Gaussian(400.0))
    assert ledger.head() == before
    now[0] += 3600.0
    assert ledger.charge("s", "c", Gaussian(400.0))


# --- damage ----------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path):
    """A ledger of some pages, all in the main file."""
    path = tmp_path / "l.sqlite"
    ledger = Ledger(path)
    ledger.open_budget("s", epsilon=5.0, delta=DELTA, adjacency="add_remove", unit="u")
    for i in range(40):
        ledger.charge("s", f"step {i}", Gaussian(100.0 + i))
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return path, ledger.spent("s")


def test_no_corrupted_page_is_ever_believed(written):
    """Every page in turn, with noise in it: an error, or the right answer. Seeded."""
    path, spent = written
    good = path.read_bytes()
    rng = random.Random(3)
    refused = 0
    for page in range(len(good) // 4096):
        data = bytearray(good)
        for _ in range(60):
            data[page * 4096 + rng.randrange(4096)] = rng.randrange(256)
        path.write_bytes(data)
        try:
            ledger = Ledger(path)
            assert ledger.spent("s") == spent
            ledger.charge("s", "next", Gaussian(400.0))
            assert ledger.spent("s") > spent
        except (LedgerUnavailableError, LedgerDamagedError):
            refused += 1
        finally:
            ledger = None
        gc.collect()
        for suffix in ("-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
    assert refused >= len(good) // 4096 // 2


TAMPER = {
    "a number in an event": "UPDATE ledger_entries SET body = replace(body, '105.0', '905.0')",
    "a time": "UPDATE ledger_entries SET time = time + 1 WHERE number = 9",
    "a label": "UPDATE ledger_entries SET label = 'other' WHERE number = 9",
    "a scope": "UPDATE ledger_entries SET scope = 't' WHERE number = 9",
    "a budget": "UPDATE ledger_entries SET body = replace(body, '5.0', '50.0') WHERE number = 1",
    "a hash": "UPDATE ledger_entries SET hash = previous WHERE number = 9",
    "one removed": "DELETE FROM ledger_entries WHERE number = 9",
    "the first removed": "DELETE FROM ledger_entries WHERE number = 0",
    "the last removed": "DELETE FROM ledger_entries WHERE number = 41",
    "all removed": "DELETE FROM ledger_entries",
    "two exchanged": "UPDATE ledger_entries SET number = CASE number WHEN 9 THEN -1 ELSE 9 END "
    "WHERE number IN (9, 10); UPDATE ledger_entries SET number = 10 WHERE number = -1",
    "one repeated": "INSERT INTO ledger_entries SELECT 42, time, kind, scope, 'x', body, previous, "
    "hash FROM ledger_entries WHERE number = 41",
    "the head": "UPDATE ledger_head SET number = 40",
    "the head removed": "DELETE FROM ledger_head",
}


@pytest.mark.parametrize("how", TAMPER)
def test_what_was_changed_is_found(written, how):
    path, _ = written
    seen = Ledger(path)  # has read everything before
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.executescript(
            "DROP TRIGGER ledger_no_update; DROP TRIGGER ledger_no_delete;" + TAMPER[how]
        )
    for act in (
        seen.verify,
        lambda: Ledger(path).verify(),
        lambda: Ledger(path).charge("s", "next", Gaussian(400.0)),
        lambda: Ledger(path).spent("s"),
    ):
        with pytest.raises(LedgerDamagedError, match="Nothing was charged"):
            act()


def test_entries_cannot_be_changed_by_accident(written):
    path, _ = written
    with contextlib.closing(sqlite3.connect(path)) as database:
        for statement in ("UPDATE ledger_entries SET time = 0", "DELETE FROM ledger_entries"):
            with pytest.raises(sqlite3.IntegrityError, match="never changed"):
                database.execute(statement)


def test_an_old_copy_is_found_by_who_remembers(tmp_path):
    """By the process that saw more, and by a receipt that was noted elsewhere."""
    path = tmp_path / "l.sqlite"
    ledger = Ledger(path)
    ledger.open_budget("s", epsilon=5.0, delta=DELTA, adjacency="add_remove", unit="u")
    ledger.charge("s", "a", Gaussian(400.0))
    ledger.close()  # Empties the log into the file.
    copy = path.read_bytes()
    ledger.charge("s", "b", Gaussian(400.0))
    receipt = ledger.head()
    ledger.close()
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    path.write_bytes(copy)
    with pytest.raises(LedgerDamagedError, match="old copy"):
        ledger.charge("s", "c", Gaussian(400.0))
    fresh = Ledger(path)
    assert fresh.verify() == fresh.head()  # By itself the copy is whole.
    with pytest.raises(LedgerDamagedError, match="old copy"):
        fresh.verify(receipt)
    # Going on from the copy makes another entry 3: the receipt still tells.
    fresh.charge("s", "c", Gaussian(500.0))
    with pytest.raises(LedgerDamagedError, match="old copy"):
        Ledger(path).verify(receipt)


def test_a_ledger_of_the_first_format_is_refused(tmp_path):
    path = tmp_path / "l.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.executescript("CREATE TABLE budgets (x); CREATE TABLE charges (x);")
    before = path.read_bytes()
    with pytest.raises(LedgerError, match=r"another format \(1\); this version reads format 2"):
        Ledger(path)
    assert path.read_bytes()[100:] == before[100:]


def test_another_programs_database_is_refused(tmp_path):
    path = tmp_path / "l.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE people (name)")
    with pytest.raises(LedgerError, match=r"another format \(people\)"):
        Ledger(path)
