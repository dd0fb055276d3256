import io
import json

import jax
import pytest
from rich.console import Console

from dpfa_jax import cli, doctor
from pallas_kernels.attention import tuning


@pytest.fixture(autouse=True)
def _no_cache(tmp_path, monkeypatch):
    monkeypatch.setenv(tuning.CACHE_VARIABLE, str(tmp_path / "blocks.json"))


def hopper(query, key, spec, *, has_mask=False):
    """What a machine with a Hopper card could answer."""
    mosaic = "a mask array is given" if has_mask else None
    if query.dtype == "float32":
        mosaic = "float32 is not for these kernels"
    triton = "a mask array is given" if has_mask else None
    return [("mosaic_gpu", mosaic), ("triton", triton), ("xla", None), ("reference", None)]


def find(report, **wanted):
    (call,) = [c for c in report["calls"] if all(c[k] == v for k, v in wanted.items())]
    return call


def text_of(report):
    out = io.StringIO()
    doctor.print_report(report, Console(file=out, width=80))
    return out.getvalue()


def test_every_combination_is_there():
    calls = doctor.examine()["calls"]
    keys = {(c["mode"], c["dtype"], c["head_dim"], c["feature"]) for c in calls}
    assert len(keys) == len(calls) == 3 * 3 * 4 * 8


def test_this_machine():
    report = doctor.examine()
    assert report["backend"] == jax.default_backend() == "cpu"
    assert report["versions"]["jax"] == jax.__version__
    call = find(report, mode="record", dtype="bfloat16", head_dim=128, feature="causal")
    assert call["forward"] == call["backward"] == "xla"
    assert call["not"]["mosaic_gpu"] == "needs a GPU, the default backend is 'cpu'"
    assert "mosaic_gpu (all): needs a GPU" in text_of(report)


def test_what_each_call_asks(monkeypatch):
    asked = []

    def explain(query, key, spec, *, has_mask=False):
        asked.append((query, key, spec, has_mask))
        return [("xla", None)]

    monkeypatch.setattr(doctor, "explain", explain)
    doctor.examine()
    assert {spec.mode for _, _, spec, _ in asked} == {"exact", "record", "sequence"}
    assert {str(query.dtype) for query, _, _, _ in asked} == {"bfloat16", "float16", "float32"}
    assert {query.shape[3] for query, _, _, _ in asked} == {64, 80, 128, 256}
    assert {key.shape[2] for _, key, _, _ in asked} == {1, 2, 8}
    for answers in (
        {spec.is_causal for _, _, spec, _ in asked},
        {spec.window is None for _, _, spec, _ in asked},
        {has_mask for _, _, _, has_mask in asked},
        {query.shape[1] == key.shape[1] for query, key, _, _ in asked},
    ):
        assert answers == {False, True}


def test_reasons_for_what_stood_above(monkeypatch):
    monkeypatch.setattr(doctor, "explain", hopper)
    report = doctor.examine()
    plain = {"mode": "exact", "head_dim": 64, "feature": "plain"}
    assert find(report, dtype="float16", **plain)["forward"] == "mosaic_gpu"
    assert find(report, dtype="float16", **plain)["not"] == {}
    call = find(report, dtype="float32", **plain)
    assert call["forward"] == "triton"
    assert call["not"] == {"mosaic_gpu": "float32 is not for these kernels"}
    text = text_of(report)
    assert "mosaic_gpu (float32): float32 is not for these kernels" in text
    assert "mosaic_gpu (bfloat16/float16, mask): a mask array is given" in text
    assert "triton (mask): a mask array is given" in text
    # Two rows a mode and dtype group: what the kernels do, and what a mask gets.
    assert text.count("64, 80, 128, 256") == 3 * 2 * 2
    assert "plain, causal" in text


def test_json_command(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {"versions", "devices", "backend", "block_sizes", "calls"} == set(report)


def test_command(capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "block sizes: none of your own" in out
    assert "why not the better ones" in out


def test_a_bad_file_of_block_sizes_is_one_line(tmp_path, capsys):
    (tmp_path / "blocks.json").write_text("[]")
    assert cli.main(["doctor"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert str(tmp_path / "blocks.json") in err
