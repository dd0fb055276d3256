"""The rows on one device and a small shape: what they say, and that they say other bits."""

import json

import jax
import pytest

from dpfa_jax import keys
from dpfa_jax.bench import scaling_attention
from dpfa_jax.bench.scaling_attention import Shape, measure_shape
from dpfa_jax.bench.timing import BenchError, Plan

SMALL = Shape(8, 600, 1, 8, "float32")
QUICK = Plan(samples=2, sample_seconds=1e-4, version_seconds=0.1)


@pytest.mark.parametrize("with_gradients", [False, True])
def test_a_row_says_time_share_and_bits(with_gradients):
    with keys.allow_reuse_for_tests():
        (row,) = measure_shape(SMALL, [1], QUICK, with_gradients=with_gradients)
    assert row["error"] is None
    assert row["devices"] == 1
    assert row["seconds"] > 0
    assert row["share_of_ideal"] == pytest.approx(1.0)
    assert row["same_bits"]
    assert len(row["samples"]) >= 2
    json.dumps(row)
    assert "same bits" in scaling_attention.show([row])
    assert "OTHER BITS" in scaling_attention.show([row | {"same_bits": False}])


@pytest.mark.parametrize("devices", [[], [0], [1, 10**6]])
def test_device_counts_that_are_not_here_are_refused(devices):
    with pytest.raises(BenchError, match="allowed are numbers from 1"):
        measure_shape(SMALL, devices, QUICK)


def test_main_writes_every_sample(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scaling_attention, "usual_shapes", lambda quick: (SMALL,))
    path = tmp_path / "rows.json"
    with keys.allow_reuse_for_tests():
        scaling_attention.main(["--devices", "1,1000000", "--quick", "--json", str(path)])
    assert "1 device(s)" in capsys.readouterr().out
    found = json.loads(path.read_text())
    assert found["device"] == jax.devices()[0].device_kind
    assert [row["devices"] for row in found["rows"]] == [1]
