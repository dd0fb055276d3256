"""``dpfa audit``: what it prints, writes and exits with."""

import json
import re

import dp_accounting
import numpy as np
import pytest

from dpfa_jax import cli
from dpfa_jax.audit import attention_cases, engines, judge, sampled_cases, suite, training_cases
from dpfa_jax.mechanisms import attention as sensitivity


@pytest.fixture
def few(monkeypatch):
    """One case of each kind, so that the command takes seconds."""
    attention = suite.attention_cases()[:1]
    monkeypatch.setattr(type(attention[0]), "implementations", lambda self: ("xla",))
    monkeypatch.setattr(suite, "attention_cases", lambda: attention)
    monkeypatch.setattr(suite, "training_cases", lambda: training_cases()[:1])
    monkeypatch.setattr(suite, "engines", lambda: ("vmap",))
    monkeypatch.setattr(suite, "sampled_cases", lambda: ())


@pytest.mark.usefixtures("few")
def test_a_clean_run(tmp_path, capsys):
    """4,000 samples at 1 − 10⁻⁹: a false alarm below 10⁻⁸ (the keys are not fixed here)."""
    page, figures = tmp_path / "new" / "audit.html", tmp_path / "audit.json"
    argv = ["audit", "--samples", "4000", "--confidence", "0.999999999"]
    assert cli.main([*argv, "--json", str(figures), "--html", str(page)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == "2 claims attacked, 0 failed."
    facts = json.loads(figures.read_text())
    assert facts["passed"] is True
    assert facts["command"].startswith("dpfa audit --samples 4000")
    assert [r["name"] for r in facts["results"]] == [
        "record, add_remove, one row, xla",
        "training, add_remove, one step, vmap",
    ]
    for line, result in zip(printed, facts["results"], strict=False):
        assert line.startswith(f"holds     {result['name']}: ")
        assert f"epsilon at least {result['epsilon_lower_bound']:.3f}" in line
        assert 0 < result["epsilon_lower_bound"] < result["epsilon_claimed"]
        assert (result["samples"], result["counted"]) == (4000, [3600, 3600])
    text = page.read_text()
    assert "All 2 claims hold" in text
    assert text.count("<figure>") == 2
    assert "http" not in re.sub(r"base64,[^\"]*", "", text)  # loads nothing from elsewhere


@pytest.mark.usefixtures("few")
def test_a_broken_claim_is_exit_status_one(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        sensitivity.RecordSensitivity, "numerator_std", lambda self, z: z * self.joint / 8
    )
    page = tmp_path / "audit.html"
    argv = ["audit", "--only", "attention", "--samples", "1000", "--html", str(page)]
    assert cli.main(argv) == 1
    out = capsys.readouterr().out
    assert out.startswith("broken    record, add_remove, one row, xla: ")
    assert "1 of 1 claims FAIL: record, add_remove, one row, xla" in page.read_text()


@pytest.mark.usefixtures("few")
def test_a_refusal_is_reported_and_claims_nothing(monkeypatch, capsys, tmp_path):
    tied = next(case for case in training_cases() if case.is_tied)
    monkeypatch.setattr(suite, "training_cases", lambda: (tied,))

    def refuse(*args, **kwargs):
        raise ValueError("no rule for this <loss>")

    monkeypatch.setattr(suite, "audit_training", refuse)
    argv = ["audit", "--only", "training", "--html", str(tmp_path / "audit.html")]
    assert cli.main(argv) == 0
    assert f"refused   {tied.name}, vmap: no rule" in capsys.readouterr().out
    # Any other loss is one that every engine must take.
    monkeypatch.setattr(suite, "training_cases", lambda: training_cases()[:1])
    with pytest.raises(ValueError, match="no rule"):
        list(suite.run_audits(only="training"))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--samples", "19"),
        ("--samples", "1e4"),
        ("--delta", "0"),
        ("--delta", "nan"),
        ("--confidence", "1"),
        ("--confidence", "99"),
        ("--only", "everything"),
        ("--jobs", "0"),
    ],
)
def test_bad_options(option, value, capsys):
    with pytest.raises(SystemExit) as exit_status:
        cli.main(["audit", option, value])
    assert exit_status.value.code == 2
    error = capsys.readouterr().err
    assert option in error
    assert value in error


def test_a_path_that_cannot_be_written_is_found_before_the_work(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["audit", "--json", str(tmp_path / "file" / "audit.json")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_name_that_is_not_there_or_does_not_run_here(capsys):
    assert cli.main(["audit", "--implementation", "cuda"]) == 2
    assert "implementations='cuda': allowed are" in capsys.readouterr().err
    argv = ["audit", "--only", "attention", "--implementation", "vmap"]
    assert cli.main(argv) == 2
    assert "implementations=['vmap']: none of them runs here" in capsys.readouterr().err


def test_options_are_checked():
    with pytest.raises(ValueError, match="only='all'"):
        suite.run_audits(only="all")
    for jobs in (0, 1.0, True):
        with pytest.raises(ValueError, match="jobs"):
            suite.run_audits(jobs=jobs)


@pytest.mark.usefixtures("few")
def test_audits_in_threads_are_those_in_a_row_and_keep_their_order():
    options = {"samples": 100, "implementations": ["xla", "vmap"]}
    names = [f.name for f in suite.run_audits(jobs=1, **options)]
    found = list(suite.run_audits(jobs=2, **options))
    assert [f.name for f in found] == names
    assert len(names) == 2
    assert all(f.result.samples == 100 for f in found)
    assert next(suite.run_audits(jobs=2, **options)).name == names[0]  # and stops early


def test_everything_that_runs_here_is_attacked(monkeypatch):
    seen = []
    scores = np.zeros(100)
    event = dp_accounting.GaussianDpEvent(1.0)
    result = judge("a test", event, "add_remove", scores, scores)

    def record(case, **options):
        seen.append((case.name, options.get("engine", options.get("implementation"))))
        return result

    monkeypatch.setattr(suite, "audit_attention", record)
    monkeypatch.setattr(suite, "audit_training", record)
    monkeypatch.setattr(suite, "audit_sampled", record)
    monkeypatch.setattr(suite, "training_cases", lambda: training_cases()[:2])
    monkeypatch.setattr(suite, "attention_cases", lambda: attention_cases()[:2])
    list(suite.run_audits(samples=20))
    expected = [(c.name, name) for c in attention_cases()[:2] for name in c.implementations()]
    expected += [(c.name, engine) for c in training_cases()[:2] for engine in engines()]
    expected += [(case.name, "auto") for case in sampled_cases()]
    assert seen == expected
    assert "vmap" in engines()
    assert "auto" not in engines()
