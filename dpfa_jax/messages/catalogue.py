"""Messages, looked up and filled in."""

import dataclasses
import datetime
import functools
import math
import os
from collections.abc import Mapping
from importlib import resources
from typing import Any

from babel import Locale, dates, numbers
from babel.messages.pofile import read_po

LANGUAGES = ("en", "es", "fr", "de", "ja", "zh", "ko", "pt", "it", "ru", "ar", "hi", "nl", "sv")


def N_(text: str) -> str:
    """Marks ``text`` for the catalogues."""
    return text


def language(environment: Mapping[str, str] = os.environ) -> str:
    """The language that the environment asks for, as gettext reads it; else English.

    Example:
        >>> language({"LANG": "pt_BR.UTF-8"}), language({"LC_ALL": "C", "LANG": "de_DE"})
        ('pt', 'en')
    """
    asked = ""
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        if environment.get(name):
            asked = environment[name]
            break
    if asked.split(".")[0] not in ("", "C", "POSIX") and environment.get("LANGUAGE"):
        asked = environment["LANGUAGE"].split(":")[0]
    code = asked.replace("-", "_").split("_")[0].split(".")[0].lower()
    return code if code in LANGUAGES else "en"


@functools.cache
def catalogue(code: str) -> dict[str, str]:
    """The complete texts of a language, by their English text.

    Raises:
        ValueError: for a language that is not there.
    """
    if code not in LANGUAGES:
        raise ValueError(f"language={code!r}: allowed are {LANGUAGES}.")
    path = resources.files("dpfa_jax.messages") / "locale" / code / "LC_MESSAGES" / "dpfa.po"
    with path.open("rb") as file:
        found = read_po(file, locale=code)
    return {str(m.id): str(m.string) for m in found if m.id and m.string and not m.fuzzy}


def number(value: float, code: str = "en") -> str:
    """Four significant digits, as the language writes them.

    Example:
        >>> number(4.37718), number(4.37718, "de"), number(1e-5), number(float("inf"))
        ('4.377', '4,377', '1E-5', '∞')
    """
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    locale = Locale.parse(code)
    if isinstance(value, int):
        return str(numbers.format_decimal(value, locale=locale))
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        rounded = float(f"{value:.4g}")
        return str(numbers.format_decimal(rounded, "#,##0.######", locale=locale))
    return str(numbers.format_scientific(float(f"{value:.4g}"), "0.###E0", locale=locale))


def _shown(value: Any, code: str) -> str:
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, Message):
        return value.show(code)
    if isinstance(value, int | float):
        return number(value, code)
    if isinstance(value, datetime.datetime):
        # Spaces that are no ASCII break in logs.
        text = dates.format_datetime(value, "medium", tzinfo=datetime.UTC, locale=code)
        return str(text).replace("\u202f", " ") + " UTC"
    return str(value)


@dataclasses.dataclass(frozen=True)
class Message:
    """A text of the catalogues and what is filled in.

    Attributes:
        text: the English text, with ``{names}``.
        values: by name; numbers and dates are written in the language.

    Example:
        >>> Message("ε = {epsilon}", {"epsilon": 0.5}).show()
        'ε = 0.5'
    """

    text: str
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def show(self, code: str = "en") -> str:
        """The message in a language."""
        text = self.text if code == "en" else catalogue(code).get(self.text, self.text)
        return text.format_map({k: _shown(v, code) for k, v in self.values.items()})
