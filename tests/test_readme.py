"""The README's code runs, and its numbers are those of a committed report."""

import json
import re
import subprocess
import sys
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_it_shows_code():
    assert len(BLOCKS) == 2


def run(code, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_training_loop_runs_and_learns(tmp_path):
    error = "jnp.abs(params['params']['kernel'][:, 0] - jnp.arange(8.0)).mean()"
    assert float(run(f"{BLOCKS[0]}\nprint(float({error}))\n", tmp_path)) < 0.5 * 3.5


def test_the_attention_runs_and_tells_its_cost(tmp_path):
    assert re.fullmatch(r"epsilon = \d\.\d\d\n", run(BLOCKS[1], tmp_path))


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", README):
        assert (Path(__file__).parents[1] / target).exists(), target


def test_commands_exist():
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    for target in re.findall(r"`?make (\w+)`?", README):
        if target != "any":
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def _row(start):
    (line,) = [line for line in README.splitlines() if line.startswith(start)]
    return [cell.strip(" *") for cell in line.strip("|").split("|")]


def test_figures_are_those_of_the_committed_results():
    path = Path(__file__).parents[1] / "benchmarks" / "results" / "2026-11-22_cpu_demo.json"
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
