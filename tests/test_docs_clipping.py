"""The worked example of docs/clipping.md gives what the page says."""

import doctest
import json
from pathlib import Path

from dpfa_jax.bench import clipping, opacus_steps, steps

PAGE = Path(__file__).parents[1] / "docs" / "clipping.md"
RECORD = PAGE.parents[1] / "benchmarks" / "results" / "2026-11-23_cpu_clipping.json"


ON_GPU = PAGE.parents[1] / "benchmarks" / "results" / "2026-11-23_h100_clipping.json"
LATER = ON_GPU.with_name("2026-11-23_h100_clipping_rerun.json")
PEERS = ON_GPU.with_name("2026-11-23_h100_clipping_peers.json")
WITH_OPACUS = ON_GPU.with_name("2026-11-23_h100_clipping_opacus.json")


def test_the_worked_example():
    done = doctest.testfile(str(PAGE), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert done.attempted >= 6
    assert done.failed == 0


def test_the_figures_are_those_of_the_record():
    record = json.loads(RECORD.read_text())
    (cell,) = record["cells"]
    entries = {e["name"]: e for e in cell["versions"]}
    ours = entries[steps.OURS_NO_NOISE]
    times = [1 / x for x in (ours["share"], *reversed(ours["interval"]))]
    figures = (
        "{:.2f} [{:.2f}, {:.2f}] times the non-private step's time".format(*times),
        f"{ours['memory']:.2f} times its memory",
    )
    text = " ".join(PAGE.read_text(encoding="utf-8").split())
    for figure in figures:
        assert figure in text, figure
    assert f"`{record['command']}`" in text
    (verdict,) = [t for t in clipping.judge(record["cells"]) if t["share"] is not None]
    assert verdict["must_reached"]


def test_the_table_is_that_of_the_h100():
    text = PAGE.read_text(encoding="utf-8")
    record = json.loads(ON_GPU.read_text())
    rows = 0
    for cell in record["cells"]:
        entries = {e["name"]: e for e in cell["versions"]}
        ours = entries[steps.OURS]
        row = "| {:.2f} [{:.2f}, {:.2f}] |".format(ours["share"], *ours["interval"])
        absent = " not in this run |"
        plain = entries.get(steps.OURS_NO_NOISE)
        if plain is None:
            row += absent
        else:
            row += f" {ours['median_ms'] - plain['median_ms']:.1f} ms of {ours['median_ms']:.1f} |"
        row += f" {ours['memory']:.2f} |"
        others = [e["share"] for n, e in entries.items() if n.startswith("jax_privacy")]
        row += f" {max(others):.2f} |" if others else absent
        assert row in text, row
        rows += 1
        assert ours["share"] > max(others, default=0.0)
    assert rows == 5
    verdicts = [t for t in clipping.judge(record["cells"]) if t["share"] is not None]
    assert len(verdicts) == 4
    assert all(t["must_reached"] and t["memory_must_reached"] for t in verdicts)


def test_the_later_run():
    (cell,) = json.loads(LATER.read_text())["cells"]
    (ours,) = (e for e in cell["versions"] if e["name"] == steps.OURS)
    figures = "{:.2f} [{:.2f}, {:.2f}]".format(ours["share"], *ours["interval"])
    assert f"after a later change ([Rounding](#rounding)): {figures}" in PAGE.read_text("utf-8")


def test_opacus_beside_it():
    text = " ".join(PAGE.read_text(encoding="utf-8").split())
    private, own = [], []
    for path, number in ((WITH_OPACUS, 0), (ON_GPU, 1)):
        cell = json.loads(path.read_text())["cells"][number]
        entries = {e["name"]: e for e in cell["versions"]}
        peer, torch = (entries[n] for n in (opacus_steps.OPACUS, opacus_steps.PYTORCH))
        private.append(peer["share"])
        own.append(torch["median_ms"] / peer["median_ms"])
        for entry in (peer, torch):
            assert f"{entry['median_ms']:.1f}" in text
        assert peer["share"] < entries[steps.OURS]["share"]
    assert "{:.2f} and {:.2f} of the throughput of JAX's".format(*private) in text
    assert "{:.2f} and {:.2f} of PyTorch's own".format(*own) in text


def test_the_peers_of_another_run():
    text = " ".join(PAGE.read_text(encoding="utf-8").split())
    short, long, large = (
        {e["name"]: e for e in cell["versions"]} for cell in json.loads(PEERS.read_text())["cells"]
    )
    optax = [cell["optax vmap"] for cell in (short, long)]
    ours = [cell[steps.OURS]["share"] for cell in (short, long)]
    assert (
        "reached {:.2f} (T = 256, {:.2f} of the memory) and {:.2f} (T = 1024), where ours was "
        "{:.2f} and {:.2f}".format(optax[0]["share"], optax[0]["memory"], optax[1]["share"], *ours)
    ) in text
    best = max(
        (e for n, e in large.items() if n.startswith("jax_privacy")), key=lambda e: e["share"]
    )
    assert (
        "a quarter: {:.2f} with {:.2f} of the memory".format(best["share"], best["memory"]) in text
    )
    assert best["name"].endswith("1/4")
