"""The README's code runs, and its numbers are those of a committed report."""

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_it_shows_code():
    assert len(BLOCKS) == 2


def test_the_training_loop_learns_and_the_attention_tells_its_cost(tmp_path):
    """In one fresh process, the names of each block by themselves."""
    error = "jnp.abs(params['params']['kernel'][:, 0] - jnp.arange(8.0)).mean()"
    blocks = [BLOCKS[1], f"{BLOCKS[0]}\nprint(float({error}))\n"]
    code = f"for block in {blocks!r}:\n    exec(block, {{}})\n"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    cost, found = done.stdout.splitlines()
    assert re.fullmatch(r"epsilon = \d\.\d\d", cost)
    assert float(found) < 0.5 * 3.5


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", README):
        assert (ROOT / target).exists(), target


def test_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make (\w+)`?", README):
        if target != "any":
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def _row(start):
    (line,) = [line for line in README.splitlines() if line.startswith(start)]
    return [cell.strip(" *") for cell in line.strip("|").split("|")]


def test_figures_are_those_of_the_committed_results():
    path = ROOT / "benchmarks" / "results" / "2026-11-22_cpu_demo.json"
    results = json.loads(path.read_text())
    for unit, start in (("user_level", "| all messages"), ("message_level", "| one message")):
        found = results[unit]
        losses = ("validation_loss", "nonprivate_validation_loss", "unigram_loss")
        expected = [f"{found['epsilon']:.2f}", f"{found['delta']:.1e}".replace("e-0", "e-")]
        expected += [f"{found[name]:.3f}" for name in losses]
        assert _row(start)[1:] == expected
        assert found["epsilon"] <= found["target_epsilon"] == 8.0
        assert found["key_source"] == "operating system (256 bit)"
    user = results["user_level"]
    assert user["unigram_loss"] - user["validation_loss"] >= 0.3
    retrieval = results["retrieval"]
    accuracy = [row["accuracy"] for row in retrieval["rows"]]
    accuracy += [retrieval["majority_accuracy"], retrieval["reference_accuracy"]]
    assert _row("| accuracy")[1:] == [f"{x:.3f}" for x in accuracy]


# Three runs of one forward kernel; the last one also of the backward kernels as they are.
RUNS = [f"2026-11-24_h100_attention{x}" for x in ("", "_dq", "_held")]
FIRST, LAST = RUNS[0], RUNS[-1]


def _attention_cells(run, direction):
    """Measured cells of the committed run, and each version of a cell by its name."""
    path = ROOT / "benchmarks" / "results" / f"{run}.json"
    cells = [c for c in json.loads(path.read_text())["cells"] if c["direction"] == direction]
    return [(c, {v["name"]: v for v in c["versions"]}) for c in cells if c["baseline"]]


def _ratio(cell, versions, name="dpfa ChaCha8"):
    """Against the fastest JAX peer, which is looked up in the medians again."""
    peers = [v for v in versions.values() if v["family"] == "jax"]
    fastest = min(peers, key=lambda v: v["median_ms"])["name"]
    assert fastest == cell["baseline"]
    found = versions[name]["ratios"][fastest]
    medians = versions[fastest]["median_ms"] / versions[name]["median_ms"]
    assert abs(found["ratio"] - medians) < 1e-9
    return found


def test_attention_ratios_are_those_of_the_committed_runs():
    text = " ".join(README.split())
    forward, both = "forward", "forward+backward"
    for run, direction, start, lengths in (
        (FIRST, forward, "attention with ChaCha8 runs at", (1024, 4096, 16384, 65536)),
        (LAST, forward, "of the same kernel was at", (1024, 4096, 16384, 65536)),
        (LAST, both, "Training through it, forward and backward, is at", (4096, 16384, 65536)),
    ):
        ratios = {}
        for cell, versions in _attention_cells(run, direction):
            shape = cell["shape"]
            if shape["head_dim"] == 128:
                ratio = f"{_ratio(cell, versions)['ratio']:.2f}"
                ratios[shape["length"], shape["is_causal"]] = ratio
        full, causal = re.search(re.escape(start) + r" (.*?)causal at (.*?) \(\[", text).groups()
        keys = re.findall(r"(\d\.\d\d) \((\d+)(?: keys)?\)", full)
        assert keys == [(ratios[t, False], str(t)) for t in lengths]
        found = re.findall(r"\d\.\d\d", causal)
        assert found == [ratios[t, True] for t in lengths]


def _rows_of(run, direction, names):
    rows = set()
    for cell, versions in _attention_cells(run, direction):
        shape = cell["shape"]
        ms = versions[cell["baseline"]]["median_ms"]
        row = [", ".join(str(shape[k]) for k in ("batch", "length", "heads", "head_dim"))]
        row += ["yes" if shape["is_causal"] else "no", cell["baseline"]]
        row.append(f"{ms:.{3 if ms < 1 else 2 if ms < 10 else 1}f}")
        for name in names:
            ratio = _ratio(cell, versions, name)
            low, high = ratio["interval"]
            row.append(f"{ratio['ratio']:.2f} [{low:.2f}, {high:.2f}]")
        rows.add(tuple(row))
    return rows


def test_the_tables_of_the_kernels_are_those_of_the_committed_runs():
    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    tables = []
    for part in page.split("| B, T, N, D |")[1:]:
        lines = part.split("\n\n")[0].splitlines()[2:]
        tables.append({tuple(x.strip() for x in line.strip("|").split("|")) for line in lines})
    forward, backward = tables
    versions = ("ChaCha8", "ChaCha20", "ChaCha8, norms", "exact")
    both = ("ChaCha8", "ChaCha8, norms", "exact")
    assert forward == _rows_of(FIRST, "forward", [f"dpfa {v}" for v in versions])
    assert backward == _rows_of(LAST, "forward+backward", [f"dpfa {v}" for v in both])


def test_the_table_of_bars_is_that_of_the_committed_runs():
    """Figures of the targets, and which of them are missed."""
    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    lines = page.split("| bar | must reach |")[1].split("\n\n")[0].splitlines()[2:]
    bars = [[x.strip() for x in line.strip("|").split("|")] for line in lines]
    forward = []
    for run in RUNS:
        path = ROOT / "benchmarks" / "results" / f"{run}.json"
        targets = json.loads(path.read_text())["targets"]
        forward.append([t for t in targets if t["direction"] == "forward" and t["must"]])
    musts = [t["must"] for t in forward[0]]
    assert [float(x) for bar in bars for x in re.findall(r"\d\.\d+", bar[1])] == musts
    for column, targets in zip((2, 3, 4), forward, strict=True):
        found = [x.strip() for bar in bars for x in bar[column].split(";")]
        for figure, target in zip(found, targets, strict=True):
            measured = min(x["ratio"] for x in target["shapes"] if x["ratio"] is not None)
            missed = " missed" if measured < target["must"] else ""
            assert figure == f"{measured:.3f}{missed}", target["name"]
