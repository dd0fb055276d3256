import json

import jax
import numpy as np
import pytest

from dpfa_jax import cli
from dpfa_jax.bench import tune
from dpfa_jax.bench.cases import Shape, make_case
from dpfa_jax.bench.timing import BenchError, Plan, Runnable, Timing
from pallas_kernels.attention import tuning

SIZES = {"rows": 32, "keys": 32, "warps": 4, "stages": 2}
BIGGER = {"rows": 64, "keys": 64, "warps": 4, "stages": 2}
BACKWARD = {"rows": 64, "row_keys": 32, "keys": 64}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    path = tmp_path / "cache" / "blocks.json"
    monkeypatch.setenv(tuning.CACHE_VARIABLE, str(path))
    return path


def fake_measure(times):
    def measure(versions, plan):
        return {name: Timing(1, 1, [times[name]]) for name in versions}

    return measure


@pytest.fixture
def fake_kernels(monkeypatch):
    """Compiles nothing: every choice of sizes 'computes' the same."""
    monkeypatch.setattr(tune, "prepare_jax", lambda *_: lambda: Runnable(print, None, lambda: 1.0))
    monkeypatch.setattr(tune, "_agree", lambda x, y: x == y)


def case():
    return make_case(Shape(1, 64, 1, 64, False), "forward")


@pytest.mark.parametrize(
    ("times", "best"),
    [((2.0, 3.0, 1.0), BIGGER), ((2.0, 1.0, 1.5), SIZES), ((1.0, 2.0, 2.0), None),
     ((1.0, 0.995, 2.0), None)],
)  # fmt: skip
def test_the_clearly_fastest_is_kept(fake_kernels, monkeypatch, times, best):
    names = ("standing", tune._name(SIZES), tune._name(BIGGER))
    monkeypatch.setattr(tune, "measure", fake_measure(dict(zip(names, times, strict=True))))
    outcome = tune.measure_class("triton", case(), (SIZES, BIGGER), standing=None)
    assert outcome.best == best
    assert outcome.fastest == (SIZES if times[1] <= times[2] else BIGGER)
    assert outcome.milliseconds["standing"] == times[0] * 1e3


def test_sizes_that_the_kernels_refuse_are_passed_over(fake_kernels, monkeypatch):
    monkeypatch.setattr(tune, "measure", fake_measure({"standing": 1.0}))
    outcome = tune.measure_class("triton", case(), ({"rows": -1},), standing=None)
    assert outcome.best is None
    assert "rows must be" in outcome.errors["rows=-1"]


def test_sizes_that_change_the_result_are_passed_over(fake_kernels, monkeypatch):
    results = iter([1.0, 5.0])
    monkeypatch.setattr(
        tune, "prepare_jax", lambda *_: lambda: Runnable(print, None, lambda: next(results))
    )
    monkeypatch.setattr(tune, "measure", fake_measure({"standing": 9.0, tune._name(SIZES): 1.0}))
    outcome = tune.measure_class("triton", case(), (SIZES,), standing=None)
    assert outcome.best is None
    assert "differs" in outcome.errors[tune._name(SIZES)]


def test_a_standing_choice_that_fails_is_an_error(fake_kernels, monkeypatch):
    def fail(*_):
        raise RuntimeError("no such card")

    monkeypatch.setattr(tune, "prepare_jax", fail)
    with pytest.raises(BenchError, match=r"triton.*no such card"):
        tune.measure_class("triton", case(), (SIZES,), standing=None)


def test_agreement():
    x = jax.numpy.asarray([1.0, 2.0])
    assert tune._agree(x, x * 1.001)
    assert not tune._agree(x, x * 1.1)
    assert not tune._agree(x, x * np.float32(np.nan))


@pytest.mark.parametrize(
    ("direction", "sizes"), [("forward", SIZES), ("forward+backward", {"rows": 16, "keys": 64})]
)
def test_real_kernels_in_the_interpreter(direction, sizes):
    outcome = tune.measure_class(
        "triton",
        make_case(Shape(1, 64, 1, 64, True), direction),
        (sizes,),
        standing=None,
        plan=Plan(samples=3, sample_seconds=1e-4),
        interpret=True,
    )
    assert outcome.errors == {}
    assert set(outcome.milliseconds) == {"standing", tune._name(sizes)}


def outcome_for(best):
    times = {"standing": 2.0} | ({} if best is None else {tune._name(best): 1.0})
    return tune.Outcome(best or SIZES, best, times, {})


def test_run_writes_what_lookup_finds(cache, monkeypatch):
    monkeypatch.setattr(tune, "available", lambda: ["triton"])
    monkeypatch.setattr(tune, "make_case", lambda shape, direction: (shape, direction))
    seen = []

    def measured(backend, case, candidates, *, standing, forward, plan):
        shape, direction = case
        seen.append((shape.length, shape.is_causal, direction, forward))
        # The best of the first group stays for the second, which completes it.
        if direction == "forward":
            assert candidates == list(tuning.CANDIDATES["triton"]["forward"][0])
            return outcome_for(SIZES)
        first = "keys" not in candidates[0]
        assert first or all(c.items() >= {"rows": 64}.items() for c in candidates)
        return outcome_for({"rows": 64} if first else BACKWARD)

    monkeypatch.setattr(tune, "measure_class", measured)
    assert tune.run(head_dims=[128], progress=lambda _: None) == cache
    # The backward pass is measured with the new forward sizes.
    assert seen[:3] == [
        (4096, False, "forward", None),
        (4096, False, "forward+backward", SIZES),
        (4096, False, "forward+backward", SIZES),
    ]
    assert len(seen) == 12
    wanted = {
        "device_kind": jax.devices()[0].device_kind, "head_dim": 128, "dtype": "bfloat16",
    }  # fmt: skip
    for is_causal in (False, True):
        for num_keys in (100, 10**5):
            more = wanted | {"is_causal": is_causal, "num_keys": num_keys}
            assert tuning.lookup("triton", "forward", **more) == SIZES
            assert tuning.lookup("triton", "backward", **more) == BACKWARD

    # A second run that finds nothing better takes its own entries out, and no others.
    monkeypatch.setattr(tune, "measure_class", lambda *a, **k: outcome_for(None))
    entries = json.loads(cache.read_text())["entries"]
    other = dict(entries[0], card="another card")
    cache.write_text(json.dumps({"format": 1, "entries": [*entries, other]}))
    tune.run(head_dims=[128], progress=lambda _: None)
    assert json.loads(cache.read_text())["entries"] == [other]


def test_budget(cache, monkeypatch):
    monkeypatch.setattr(tune, "available", lambda: ["triton"])
    lines = []
    tune.run(budget=-1.0, progress=lines.append)
    assert "budget" in lines[0]
    assert not cache.exists()


def test_no_kernels_here(cache, capsys, monkeypatch):
    monkeypatch.setattr(tune, "available", lambda: [])
    assert cli.main(["bench", "tune", "--backend", "triton", "--head-dim", "64"]) == 2
    assert "triton do not run on this machine" in capsys.readouterr().err


def test_cpu_has_no_kernels_to_tune():
    assert tune.available() == []


def test_a_bad_file_is_found_before_anything_is_measured(cache, capsys, monkeypatch):
    cache.parent.mkdir()
    cache.write_text("{")
    monkeypatch.setattr(tune, "available", lambda: pytest.fail("measured"))
    assert cli.main(["bench", "tune"]) == 2
    assert str(cache) in capsys.readouterr().err
    assert cache.read_text() == "{"
