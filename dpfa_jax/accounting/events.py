"""Events as JSON, for the ledger and the report, and taken apart. Unknown events raise."""

from collections.abc import Iterator
from typing import Any

import attr
import dp_accounting

_CLASSES = {
    cls.__name__: cls
    for cls in (
        dp_accounting.NoOpDpEvent,
        dp_accounting.NonPrivateDpEvent,
        dp_accounting.GaussianDpEvent,
        dp_accounting.PoissonSampledDpEvent,
        dp_accounting.TruncatedSubsampledGaussianDpEvent,
        dp_accounting.SelfComposedDpEvent,
        dp_accounting.ComposedDpEvent,
    )
}

_COUNTS = ("count", "dataset_size", "truncated_batch_size")


def _value_to_json(name: str, value: Any) -> Any:
    """One field of an event, checked: a negative count would give budget back."""
    if name == "event":
        return event_to_json(value)
    if name == "events":
        if not isinstance(value, list | tuple):
            raise ValueError(f"events={value!r}: a list of events is needed.")
        return [event_to_json(v) for v in value]
    allowed = int if name in _COUNTS else int | float
    if not isinstance(value, allowed) or isinstance(value, bool) or not value >= 0:
        kind = "whole number" if name in _COUNTS else "number"
        raise ValueError(f"{name}={value!r}: allowed is a {kind} >= 0.")
    if name == "sampling_probability" and value > 1:
        raise ValueError(f"{name}={value!r}: allowed is a number between 0 and 1.")
    return value


def event_to_json(event: dp_accounting.DpEvent) -> dict[str, Any]:
    """A dictionary of JSON values that :func:`event_from_json` reads back.

    Raises:
        ValueError: for a kind of event that the accountant does not compose, or a field
            that is not allowed.

    Example:
        >>> event_to_json(dp_accounting.GaussianDpEvent(2.0))
        {'kind': 'GaussianDpEvent', 'noise_multiplier': 2.0}
    """
    kind = type(event).__name__
    if _CLASSES.get(kind) is not type(event):
        raise ValueError(f"event {kind}: allowed are {tuple(_CLASSES)}.")
    out: dict[str, Any] = {"kind": kind}
    for field in attr.fields(type(event)):
        out[field.name] = _value_to_json(field.name, getattr(event, field.name))
    return out


def event_from_json(data: dict[str, Any]) -> dp_accounting.DpEvent:
    """The event that :func:`event_to_json` wrote.

    Raises:
        ValueError: for anything it did not write.
    """
    if not isinstance(data, dict) or data.get("kind") not in tuple(_CLASSES):
        raise ValueError(f"event {data!r}: no known kind.")
    cls = _CLASSES[data["kind"]]
    names = {field.name for field in attr.fields(cls)}
    if set(data) != names | {"kind"}:
        raise ValueError(f"event {data!r}: {data['kind']} has the fields {sorted(names)}.")
    values: dict[str, Any] = {}
    for name in names:
        value = data[name]
        if isinstance(value, dict):
            value = event_from_json(value)
        elif isinstance(value, list):
            value = [event_from_json(v) for v in value]
        values[name] = value
    event = cls(**values)
    event_to_json(event)  # checks the fields
    return event


def leaves(
    event: dp_accounting.DpEvent, count: int = 1
) -> Iterator[tuple[dp_accounting.DpEvent, int]]:
    """The events that ``count`` times ``event`` is composed of, each with its count.

    Raises:
        ValueError: for a count that is not allowed; a negative one would give budget back.

    Example:
        >>> event = dp_accounting.GaussianDpEvent(2.0)
        >>> twice = dp_accounting.SelfComposedDpEvent(event, 2)
        >>> list(leaves(dp_accounting.ComposedDpEvent([twice, event]), 3))
        [(GaussianDpEvent(noise_multiplier=2.0), 6), (GaussianDpEvent(noise_multiplier=2.0), 3)]
    """
    if isinstance(event, dp_accounting.SelfComposedDpEvent):
        yield from leaves(event.event, count * _value_to_json("count", event.count))
    elif isinstance(event, dp_accounting.ComposedDpEvent):
        for part in event.events:
            yield from leaves(part, count)
    elif count and not isinstance(event, dp_accounting.NoOpDpEvent):
        yield _hashable(event), count


def _hashable(event: dp_accounting.DpEvent) -> dp_accounting.DpEvent:
    """``event`` with tuples for lists, so that equal events can be counted."""
    values = attr.asdict(event, recurse=False) if attr.has(type(event)) else {}
    lists = {k: tuple(v) for k, v in values.items() if isinstance(v, list)}
    return attr.evolve(event, **lists) if lists else event
