"""A small typed schema for TOML tables: unknown keys and impossible values stop here.

Each option is a dataclass field with a check. Errors name the key as it stands in the
file, its value, and what is allowed.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable
from typing import Any, get_type_hints


class ConfigError(ValueError):
    """A configuration that cannot be run. The message is one line and names the key."""


Check = Callable[[Any], str | None]


def option(check: Check, **kwargs: Any) -> Any:
    """A dataclass field with ``check``, which returns None or what would be allowed."""
    return dataclasses.field(metadata={"check": check}, **kwargs)


# TOML's own limit; above it some numbers have no float.
_MOST = 2**63 - 1


def whole(low: int, high: int = _MOST) -> Check:
    """A whole number between ``low`` and ``high``."""
    text = f"a whole number >= {low}" + (f" and <= {high}" if high < _MOST else ", below 2^63")

    def check(value: Any) -> str | None:
        fits = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
        return None if fits else text

    return check


def number(low: float, high: float = math.inf, *, include_low: bool = False) -> Check:
    """A finite number above ``low`` and below (or at) ``high``."""
    text = f"a finite number {'>=' if include_low else '>'} {low:g}"
    text += f" and <= {high:g}" if high < math.inf else ""

    def check(value: Any) -> str | None:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return text
        if isinstance(value, int) and abs(value) > _MOST:
            return text
        above = value >= low if include_low else value > low
        return None if math.isfinite(value) and above and value <= high else text

    return check


def one_of(*allowed: str) -> Check:
    """One of some words."""

    def check(value: Any) -> str | None:
        return None if value in allowed else " or ".join(repr(a) for a in allowed)

    return check


def flag(value: Any) -> str | None:
    """Either true or false."""
    return None if isinstance(value, bool) else "true or false"


def text(value: Any) -> str | None:
    """A string that is not empty."""
    return None if isinstance(value, str) and value.strip() else "a string that is not empty"


def optional(check: Check) -> Check:
    """``check``, or the key left out."""
    return lambda value: None if value is None else check(value)


def show(value: Any) -> str:
    """A value as a TOML file would show it, near enough."""
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)


def build[T](cls: type[T], table: Any, prefix: str = "") -> T:
    """An instance of the dataclass ``cls`` from a parsed TOML table.

    Fields whose type is itself a dataclass are sub-tables.

    Raises:
        ConfigError: for an unknown, missing or impossible key.
    """
    where = prefix.rstrip(".") or "the file"
    if not isinstance(table, dict):
        raise ConfigError(f"{where}: a table is needed, not {show(table)}.")
    assert dataclasses.is_dataclass(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = get_type_hints(cls)
    for key in table:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known are {sorted(fields)}."
            raise ConfigError(f"{prefix}{key}: unknown key; {hint}")
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if dataclasses.is_dataclass(hints[name]):
            if name not in table and field.default is not dataclasses.MISSING:
                values[name] = field.default
                continue
            if name not in table:
                raise ConfigError(f"{prefix}{name}: the table is missing.")
            values[name] = build(hints[name], table[name], f"{prefix}{name}.")
            continue
        has_default = field.default is not dataclasses.MISSING
        if name not in table and not has_default:
            raise ConfigError(f"{prefix}{name}: the key is missing.")
        value = table.get(name, field.default)
        allowed = field.metadata["check"](value)
        if allowed:
            raise ConfigError(f"{prefix}{name} = {show(value)}: allowed is {allowed}.")
        values[name] = value
    return cls(**values)
