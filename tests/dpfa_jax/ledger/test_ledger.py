"""The budget on disk, in one process."""

import contextlib
import json
import math
import shutil
import sqlite3

import dp_accounting
import pytest

import dpfa_jax
from dpfa_jax import Accountant, Ledger, PoissonSampler, keys
from dpfa_jax.ledger import (
    AlreadyReleasedError,
    BudgetExceededError,
    LedgerDamagedError,
    LedgerError,
    LedgerUnavailableError,
)

Gaussian = dp_accounting.GaussianDpEvent
Repeated = dp_accounting.SelfComposedDpEvent
ADJACENCIES = ("add_remove", "replace_one")


@pytest.fixture
def ledger(tmp_path):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.open_budget("s", epsilon=4.4, delta=1e-5, adjacency="add_remove", unit="user")
    return ledger


def labels(ledger, scope="s"):
    return [c.label for c in ledger.charges(scope)]


def contents(path):
    with contextlib.closing(sqlite3.connect(path)) as database:
        return list(
            database.execute("SELECT * FROM ledger_entries WHERE kind = 'charge' ORDER BY number")
        )


# --- charging --------------------------------------------------------------------------


def test_a_charge_is_there_for_the_next_process(ledger):
    assert ledger.charge("s", "a", Gaussian(2.0)) is True
    again = Ledger(ledger.path)
    (charge,) = again.charges("s")
    assert charge.label == "a"
    assert charge.event == Gaussian(2.0)
    assert again.spent("s") == ledger.spent("s") > 0


def test_a_label_is_charged_once(ledger):
    assert ledger.charge("s", "a", Gaussian(2.0)) is True
    once = ledger.spent("s")
    assert ledger.charge("s", "a", Gaussian(2.0)) is False
    assert Ledger(ledger.path).charge("s", "a", Gaussian(2.0)) is False
    assert ledger.spent("s") == once
    assert labels(ledger) == ["a"]


def test_a_label_with_another_event_raises(ledger):
    ledger.charge("s", "a", Gaussian(2.0))
    for event in (Gaussian(2.5), Repeated(Gaussian(2.0), 1), dp_accounting.NoOpDpEvent()):
        with pytest.raises(ValueError, match="label='a': was charged with another event"):
            ledger.charge("s", "a", event)
    assert [c.event for c in ledger.charges("s")] == [Gaussian(2.0)]


def test_a_charge_beyond_the_budget_leaves_nothing(ledger):
    ledger.charge("s", "a", Gaussian(1.0))  # 4.377 of 4.4
    before = contents(ledger.path)
    with pytest.raises(BudgetExceededError, match=r"'b' would bring ε to .* budget is ε = 4.4"):
        ledger.charge("s", "b", Gaussian(1.0))
    with pytest.raises(BudgetExceededError):
        ledger.charge("s", "c", dp_accounting.NonPrivateDpEvent())
    assert contents(ledger.path) == before
    assert labels(ledger) == ["a"]
    # The refused label was not used up, and what fits still fits.
    assert ledger.charge("s", "b", Gaussian(100.0)) is True
    assert ledger.charge("s", "a", Gaussian(1.0)) is False


def test_refusals_are_value_errors_and_can_be_told_apart():
    assert issubclass(LedgerError, ValueError)
    for kind in (BudgetExceededError, AlreadyReleasedError):
        assert issubclass(kind, LedgerError)
    assert not issubclass(BudgetExceededError, AlreadyReleasedError)


def test_what_was_released_is_not_released_again_for_the_same_charge(ledger):
    """Before the mark a crash may have come in between, and the label may be retried."""
    ledger.charge("s", "a", Gaussian(3.0))
    assert ledger.charge("s", "a", Gaussian(3.0)) is False
    ledger.mark_released("s", "a")
    before = contents(ledger.path)
    for other in (ledger, Ledger(ledger.path)):
        with pytest.raises(AlreadyReleasedError, match="'a' was charged and released"):
            other.charge("s", "a", Gaussian(3.0))
    assert contents(ledger.path) == before
    assert [c.released for c in ledger.charges("s")] == [True]
    ledger.mark_released("s", "a")  # twice is no error: the mark itself may be retried
    # Marking costs nothing and gives nothing back.
    assert ledger.spent("s") == Accountant("add_remove").compose(Gaussian(3.0)).epsilon(1e-5)
    assert ledger.charge("s", "b", Gaussian(100.0)) is True
    assert [c.released for c in ledger.charges("s")] == [True, False]


