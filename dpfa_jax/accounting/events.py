"""Events as JSON, for the ledger and the report. Unknown events raise."""

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


def event_to_json(event: dp_accounting.DpEvent) -> dict[str, Any]:
    """A dictionary of JSON values that :func:`event_from_json` reads back.

    Raises:
        ValueError: for a kind of event that the accountant does not compose.

    Example:
        >>> event_to_json(dp_accounting.GaussianDpEvent(2.0))
        {'kind': 'GaussianDpEvent', 'noise_multiplier': 2.0}
    """
    kind = type(event).__name__
    if _CLASSES.get(kind) is not type(event):
        raise ValueError(f"event {kind}: allowed are {tuple(_CLASSES)}.")
    out: dict[str, Any] = {"kind": kind}
    for field in attr.fields(type(event)):
        value = getattr(event, field.name)
        if isinstance(value, dp_accounting.DpEvent):
            value = event_to_json(value)
        elif isinstance(value, list | tuple):
            value = [event_to_json(v) for v in value]
        out[field.name] = value
    return out


def event_from_json(data: dict[str, Any]) -> dp_accounting.DpEvent:
    """The event that :func:`event_to_json` wrote.

    Raises:
        ValueError: for anything it did not write.
    """
    if not isinstance(data, dict) or data.get("kind") not in _CLASSES:
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
    return cls(**values)
