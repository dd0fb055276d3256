"""``dpfa bench scaling`` on one tiny step, its model, and the table in docs/scaling.md."""

import dataclasses
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from dpfa_jax import cli, keys
from dpfa_jax.bench import decoder, scaling, scaling_attention, scaling_model, scaling_plot
from dpfa_jax.bench.timing import BenchError, Plan

ROOT = Path(__file__).parents[3]
QUICK = Plan(samples=2, sample_seconds=1e-4, version_seconds=1.0, least=2)


def test_the_documented_table_is_the_formulas():
    text = (ROOT / "docs" / "scaling.md").read_text()
    shown = text.split("<!-- table -->\n")[1].split("\n<!-- end of table -->")[0]
    assert shown == scaling_model.table()


def test_the_measured_step_is_what_the_model_was_fitted_to():
    like = scaling_model.Decoder("1.3 B", 1.313e9, 24, 2048, together=4)
    it = scaling_model.predict(like, 1, fsdp=False)
    assert it.compute == pytest.approx(0.3907)
    assert it.noise == pytest.approx(10.38e-3)
    assert it.memory == pytest.approx(31.92e9)
    record = json.loads((ROOT / "benchmarks/results/2026-11-23_h100_clipping.json").read_text())
    (cell,) = (
        c for c in record["cells"] if (c["shape"]["name"], c["shape"]["batch"]) == ("1.3 B", 4)
    )
    by_name = {e["name"]: e for e in cell["versions"]}
    assert by_name["dpfa auto, no noise"]["median_ms"] == pytest.approx(390.7, abs=0.05)
    assert cell["noise_ms"] == pytest.approx(10.38, abs=0.005)
    assert by_name["dpfa auto"]["peak_bytes"] == pytest.approx(31.92e9, rel=1e-3)


def test_more_devices_send_more_and_hold_less():
    model = scaling_model.DECODERS[1]
    parts = [scaling_model.predict(model, k, fsdp=True) for k in (1, 2, 8)]
    assert [p.communication for p in parts] == sorted(p.communication for p in parts)
    assert parts[0].communication == 0
    assert [p.memory for p in parts] == sorted((p.memory for p in parts), reverse=True)


def test_a_case_is_measured_and_shown(tmp_path, monkeypatch):
    small = dataclasses.replace(decoder.SMALL, layers=1, accumulate=1)
    monkeypatch.setitem(scaling.MODELS, "small", small)
    path = tmp_path / "scaling.json"
    with keys.allow_reuse_for_tests():
        result = scaling.run(
            devices=[1],
            models=["small", "attention"],
            quick=True,
            plan=QUICK,
            attention_shapes=[scaling_attention.Shape(8, 600, 1, 8, "float32")],
            json_path=path,
            progress=lambda _: None,
        )
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))
    (cell,) = result["cells"]
    assert "error" not in cell
    assert cell["share"] == 1.0
    error = cell["predicted_ms"] / cell["median_ms"] - 1
    assert cell["prediction_error"] == pytest.approx(error)
    (row,) = result["attention"]
    assert row["share_of_ideal"] == pytest.approx(1.0)
    plot = path.with_suffix(".svg").read_text()
    assert "<svg" in plot
    assert cell["tokens"] == small.batch * small.length
    assert cell["peak_bytes"] > 12 * cell["parameters"]
    screen = io.StringIO()
    scaling.print_result(result, Console(file=screen, width=140))
    assert "small" in screen.getvalue()
    assert "same bits" in screen.getvalue()


def test_a_case_without_a_profile_says_why(monkeypatch):
    def broken(_):
        raise RuntimeError("CUPTI is not there\nmore")

    monkeypatch.setattr(scaling, "collective_times", broken)
    small = dataclasses.replace(decoder.SMALL, layers=1, accumulate=1)
    cell = scaling.measure_case(scaling.make_case("small", small, "dp", "weak", 1), QUICK)
    assert cell["collective_seconds"] is None
    assert cell["profile_error"] == "RuntimeError: CUPTI is not there"
    scaling.judge([cell])
    screen = io.StringIO()
    facts = {"card": "x", "versions": {"jax": "0"}, "date": "today", "cells": [cell]}
    scaling.print_result(facts, Console(file=screen, width=140))
    assert "no profile: RuntimeError: CUPTI is not there" in screen.getvalue()


def test_the_plot_has_a_line_for_each_kind_of_scaling():
    cells = [
        {"model": "gpt2", "layout": layout, "mode": "weak", "devices": n, "share": 0.9}
        for layout in ("dp", "fsdp")
        for n in (1, 2, 4)
    ]
    rows = [
        {"version": "S=65536", "direction": "forward", "devices": n, "speed_up": 0.95 * n}
        for n in (1, 2, 4)
    ]
    result = {"card": "H100", "date": "2026-11-23", "cells": cells, "attention": rows}
    training, attention = scaling_plot.figure(result).axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in training.lines}
    assert drawn["gpt2, dp, weak"] == [[1.0, 1.0], [2.0, 1.8], [4.0, 3.6]]
    assert set(drawn) == {"ideal", "gpt2, dp, weak", "gpt2, fsdp, weak"}
    assert attention.lines[1].get_xydata()[2].tolist() == [4.0, 3.8]


@pytest.mark.parametrize("devices", ["x", "1,,2", "", "0", "-1", "1.5", "²"])
def test_devices_that_are_no_numbers_are_one_clear_line(devices, capsys):
    with pytest.raises(SystemExit) as status:
        cli.main(["bench", "scaling", f"--devices={devices}"])
    assert status.value.code == 2
    assert (
        f"argument --devices: {devices!r}: allowed are whole numbers >= 1 with commas"
        in capsys.readouterr().err
    )


def test_strong_scaling_divides_the_batch():
    case = scaling.make_case("1.3b", decoder.LARGE, "dp", "strong", 8)
    assert (case.examples, case.shape.batch, case.shape.accumulate) == (2, 2, 1)
    assert case.tokens == 16 * 1024
    with pytest.raises(BenchError, match="16 examples do not divide over 3 devices"):
        scaling.make_case("1.3b", decoder.LARGE, "dp", "strong", 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"devices": [64]}, "--devices 64: allowed are numbers from 1 to"),
        ({"devices": [0]}, "--devices 0"),
        ({"models": ["gpt5"]}, "--models gpt5: allowed are"),
        ({"layouts": []}, "--layouts : allowed are"),
        ({"batch": 0}, "--batch 0"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(BenchError, match=message):
        scaling.run(**{"devices": [1], "progress": lambda _: None, **options})