def test_a_release_without_a_charge_is_an_error(ledger):
    ledger.open_budget("t", epsilon=1.0, delta=1e-5, adjacency="add_remove", unit="user")
    ledger.charge("s", "a", Gaussian(3.0))
    for scope, label in (("s", "b"), ("t", "a"), ("u", "a")):
        with pytest.raises(LedgerError, match="without a charge"):
            ledger.mark_released(scope, label)
    assert [c.released for c in ledger.charges("s")] == [False]


@pytest.mark.parametrize("adjacency", ADJACENCIES)
def test_the_budget_is_a_ceiling_on_the_composition_not_on_the_sum(tmp_path, adjacency):
    """ε of R releases is far below R times ε of one: exactly as many as fit are taken."""
    z, fits = 8.0, 10
    budget = (
        Accountant(adjacency).compose(Gaussian(z), fits).epsilon(1e-5)
        + Accountant(adjacency).compose(Gaussian(z), fits + 1).epsilon(1e-5)
    ) / 2
    ledger = Ledger(tmp_path / "l.sqlite")
    ledger.open_budget("s", epsilon=budget, delta=1e-5, adjacency=adjacency, unit="record")
    for i in range(fits):
        assert ledger.charge("s", f"step {i}", Gaussian(z))
    with pytest.raises(BudgetExceededError):
        ledger.charge("s", f"step {fits}", Gaussian(z))
    assert len(ledger.charges("s")) == fits


def test_a_budget_that_is_met_exactly_is_kept(tmp_path):
    epsilon = Accountant("add_remove").compose(Gaussian(2.0), 3).epsilon(1e-5)
    ledger = Ledger(tmp_path / "l.sqlite")
    ledger.open_budget("s", epsilon=epsilon, delta=1e-5, adjacency="add_remove", unit="u")
    for i in range(3):
        assert ledger.charge("s", str(i), Gaussian(2.0))
    assert ledger.spent("s") == epsilon
    with pytest.raises(BudgetExceededError):
        ledger.charge("s", "3", Gaussian(1e4))


# --- what was spent --------------------------------------------------------------------


@pytest.mark.parametrize("adjacency", ADJACENCIES)
def test_spent_is_the_accountants_answer(tmp_path, adjacency):
    sampler = PoissonSampler(100, 0.2, 40, keys.SecureKey.generate())
    events = [
        Gaussian(8.0),
        sampler.event(3.0),
        Repeated(Gaussian(20.0), 7),
        dp_accounting.NoOpDpEvent(),
        Gaussian(8.0),
        dp_accounting.ComposedDpEvent(
            [dp_accounting.PoissonSampledDpEvent(0.1, Gaussian(4.0)), Repeated(Gaussian(30.0), 2)]
        ),
        sampler.event(3.0),
    ]
    ledger = Ledger(tmp_path / "l.sqlite")
    ledger.open_budget("s", epsilon=20.0, delta=1e-6, adjacency=adjacency, unit="user")
    assert ledger.spent("s") == 0.0
    accountant = Accountant(adjacency)
    for i, event in enumerate(events):
        ledger.charge("s", str(i), event)
        accountant.compose(event)
    assert ledger.spent("s") == pytest.approx(accountant.epsilon(1e-6), rel=1e-6)
    assert [c.event for c in ledger.charges("s")] == events


