"""``dpfa budget``, as a person and as a program use it."""

import contextlib
import json
import math
import sqlite3

import dp_accounting
import pytest

from dpfa_jax import Accountant, Ledger, PoissonSampler, SecureKey, budget_cli, cli
from dpfa_jax.cli import main

Gaussian = dp_accounting.GaussianDpEvent
WORDS = ("--delta", "1e-6", "--adjacency", "add_remove", "--unit", "user")


@pytest.fixture(autouse=True)
def _english(monkeypatch):
    for name in ("LC_ALL", "LC_MESSAGES", "LANG", "LANGUAGE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "l.sqlite")


def test_new_show_verify_export(path, tmp_path, capsys):
    new = ["budget", "new", path]
    level = ["--level", "tenant", "--region", "eu-west-1"]
    assert main([*new, "t", "--epsilon", "1", *level, *WORDS]) == 0
    assert "No law sets ε" in capsys.readouterr().out
    assert main([*new, "r", "--epsilon", "1", "--parent", "t", *WORDS]) == 0
    Ledger(path).charge("r", "a", Gaussian(8.0))
    capsys.readouterr()

    assert main(["budget", "show", path]) == 0
    shown = capsys.readouterr().out
    assert "  r" in shown
    assert "gdpr" in shown
    assert main(["budget", "show", path, "--json", "--scope", "r"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["scopes"]
    assert row["spent"] == Accountant("add_remove").compose(Gaussian(8.0)).epsilon(1e-6)
    assert row["left"] == 1 - row["spent"]
    assert row["parent"] == "t"

    assert main(["budget", "verify", path, "--json"]) == 0
    head = json.loads(capsys.readouterr().out)
    assert head["entries"] == 4
    receipt = f"{head['number']}:{head['hash']}"
    assert main(["budget", "verify", path, "--receipt", receipt]) == 0
    assert receipt in capsys.readouterr().out

    assert main(["budget", "export", path, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["entries"]) == 4
    out = tmp_path / "out.csv"
    assert main(["budget", "export", path, "--out", str(out)]) == 0
    assert len(out.read_text().splitlines()) == 5

    assert main([*new, "r", "--epsilon", "0.9", "--reason", "less"]) == 0
    assert Ledger(path).budget("r").epsilon == 0.9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["new", "PATH", "s", "--epsilon", "1"], "--delta, --adjacency, --unit: needed"),
        (["new", "PATH", "s", "--epsilon", "-1", *WORDS], "epsilon=-1.0"),
        (["new", "PATH", "known", "--epsilon", "2"], "reason='': allowed is a text"),
        (["new", "PATH", "known", "--unit", "u", "--reason", "x"], "--unit: allowed for a new"),
        (["new", "PATH", "s", "--epsilon", "8", "--region", "eu-west-1", *WORDS],
         "policy gdpr, rule epsilon: 8 was asked, allowed is 1"),
        (["show", "NOTHING"], "NOTHING: cannot be used"),
        (["show", "PATH", "--scope", "x"], "no budget was opened"),
        (["verify", "PATH", "--receipt", "7"], "--receipt 7: allowed is NUMBER:HASH"),
        (["verify", "PATH", "--receipt", "1:" + "0" * 64], "An old copy was restored"),
    ],
    ids=lambda x: " ".join(x)[:30] if isinstance(x, list) else "",
)  # fmt: skip
def test_refusals_are_one_line(path, tmp_path, capsys, arguments, message):
    main(["budget", "new", path, "known", "--epsilon", "1", *WORDS])
    capsys.readouterr()
    places = {"PATH": path, "NOTHING": str(tmp_path / "NOTHING")}
    assert main(["budget", *(places.get(a, a) for a in arguments)]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "NOTHING").exists()


def test_a_refusal_in_the_readers_language(path, capsys, monkeypatch):
    main(["budget", "new", path, "s", "--epsilon", "1", *WORDS])
    capsys.readouterr()
    monkeypatch.setenv("LANG", "de_DE.UTF-8")
    assert main(["budget", "show", path, "--scope", "x"]) == 2
    assert "kein Budget eröffnet" in capsys.readouterr().err
    assert main(["budget", "show", path, "--scope", "x", "--language", "ja"]) == 2
    assert "予算は開かれていません" in capsys.readouterr().err


def test_a_damaged_record_says_how_soon_to_report(path, capsys):
    main(["budget", "new", path, "s", "--epsilon", "1", "--region", "eu-west-1", *WORDS])
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.executescript("DROP TRIGGER ledger_no_update; UPDATE ledger_head SET number = 0")
    assert main(["budget", "verify", path]) == 2
    assert "is not what was written" in capsys.readouterr().err


PLAN = ["budget", "plan", "--population", "2000", "--batch-size", "100", "--steps", "60",
        "--delta", "1e-6", "--adjacency", "add_remove"]  # fmt: skip


def test_plan_answers_what_the_accountant_answers(capsys, tmp_path, path):
    main(["budget", "new", path, "s", "--epsilon", "8", *WORDS])
    capsys.readouterr()
    plot = tmp_path / "plan.png"
    more = ["--plot", str(plot), "--ledger", path, "--scope", "s", "--json"]
    assert main([*PLAN, "--noise-multiplier", "1.1", *more]) == 0
    out = json.loads(capsys.readouterr().out)
    event = dp_accounting.PoissonSampledDpEvent(0.05, Gaussian(1.1))
    exact = Accountant("add_remove").compose(event, 60).epsilon(1e-6)
    assert out["epsilon"] == exact == out["what_if"]["s"]
    for name, points in out["curves"].items():
        values = [y for _, y in points]
        assert values == sorted(values, reverse=name == "noise multiplier")
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert [e.kind for e in Ledger(path).entries()] == ["ledger", "budget"]  # nothing charged


def test_answers_are_json_also_where_epsilon_is_infinite():
    plain = budget_cli._finite(
        {"epsilon": math.inf, "curves": {"steps": [[1, math.inf], [2, 3.5]]}}
    )
    assert plain == {"epsilon": None, "curves": {"steps": [[1, None], [2, 3.5]]}}
    json.dumps(plain, allow_nan=False)


def test_plan_finds_the_noise(capsys):
    assert main([*PLAN, "--epsilon", "2"]) == 0
    assert "spends ε = 2 at δ = 1E-6 in 60 steps" in capsys.readouterr().out


def test_a_padded_plan_costs_what_the_sampler_says():
    options = [*PLAN, "--noise-multiplier", "1.1", "--padded-batch-size", "140"]
    sampler = PoissonSampler(2000, 0.05, 140, SecureKey.generate())
    args = cli._parser().parse_args(options)
    assert budget_cli._event(args, 1.1, 100) == sampler.event(1.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--batch-size", "3000"], "--batch-size 3000: allowed is at most"),
        (["--steps", "0"], "--steps 0"),
        (["--delta", "2"], "--delta 2.0"),
        (["--ledger", "x"], "--ledger, --scope"),
        (["--noise-multiplier", "nan"], "--noise-multiplier nan"),
    ],
)
def test_plan_refuses(change, message, capsys):
    noise = [] if "--noise-multiplier" in change else ["--noise-multiplier", "1"]
    assert main([*PLAN, *noise, *change]) == 2
    assert message in capsys.readouterr().err


def test_bench_ledger(tmp_path, capsys, monkeypatch):
    from dpfa_jax.bench import ledger

    monkeypatch.setattr(ledger, "_IDENTICAL", 1000)
    monkeypatch.setattr(ledger, "_DIFFERENT", 20)
    out = tmp_path / "b.json"
    assert main(["bench", "ledger", "--charges", "100", "--folder", str(tmp_path),
                 "--json", str(out)]) == 0  # fmt: skip
    result = json.loads(out.read_text())
    assert [c["scopes"] for c in result["charges"]] == [1, 4]
    assert all(len(c["samples_ms"]) == 100 for c in result["charges"])
    assert "charge, 4 nested scope(s): median" in capsys.readouterr().out
    assert main(["bench", "ledger", "--charges", "5"]) == 2
