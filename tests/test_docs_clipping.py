"""The worked example of docs/clipping.md gives what the page says."""

import doctest
import json
from pathlib import Path

from dpfa_jax.bench import clipping, steps

PAGE = Path(__file__).parents[1] / "docs" / "clipping.md"
RECORD = PAGE.parents[1] / "benchmarks" / "results" / "2026-11-23_cpu_clipping.json"


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