def test_scopes_do_not_touch_each_other(ledger):
    ledger.open_budget("t", epsilon=1.0, delta=1e-6, adjacency="replace_one", unit="message")
    ledger.charge("s", "a", Gaussian(2.0))
    assert ledger.spent("t") == 0.0
    assert ledger.charge("t", "a", Gaussian(50.0)) is True  # the label is free there
    assert ledger.spent("t") == pytest.approx(
        Accountant("replace_one").compose(Gaussian(50.0)).epsilon(1e-6)
    )
    assert labels(ledger, "s") == labels(ledger, "t") == ["a"]


def test_text_is_text(ledger):
    """Quotes and SQL in names are names."""
    scope = "x'); DROP TABLE charges; --"
    ledger.open_budget(scope, epsilon=4.0, delta=1e-5, adjacency="add_remove", unit="ü'\"")
    assert ledger.charge(scope, "μ'; --", Gaussian(5.0))
    assert labels(ledger, scope) == ["μ'; --"]
    assert labels(ledger, "s") == []


# --- budgets ---------------------------------------------------------------------------


def test_the_same_budget_again_changes_nothing(ledger):
    ledger.charge("s", "a", Gaussian(2.0))
    Ledger(ledger.path).open_budget(
        "s", epsilon=4.4, delta=1e-5, adjacency="add_remove", unit="user"
    )
    assert labels(ledger) == ["a"]


@pytest.mark.parametrize(
    "change",
    [{"epsilon": 8.0}, {"delta": 1e-4}, {"adjacency": "replace_one"}, {"unit": "message"}],
    ids=lambda c: next(iter(c)),
)
def test_a_budget_does_not_change(ledger, change):
    asked = {"epsilon": 4.4, "delta": 1e-5, "adjacency": "add_remove", "unit": "user"} | change
    with pytest.raises(ValueError, match=r"scope='s': has the budget .*does not change"):
        ledger.open_budget("s", **asked)
    ledger.charge("s", "a", Gaussian(1.0))
    with pytest.raises(BudgetExceededError):
        ledger.charge("s", "b", Gaussian(1.0))


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("epsilon", 0.0),
        ("epsilon", -1.0),
        ("epsilon", math.inf),
        ("epsilon", math.nan),
        ("epsilon", "4"),
        ("delta", 0.0),
        ("delta", 1.0),
        ("delta", math.nan),
        ("adjacency", "zero_out"),
    ],
)
def test_impossible_budgets(ledger, name, bad):
    asked = {"epsilon": 1.0, "delta": 1e-5, "adjacency": "add_remove", "unit": "user"}
    with pytest.raises(ValueError, match=f"{name}="):
        ledger.open_budget("new", **(asked | {name: bad}))
    with pytest.raises(ValueError, match="no budget was opened"):
        ledger.spent("new")


def test_a_scope_without_a_budget(ledger):
    with pytest.raises(ValueError, match="scope='other': no budget was opened"):
        ledger.charge("other", "a", Gaussian(100.0))
    with pytest.raises(ValueError, match="scope='other': no budget was opened"):
        ledger.spent("other")
    assert contents(ledger.path) == []


# --- events that must not pass ---------------------------------------------------------


@pytest.mark.parametrize(
    "event",
    [
        dp_accounting.LaplaceDpEvent(1.0),
        dp_accounting.UnsupportedDpEvent(),
        dp_accounting.ComposedDpEvent([Gaussian(50.0), dp_accounting.LaplaceDpEvent(1.0)]),
        Gaussian(math.nan),
        Gaussian(-50.0),
        dp_accounting.PoissonSampledDpEvent(1.5, Gaussian(50.0)),
        dp_accounting.PoissonSampledDpEvent(-0.5, Gaussian(50.0)),
        dp_accounting.PoissonSampledDpEvent(math.nan, Gaussian(50.0)),
        Repeated(Gaussian(50.0), 0.5),
        None,
        "GaussianDpEvent(50.0)",
    ],
    ids=repr,
)
def test_events_that_cannot_be_accounted_for(ledger, event):
    ledger.charge("s", "a", Gaussian(5.0))
    before = contents(ledger.path)
    with pytest.raises(ValueError):  # noqa: PT011 - several layers refuse, each in its words
        ledger.charge("s", "b", event)
    assert contents(ledger.path) == before


