"""Events survive JSON, and nothing else gets in."""

import json

import dp_accounting
import pytest

from dpfa_jax.accounting.events import event_from_json, event_to_json

Gaussian = dp_accounting.GaussianDpEvent
EVENTS = [
    dp_accounting.NoOpDpEvent(),
    dp_accounting.NonPrivateDpEvent(),
    Gaussian(1.1),
    Gaussian(0.1 + 0.2),  # no short decimal form
    Gaussian(5e-324),
    dp_accounting.PoissonSampledDpEvent(1 / 3, Gaussian(2.0)),
    dp_accounting.TruncatedSubsampledGaussianDpEvent(1085, 0.27, 340, 1.39),
    dp_accounting.SelfComposedDpEvent(Gaussian(3.0), 4096),
    dp_accounting.ComposedDpEvent([]),
    dp_accounting.ComposedDpEvent(
        [
            Gaussian(1.0),
            dp_accounting.SelfComposedDpEvent(
                dp_accounting.ComposedDpEvent(
                    [dp_accounting.PoissonSampledDpEvent(0.5, Gaussian(2.0)), Gaussian(7.0)]
                ),
                3,
            ),
        ]
    ),
]


@pytest.mark.parametrize("event", EVENTS, ids=repr)
def test_round_trip_through_text(event):
    text = json.dumps(event_to_json(event))
    back = event_from_json(json.loads(text))
    assert back == event
    assert type(back) is type(event)
    assert json.dumps(event_to_json(back)) == text


class MyGaussian(dp_accounting.GaussianDpEvent):
    """A subclass may mean anything."""


@pytest.mark.parametrize(
    "event",
    [
        dp_accounting.LaplaceDpEvent(1.0),
        dp_accounting.UnsupportedDpEvent(),
        MyGaussian(1.0),
        dp_accounting.SelfComposedDpEvent(dp_accounting.LaplaceDpEvent(1.0), 2),
        dp_accounting.ComposedDpEvent([Gaussian(1.0), dp_accounting.LaplaceDpEvent(1.0)]),
        dp_accounting.ComposedDpEvent([Gaussian(1.0), 3]),
        dp_accounting.PoissonSampledDpEvent(0.1, MyGaussian(1.0)),
        "GaussianDpEvent",
        None,
    ],
    ids=repr,
)
def test_what_is_not_written(event):
    with pytest.raises(ValueError, match="allowed are"):
        event_to_json(event)


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"kind": "LaplaceDpEvent", "noise_multiplier": 1.0},
        {"kind": "os.system", "command": "true"},
        {"kind": None},
        {"noise_multiplier": 1.0},
        ["GaussianDpEvent", 1.0],
        "GaussianDpEvent",
        None,
        1.0,
    ],
    ids=repr,
)
def test_unknown_kinds(data):
    with pytest.raises(ValueError, match="no known kind"):
        event_from_json(data)


@pytest.mark.parametrize(
    "data",
    [
        {"kind": "GaussianDpEvent"},
        {"kind": "GaussianDpEvent", "noise_multiplier": 1.0, "count": 2},
        {"kind": "GaussianDpEvent", "noise_multipler": 1.0},
        {"kind": "NoOpDpEvent", "free": True},
        {"kind": "SelfComposedDpEvent", "event": {"kind": "NoOpDpEvent"}},
        {"kind": "ComposedDpEvent", "events": [{"kind": "GaussianDpEvent"}]},
        {
            "kind": "PoissonSampledDpEvent",
            "sampling_probability": 0.1,
            "event": {"kind": "GaussianDpEvent", "noise_multiplier": 1.0, "extra": 0},
        },
    ],
    ids=repr,
)
def test_missing_and_extra_fields_at_any_depth(data):
    with pytest.raises(ValueError, match="has the fields"):
        event_from_json(data)


@pytest.mark.parametrize("bad", [-1, -1.0, float("nan"), "1", None, True, [1.0], {}], ids=repr)
def test_numbers_that_are_not_allowed(bad):
    """Both ways: a negative count, once composed, would give budget back."""
    poisson = dp_accounting.PoissonSampledDpEvent(bad, Gaussian(1.0))
    truncated = [
        dp_accounting.TruncatedSubsampledGaussianDpEvent(
            *(bad if i == field else v for i, v in enumerate((10, 0.5, 5, 1.0)))
        )
        for field in range(4)
    ]
    for event, name in (
        (Gaussian(bad), "noise_multiplier="),
        (poisson, "sampling_probability="),
        (dp_accounting.SelfComposedDpEvent(Gaussian(1.0), bad), "count="),
        *zip(
            truncated,
            ("dataset_size=", "sampling_prob", "truncated_batch_size=", "noise_mul"),
            strict=True,
        ),
    ):
        for nested in (event, dp_accounting.ComposedDpEvent([event])):
            with pytest.raises(ValueError, match=name):
                event_to_json(nested)
    if isinstance(bad, dict | list):
        return
    for data in (
        {"kind": "GaussianDpEvent", "noise_multiplier": bad},
        {"kind": "SelfComposedDpEvent", "event": {"kind": "NoOpDpEvent"}, "count": bad},
    ):
        with pytest.raises(ValueError, match="allowed is a"):
            event_from_json(data)


@pytest.mark.parametrize(
    "data",
    [
        {"kind": "GaussianDpEvent", "noise_multiplier": {"kind": "NoOpDpEvent"}},
        {"kind": "GaussianDpEvent", "noise_multiplier": []},
        {"kind": "SelfComposedDpEvent", "event": 3, "count": 1},
        {"kind": "SelfComposedDpEvent", "event": {"kind": "NoOpDpEvent"}, "count": 1.5},
        {"kind": "ComposedDpEvent", "events": 3},
        {"kind": "ComposedDpEvent", "events": {"kind": "NoOpDpEvent"}},
        {"kind": "ComposedDpEvent", "events": [3]},
        {"kind": ["GaussianDpEvent"]},
    ],
    ids=repr,
)
def test_fields_of_the_wrong_kind(data):
    with pytest.raises(ValueError, match=r"=|event"):
        event_from_json(data)
