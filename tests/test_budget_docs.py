"""docs/budget.md: its code runs, and its figures are those of the committed results."""

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "budget.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results"


def test_the_code_runs(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", TEXT):
        assert (ROOT / "docs" / target).exists(), target


def test_the_figures():
    bench = json.loads((RESULTS / "2026-11-23_cpu_ledger.json").read_text())
    for charges in bench["charges"]:
        assert charges["median_ms"] < 5
        assert f"median {charges['median_ms']:.2f} ms, p99 {charges['p99_ms']:.2f} ms" in TEXT
    for composition in bench["compositions"][:3]:
        assert composition["seconds"] < 1
        figures = "| {seconds:.3f} s ({cpu_seconds:.3f} s of CPU time) |"
        assert figures.format(**composition) in TEXT
    schedules = json.loads((RESULTS / "2026-11-23_cpu_budget_schedules.json").read_text())
    for how, start in (("constant", "| constant"), ("planned", "| planned"), ("adaptive", "| ada")):
        runs = [run for run in schedules["runs"] if run["how"] == how]
        losses = " | ".join(f"{run['loss']:.3f}" for run in runs)
        (line,) = [line for line in TEXT.splitlines() if line.startswith(start)]
        assert line.endswith(f"| {runs[0]['epsilon']:.2f} | {runs[0]['steps']} | {losses} |")
        assert all(run["epsilon"] <= schedules["epsilon"] for run in runs)


def test_every_preset_is_listed():
    for path in (ROOT / "configs" / "policies").glob("*.toml"):
        if path.stem != "regions":
            assert f"| `{path.stem}`" in TEXT
