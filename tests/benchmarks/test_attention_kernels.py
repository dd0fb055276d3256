"""The parts of a call from a profile; what cannot be asked."""

import argparse
import importlib.util
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def kernels():
    path = Path(__file__).parents[2] / "benchmarks" / "attention_kernels.py"
    spec = importlib.util.spec_from_file_location("attention_kernels", path)
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look their module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_medians_of_times_gaps_and_the_period(kernels):
    # Three calls of "small" and "large"; ns.
    times = [(100, 1000), (200, 1100), (300, 5000)]
    gaps = [(50, 10), (60, 20), (1000, 30)]
    events, now = [], 0
    for durations, waits in zip(times, gaps, strict=True):
        for name, duration, wait in zip(("small", "large"), durations, waits, strict=True):
            now += wait
            events.append(kernels.Event(name, now, duration))
            now += duration
    period, parts = kernels.parts_of(events[::-1], calls=3)
    # 1110 + 60 from the first beginning to the second, 1320 + 1000 to the third.
    assert period == pytest.approx((1170 + 2320) / 2 / 1e3)
    small, large = parts
    assert (small.name, small.time, small.gap_before) == ("small", 0.2, (60 + 1000) / 2 / 1e3)
    assert (large.name, large.time, large.gap_before) == ("large", 1.1, 0.02)


def test_calls_of_other_kernels_are_refused(kernels):
    event = kernels.Event
    for events in ([], [event("a", 0, 1)] * 3, [event("a", 0, 1), event("b", 2, 1)]):
        with pytest.raises(ValueError, match=f"^events: {len(events)} kernels are not 2 times"):
            kernels.parts_of(events, calls=2)


def test_shapes(kernels):
    shape = kernels.shape_of("4,4096,16,128,causal")
    assert str(shape) == "B=4 T=4096 H=16 D=128 causal"
    assert not kernels.shape_of("4,4096,16,128").is_causal
    for text in ("4,4096,16", "4,0,16,128", "4,a,16,128", "4,4096,16,128,full"):
        with pytest.raises(argparse.ArgumentTypeError, match=text):
            kernels.shape_of(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--versions", "dpfa exact;nothing"], "--versions: 'nothing' is none of"),
        (["--calls", "1"], "--calls: 1 is less than 2"),
        ([], "a GPU is needed; the default backend is 'cpu'"),
    ],
)
def test_one_line_says_what_is_wrong(kernels, capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        kernels.main(["--shape", "1,64,2,64", *arguments])
    assert message in capsys.readouterr().err
