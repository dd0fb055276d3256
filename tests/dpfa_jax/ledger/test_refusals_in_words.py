"""What a refusal says is in the reader's language, details included."""

import errno
import re
import sqlite3

import dp_accounting
import pytest

from dpfa_jax.ledger import Ledger, LedgerError, errors
from dpfa_jax.ledger.chain import ChainError
from dpfa_jax.ledger.store import _ExchangedError, _problem
from dpfa_jax.messages import LANGUAGES, Message
from dpfa_jax.policy import Policy

WORDS = {"delta": 1e-6, "adjacency": "add_remove", "unit": "user"}
RUN = {"epsilon": 1.0, "parent": "lab", **WORDS}
# Names, numbers and values as they are typed: the same in every language.
SAME = re.compile(r"(\w+ = )?[^\s]+(, (\w+ = )?[^\s]+)*")
EVENT = dp_accounting.GaussianDpEvent(5.0)


@pytest.fixture
def ledger(tmp_path):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.open_budget("lab", epsilon=2.0, level="tenant", composition="adaptive", **WORDS)
    ledger.open_budget("run", **RUN)
    return ledger


def _policy(**rules):
    values = {
        "name": "house", "epsilon": 5.0, "delta": 1e-3, "adjacency": ("add_remove",),
        "unit": ("user",), "audit_log_retention_days": 30, "regions": ("eu-west-1",),
        "breach_notice_hours": 72,
    }  # fmt: skip
    return Policy(**(values | rules))


REFUSALS = {
    "epsilon": lambda x: x.open_budget("a", **RUN | {"epsilon": -1.0}),
    "epsilon, later": lambda x: x.new_budget("run", epsilon=float("nan"), reason="more"),
    "delta": lambda x: x.open_budget("a", **RUN | {"delta": 1.0}),
    "adjacency": lambda x: x.open_budget("a", **RUN | {"adjacency": "both"}),
    "composition": lambda x: x.open_budget("a", composition="free", **RUN),
    "level": lambda x: x.open_budget("a", level="organisation", **RUN),
    "unknown level": lambda x: x.open_budget("a", level="planet", **RUN),
    "level below a run": lambda x: x.open_budget("a", **RUN | {"parent": "run"}),
    "unit": lambda x: x.open_budget("a", **RUN | {"unit": "family"}),
    "name": lambda x: x.open_budget("", **RUN),
    "disjoint": lambda x: x.open_budget("a", disjoint=1, **RUN),
    "disjoint alone": lambda x: x.open_budget("a", disjoint=True, **RUN | {"parent": None}),
    "other budget": lambda x: x.open_budget("run", **RUN | {"epsilon": 1.5}),
    "no reason": lambda x: x.new_budget("run", epsilon=3.0, reason=""),
    "delta of a filter": lambda x: x.new_budget("lab", delta=1e-5, reason="more"),
    "unknown policy": lambda x: x.open_budget("a", policy="mars", **RUN),
    "region": lambda x: x.open_budget("a", policy=_policy(), **RUN),
    "policy's unit": lambda x: x.open_budget("a", policy=_policy(unit=("sample",)), **RUN),
    "charge": lambda x: x.charge("run", "step", dp_accounting.GaussianDpEvent(0.1)),
    "no budget": lambda x: x.charge("walk", "step", EVENT),
    "no charge": lambda x: x.mark_released("run", "step"),
    "event": lambda x: x.charge("run", "step", dp_accounting.ZCDpEvent(0.1)),
    "what if": lambda x: x.what_if("run", dp_accounting.GaussianDpEvent(-1.0)),
    "timeout": lambda x: Ledger(x.path, timeout=-1),
}


def plain(message):
    """The values of a message and of the messages in it that no catalogue translates."""
    for name, value in message.values.items():
        if isinstance(value, Message):
            yield from plain(value)
        elif isinstance(value, str):
            yield name, value


@pytest.mark.parametrize("name", REFUSALS)
def test_no_detail_is_left_in_english(ledger, name):
    with pytest.raises(LedgerError) as refused:
        REFUSALS[name](ledger)
    message = refused.value.message
    for key, value in plain(message):
        # Why an event cannot be accounted for is a programmer's business.
        assert key == "problem" or SAME.fullmatch(value), (key, value)
    shown = {message.show(code) for code in LANGUAGES}
    assert len(shown) == len(LANGUAGES)


def test_an_unreadable_policy_is_refused_with_what_is_wrong_in_it(ledger, tmp_path):
    (tmp_path / "mine.toml").write_text("epsilon = ")
    with pytest.raises(LedgerError, match=r"policy that can be read.*not valid TOML") as refused:
        ledger.open_budget("a", policy=str(tmp_path / "mine.toml"), **RUN)
    assert "eine lesbare Richtlinie" in refused.value.message.show("de")


def test_a_broken_chain_is_described_in_every_language():
    for text in (errors.NO_HEAD, errors.OTHER_HEAD, errors.MISSING, errors.UNLINKED,
                 errors.CHANGED, errors.UNREADABLE):  # fmt: skip
        broken = ChainError(3, text, {"found": "4", "problem": "x"})
        assert str(broken).startswith("entry 3: ")
        assert len({broken.problem.show(code) for code in LANGUAGES}) == len(LANGUAGES)


def _sqlite(code):
    error = sqlite3.OperationalError("its own words {}")
    error.sqlite_errorcode = code
    return error


class _Server(Exception):
    sqlstate = "53100"


@pytest.mark.parametrize(
    ("cause", "text"),
    [
        (_sqlite(sqlite3.SQLITE_FULL), errors.FULL),
        (_sqlite(sqlite3.SQLITE_READONLY | 4 << 8), errors.READ_ONLY),
        (_sqlite(sqlite3.SQLITE_CANTOPEN), errors.NO_ACCESS),
        (_sqlite(sqlite3.SQLITE_NOTADB), errors.NOT_SQLITE),
        (_sqlite(sqlite3.SQLITE_IOERR_WRITE), errors.DISK),
        (_Server("its own words {}"), errors.FULL),
        (Exception("its own words {}"), errors.NO_SERVER),
    ],
)
def test_what_a_database_refuses_is_named_and_quoted(cause, text):
    message = _problem(cause)
    assert message.show() == f"{text}: its own words {{}}"
    shown = {message.show(code) for code in LANGUAGES}
    assert len(shown) == len(LANGUAGES)
    assert all("its own words {}" in one for one in shown)


def test_the_system_s_errors_too():
    assert _problem(_ExchangedError()).show("de") == "die Datei wurde beim Öffnen ausgetauscht"
    full = OSError(errno.ENOSPC, "No space left on device")
    assert _problem(full).show("de").startswith("die Platte ist voll: ")
    assert _problem(OSError("something else")) == "something else"
