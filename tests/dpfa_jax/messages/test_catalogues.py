"""Every text in every language: there, not fuzzy, with the same names to fill in."""

import ast
import datetime
import string
from importlib import resources

import pytest
from babel.messages.pofile import read_po

from dpfa_jax import budget_texts, messages
from dpfa_jax.ledger import BudgetExceededError, LedgerError, errors
from dpfa_jax.messages import LANGUAGES, Message, language, number


def texts():
    """What the sources mark with ``N_``, read from them and not from the catalogues."""
    found = []
    for module in (errors, budget_texts):
        with open(module.__file__, encoding="utf-8") as file:
            tree = ast.parse(file.read())
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "N_":
                found.append(ast.literal_eval(node.args[0]))
    return found


def names(text):
    return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}


def test_the_languages():
    assert " ".join(sorted(LANGUAGES)) == "ar de en es fr hi it ja ko nl pt ru sv zh"
    assert len(texts()) == len(set(texts())) > 25


@pytest.mark.parametrize("code", LANGUAGES)
def test_a_catalogue_is_complete(code):
    path = resources.files("dpfa_jax.messages") / "locale" / code / "LC_MESSAGES" / "dpfa.po"
    with path.open("rb") as file:
        catalogue = read_po(file, locale=code, abort_invalid=True)
    assert not catalogue.fuzzy
    found = {m.id: m for m in catalogue if m.id}
    assert set(found) == set(texts())
    assert not catalogue.obsolete
    for text, message in found.items():
        assert message.string, text
        assert not message.fuzzy, text
        assert names(message.string) == names(text), text
        # Commands stay as they are typed.
        for command in ("dpfa budget new", "dpfa budget verify", "--receipt"):
            assert (command in message.string) == (command in text), text
        if code == "en":
            assert message.string == text
        elif len(text) > 12:
            assert message.string != text


@pytest.mark.parametrize("code", LANGUAGES)
def test_every_message_can_be_shown(code):
    when = datetime.datetime(2026, 3, 4, 5, 6, 7, tzinfo=datetime.UTC)
    for text in texts():
        values = dict.fromkeys(names(text), 1234.5) | {"now": when, "problem": "x"}
        shown = Message(text, values).show(code)
        assert "{" not in shown


def test_numbers_and_dates_are_the_languages():
    when = datetime.datetime(2026, 3, 4, 5, 6, 7, tzinfo=datetime.UTC)
    shown = {c: Message("{n} {d}", {"n": 1234.5, "d": when}).show(c) for c in LANGUAGES}
    assert shown["en"].startswith("1,234 Mar 4, 2026") or shown["en"].startswith("1,235 Mar 4")
    assert "2026年3月4日" in shown["zh"]
    assert "04.03.2026" in shown["de"]
    assert (number(0.5, "de"), number(0.5, "en"), number(0.5, "ru")) == ("0,5", "0.5", "0,5")
    assert number(2.5e-7, "sv") == "2,5×10^−7"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "en"),
        ({"LANG": "C.UTF-8"}, "en"),
        ({"LANG": "sv_SE.UTF-8"}, "sv"),
        ({"LANG": "sv_SE", "LC_ALL": "hi_IN"}, "hi"),
        ({"LANG": "sv_SE", "LANGUAGE": "ko:en"}, "ko"),
        ({"LANG": "C", "LANGUAGE": "ko"}, "en"),
        ({"LANG": "xx_XX"}, "en"),
        ({"LC_MESSAGES": "zh-CN.UTF-8", "LANG": "de_DE"}, "zh"),
    ],
)
def test_the_language_of_the_environment(environment, expected):
    assert language(environment) == expected


def test_an_error_speaks_every_language():
    error = BudgetExceededError(
        errors.EXCEEDED, scope="s", label="a", total=6.57, delta=1e-5, epsilon=4.4, left=0.023
    )
    assert isinstance(error, LedgerError)
    assert str(error) == error.message.show("en")
    shown = {error.message.show(code) for code in LANGUAGES}
    assert len(shown) == len(LANGUAGES)
    assert all("dpfa budget new" in text and "4" in text for text in shown)
    with pytest.raises(ValueError, match="language='xx'"):
        error.message.show("xx")
    assert messages.Message is Message
