import dataclasses
import io
import json

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from dpfa_jax import cli
from dpfa_jax.bench import attention, ours, peers, tables
from dpfa_jax.bench.cases import STANDARD, Shape, Version
from dpfa_jax.bench.timing import BenchError, Plan

SHAPE = Shape(1, 32, 1, 64, True)
QUICK = Plan(samples=20, sample_seconds=1e-4)


def jax_peer(name, repeats):
    """Attention by XLA, done ``repeats`` times over: a peer of known slowness."""

    def prepare(case):
        def attend(q, k, v):
            def once(_, out):
                weights = jax.nn.softmax(jnp.einsum("btnh,bsnh->bnts", q + 0 * out, k))
                return jnp.einsum("bnts,bsnh->btnh", weights, v)

            return jax.lax.fori_loop(0, repeats, once, q)

        return peers.prepare_jax(attend, case)

    return Version(name, "jax", prepare, directions=("forward",))


@pytest.fixture
def few(monkeypatch):
    ours_two = [v for v in ours.VERSIONS if v.name in (ours.EXACT, ours.CHACHA8)]
    triton = next(v for v in ours.VERSIONS if v.name == "dpfa exact, triton")
    versions = (*peers.VERSIONS, *ours_two, triton, jax_peer("one", 1), jax_peer("forty", 40))
    monkeypatch.setattr(attention, "VERSIONS", versions)
    monkeypatch.setattr(attention, "SMALL", (SHAPE,))


def entries_of(cell):
    return {entry["name"]: entry for entry in cell["versions"]}


def test_whole_run(few, tmp_path):
    path = tmp_path / "deep" / "result.json"
    lines = []
    result = attention.run(
        shapes="small", plan=QUICK, json_path=path, command="dpfa x", progress=lines.append
    )
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))
    assert [p.name for p in path.parent.iterdir()] == ["result.json"]
    assert len(lines) == 2
    assert result["command"] == "dpfa x"
    assert result["card"] == jax.devices()[0].device_kind
    assert result["versions"]["jax"] == jax.__version__
    assert len(result["targets"]) == 15

    forward, both = result["cells"]
    assert forward["shape"] == dataclasses.asdict(SHAPE)
    entries = entries_of(forward)
    # Nothing is dropped: peers that are not here say so.
    assert set(entries) == {v.name for v in attention.VERSIONS}
    assert entries["tokamax mosaic"]["error"] == "ModuleNotFoundError: No module named 'tokamax'"
    assert "cuDNN" in entries[peers.CUDNN]["error"]
    assert "GPU" in entries["dpfa exact, triton"]["error"]
    assert "samples_ms" not in entries[peers.CUDNN]

    exact = entries[ours.EXACT]
    assert len(exact["samples_ms"]) == 20
    assert exact["implementation"] == "xla"
    assert exact["extra_bytes"] > 0
    assert forward["baseline"] == "one"
    ratios = exact["ratios"]
    assert ratios["forty"]["ratio"] > 4 * ratios["one"]["ratio"]
    for ratio in ratios.values():
        low, high = ratio["interval"]
        assert low <= ratio["ratio"] <= high
    median = entries["one"]["median_ms"] / exact["median_ms"]
    assert ratios["one"]["ratio"] == pytest.approx(median)

    entries = entries_of(both)
    assert "one" not in entries, "it does no backward pass"
    assert both["baseline"] is None
    assert entries[ours.CHACHA8]["ratios"] == {}

    out = io.StringIO()
    tables.print_result(result, separate=peers.SEPARATE, console=Console(file=out, width=80))
    text = out.getvalue()
    assert all(len(line) <= 80 for line in text.splitlines())
    for expected in ("best peer", "dpfa ChaCha8", "No module named 'tokamax'", "T>=16384", "0.93"):
        assert expected in text


def test_budget_leaves_the_rest_recorded(few, monkeypatch, tmp_path):
    measured = []
    monkeypatch.setattr(attention, "measure_cell", lambda *a: measured.append(a))
    result = attention.run(
        shapes="small", budget=-1.0, json_path=tmp_path / "x.json", progress=lambda _: None
    )
    assert measured == []
    for cell in result["cells"]:
        assert cell["baseline"] is None
        for entry in cell["versions"]:
            assert entry["error"] == "not measured: the time budget of -1 s was spent"
    names = {v.name for v in attention.VERSIONS}
    assert set(entries_of(result["cells"][0])) == names


def test_only_targets_keeps_peers_and_what_the_targets_name(monkeypatch):
    seen = []

    def fake(shape, direction, versions):
        seen.append({v.name for v in versions})
        return attention.Cell(shape, direction, (), {}, {})

    monkeypatch.setattr(attention, "prepare_cell", fake)
    attention.run(shapes="small", only_targets=True, progress=lambda _: None)
    assert {v.name for v in peers.VERSIONS} | {ours.EXACT, ours.CHACHA8} <= seen[0]
    assert not any("xla" in name or "triton" in name for name in seen[0] if "dpfa" in name)


def test_processes_that_compile_together_measure_in_order(tmp_path, monkeypatch):
    """In processes of their own, which know nothing of what a test replaced; one has two turns.

    Forward: compiling gradients would take most of the time.
    """
    shapes = tuple(Shape(1, length, 1, 64, False) for length in (8, 16, 24))
    monkeypatch.setattr(attention, "SMALL", shapes)
    monkeypatch.setattr(attention, "DIRECTIONS", ("forward",))
    path = tmp_path / "x.json"
    lines = []
    plan = Plan(samples=3, sample_seconds=1e-4)
    result = attention.run(
        shapes="small", only_targets=True, jobs=2, plan=plan, json_path=path, progress=lines.append
    )
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))
    assert [line.split("] ")[1] for line in lines] == [f"{shape}, forward" for shape in shapes]
    for cell in result["cells"]:
        entries = entries_of(cell)
        assert len(entries[ours.CHACHA8]["samples_ms"]) == 3


def test_a_process_that_dies_ends_the_bench(monkeypatch):
    monkeypatch.setattr(attention, "_worker", _die)
    with pytest.raises(BenchError, match="a process of the bench died"):
        attention.run(shapes="small", jobs=2, progress=lambda _: None)


def _die(*_):
    raise SystemExit(3)


def test_full_shapes_need_an_accelerator(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    with pytest.raises(BenchError, match="--shapes small"):
        attention.choose_shapes("all")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert attention.choose_shapes("standard") == STANDARD
    assert len(attention.choose_shapes("all")) == 12


def test_command_line(few, tmp_path, monkeypatch, capsys):
    given = {}

    def fake(**options):
        given.update(options)
        return {
            "card": "none", "date": "today", "dtype": "bfloat16", "versions": {"jax": "0"},
            "cells": [], "targets": [],
        }  # fmt: skip

    monkeypatch.setattr(attention, "run", fake)
    path = tmp_path / "a b.json"
    assert (
        cli.main(["bench", "attention", "--only-targets", "--budget", "9", "--json", str(path)])
        == 0
    )
    assert given["only_targets"] is True
    assert given["budget"] == 9.0
    assert given["json_path"] == path
    assert given["command"] == f"dpfa bench attention --only-targets --budget 9 --json '{path}'"
    assert str(path) in capsys.readouterr().out.replace("\n", "")


def test_command_line_without_accelerator(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert cli.main(["bench", "attention", "--json", str(tmp_path / "x.json")]) == 2
    assert "on a CPU use --shapes small" in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()