def test_no_event_gives_budget_back(ledger):
    ledger.charge("s", "a", Gaussian(1.0))
    spent = ledger.spent("s")
    for count in (-1, -1000):
        for event in (
            Repeated(Gaussian(1.0), count),
            Repeated(Repeated(Gaussian(1.0), count), 1),
            dp_accounting.ComposedDpEvent([Repeated(Gaussian(1.0), count)]),
        ):
            with pytest.raises(ValueError, match="count="):
                ledger.charge("s", "refund", event)
    assert ledger.spent("s") == spent
    with pytest.raises(BudgetExceededError):
        ledger.charge("s", "b", Gaussian(1.0))


# --- the file --------------------------------------------------------------------------


def test_a_file_that_is_no_ledger(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("not a database, and long enough to have a header of its own\n" * 50)
    before = path.read_bytes()
    with pytest.raises(LedgerUnavailableError, match=r"notes.txt: .*not a database"):
        Ledger(path)
    assert path.read_bytes() == before


def test_a_file_that_is_damaged_later(ledger):
    for i in range(20):
        ledger.charge("s", f"step {i}", Gaussian(100.0))
    ledger.close()  # Empties the log into the file.
    data = bytearray(ledger.path.read_bytes())
    data[100:] = b"\xff" * (len(data) - 100)
    ledger.path.write_bytes(data)
    with pytest.raises(LedgerUnavailableError, match="malformed"):
        ledger.charge("s", "next", Gaussian(100.0))
    with pytest.raises(LedgerUnavailableError, match="malformed"):
        ledger.spent("s")


def test_a_charge_that_cannot_be_read_stops_everything(ledger):
    """An entry of a later version, or of a vandal, is never skipped."""
    ledger.charge("s", "a", Gaussian(5.0))
    for event in ("{}", "nonsense", json.dumps({"kind": "FreeDpEvent"})):
        with contextlib.closing(sqlite3.connect(ledger.path)) as database:
            database.execute("DROP TRIGGER IF EXISTS ledger_no_update")
            database.execute("UPDATE ledger_entries SET body = ? WHERE kind = 'charge'", (event,))
            database.commit()
        before = contents(ledger.path)
        for call in (
            lambda: Ledger(ledger.path).charge("s", "b", Gaussian(100.0)),
            lambda: Ledger(ledger.path).spent("s"),
            lambda: ledger.charges("s"),
        ):
            with pytest.raises(LedgerDamagedError, match="entry 2 is not what was written"):
                call()
        assert contents(ledger.path) == before


def test_a_path_that_cannot_be_opened(tmp_path):
    for path in (tmp_path, tmp_path / "missing" / "l.sqlite"):
        with pytest.raises(LedgerUnavailableError, match="unable to open"):
            Ledger(path)


def test_a_deleted_ledger_is_not_silently_begun_anew(ledger):
    """The budget is gone with the file: charging must not go on as if it were there."""
    ledger.charge("s", "a", Gaussian(1.0))
    for suffix in ("", "-wal", "-shm"):
        ledger.path.with_name(ledger.path.name + suffix).unlink(missing_ok=True)
    with pytest.raises(LedgerUnavailableError, match="Nothing was charged"):
        ledger.charge("s", "b", Gaussian(1.0))


def test_a_copy_of_a_closed_ledger_is_whole(ledger, tmp_path):
    ledger.charge("s", "a", Gaussian(2.0))
    ledger.close()
    copy = tmp_path / "copy.sqlite"
    shutil.copy(ledger.path, copy)
    assert labels(Ledger(copy)) == ["a"]


def test_a_string_path(tmp_path):
    ledger = Ledger(str(tmp_path / "l.sqlite"))
    ledger.open_budget("s", epsilon=1.0, delta=1e-5, adjacency="add_remove", unit="u")
    assert ledger.charge("s", "a", Gaussian(100.0))


def test_the_public_name():
    assert dpfa_jax.Ledger is Ledger
