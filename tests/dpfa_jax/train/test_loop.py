"""Runs in this process: what they write, resume, refuse and charge."""

import json
import re
import shutil

import dp_accounting
import jax
import numpy as np
import pytest
from small_runs import small, to_toml

from dpfa_jax import cli, keys
from dpfa_jax.accounting import Accountant
from dpfa_jax.ledger import BudgetExceededError, Ledger
from dpfa_jax.train import loop
from dpfa_jax.train.config import parse_config
from dpfa_jax.train.schema import ConfigError
from dpfa_jax.train.state import Checkpoints

REQUIRED = {
    "unit",
    "adjacency",
    "target_epsilon",
    "epsilon",
    "delta",
    "noise_multiplier",
    "sampling_probability",
    "steps",
    "validation_loss",
    "unigram_loss",
    "nonprivate_validation_loss",
    "accountant",
    "key_source",
}


@pytest.fixture(autouse=True)
def _no_strict_promotion_in_libraries():
    # The optimiser library's schedules mix Python and array numbers.
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    with jax.numpy_dtype_promotion("standard"):
        report = loop.run(parse_config(small()), run_dir)
    return run_dir, report


def test_report_has_every_promised_field(finished):
    run_dir, report = finished
    assert set(report) >= REQUIRED
    assert json.loads((run_dir / "report.json").read_text()) == report
    assert report["unit"] == "user"
    assert report["nonprivate_validation_loss"] is None
    assert report["steps"] == report["steps_charged"] == 12
    assert report["key_source"] == "operating system (256 bit)"
    assert report["starts"] == 1
    assert 0 < report["validation_loss"] < 5


def test_epsilon_is_within_target_and_not_wasted(finished):
    _, report = finished
    assert report["epsilon"] <= report["target_epsilon"]
    assert report["epsilon"] > 0.99 * report["target_epsilon"]


def test_epsilon_can_be_rederived_from_the_report_alone(finished, capsys):
    _, report = finished
    exec(report["rederive_epsilon"], {})
    assert float(capsys.readouterr().out) == pytest.approx(report["epsilon"], rel=1e-9)


def test_ledger_holds_every_step_once(finished):
    run_dir, report = finished
    ledger = Ledger(run_dir / "ledger.sqlite")
    scope = f"run {report['config_fingerprint']}"
    charges = ledger.charges(scope)
    assert all(c.released for c in charges)
    assert [c.label for c in charges] == [f"steps {i} to {i + 1}" for i in range(0, 12, 2)]
    assert all(c.event.count == 2 for c in charges)
    event = charges[0].event.event
    assert isinstance(event, dp_accounting.TruncatedSubsampledGaussianDpEvent)
    assert event.sampling_probability == 20 / 1044
    assert event.dataset_size == 1045
    assert event.truncated_batch_size == 40
    assert event.noise_multiplier == report["noise_multiplier"]
    assert ledger.spent(scope) == report["epsilon"]
    expected = Accountant("add_remove").compose(event, 12).epsilon(9e-5)
    assert report["epsilon"] == pytest.approx(expected, rel=1e-12)


def test_html_is_self_contained_and_states_the_guarantee(finished):
    run_dir, report = finished
    page = (run_dir / "report.html").read_text()
    assert "data:image/svg+xml;base64," in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "Adding or removing all messages of one user (add_remove)" in page
    assert f"ε = {report['epsilon']:.3f}" in page


def test_second_call_changes_nothing(finished, monkeypatch):
    run_dir, report = finished
    before = {p: p.stat().st_mtime_ns for p in run_dir.rglob("*") if p.is_file()}
    before.pop(run_dir / "lock")
    monkeypatch.setattr(loop, "_train_private", lambda *_: pytest.fail("it trained again"))
    assert loop.run(parse_config(small()), run_dir) == report
    assert all(p.stat().st_mtime_ns == t for p, t in before.items())


def test_another_configuration_is_refused(finished):
    run_dir, _ = finished
    with pytest.raises(ConfigError, match="holds a run of another configuration"):
        loop.run(parse_config(small(training__steps=14)), run_dir)


def test_no_noise_key_reaches_the_disk(tmp_path, monkeypatch):
    """Every word of every key of the run is looked for in every file of the run."""
    seen = []
    original = loop._start_key

    def spy(config, run_dir):
        key, source, fingerprint = original(config, run_dir)
        seen.append(np.asarray(jax.random.key_data(key)))
        seen.extend(np.asarray(jax.random.key_data(jax.random.fold_in(key, i))) for i in range(3))
        return key, source, fingerprint

    monkeypatch.setattr(loop, "_start_key", spy)
    config = parse_config(small(training__steps=2, training__checkpoint_every=1))
    loop.run(config, tmp_path / "run")
    files = [p for p in (tmp_path / "run").rglob("*") if p.is_file()]
    assert len(files) > 5
    for path in files:
        raw = path.read_bytes()
        for words in seen:
            for word in words:
                assert word.tobytes() * 2 not in raw
            assert words.tobytes()[:8] not in raw
            assert words.tobytes().hex()[:16].encode() not in raw


class _Crash(Exception):
    pass


def _crash_at(monkeypatch, step):
    """Raises in the middle of step number ``step``."""
    original = loop._Batches.__getitem__

    def getitem(self, i):
        if i == step:
            raise _Crash
        return original(self, i)

    monkeypatch.setattr(loop._Batches, "__getitem__", getitem)
    return original


@pytest.mark.parametrize("crash_step", [1, 7])
def test_crash_and_resume_end_with_the_same_accounting(tmp_path, monkeypatch, finished, crash_step):
    """And the second start goes on from the checkpoint, not from scratch."""
    run_dir = tmp_path / "run"
    config = parse_config(small())
    original = _crash_at(monkeypatch, crash_step)
    with pytest.raises(_Crash):
        loop.run(config, run_dir)
    scope = f"run {config.fingerprint}"
    charged = Ledger(run_dir / "ledger.sqlite").charges(scope)
    # Charged before it ran: the block that crashed is in the ledger.
    done = crash_step // 2 * 2
    assert sum(c.event.count for c in charged) == done + 2

    sampled = []

    def getitem(self, i):
        sampled.append(i)
        return original(self, i)

    monkeypatch.setattr(loop._Batches, "__getitem__", getitem)
    restored = []
    restore = Checkpoints.restore

    def spy(self, params, state):
        out = restore(self, params, state)
        restored.append((params, (*out[:3], list(out[3]))))
        return out

    monkeypatch.setattr(Checkpoints, "restore", spy)
    report = loop.run(config, run_dir)
    assert sampled == list(range(done, 12))
    ((fresh, (step, params, state, history)),) = restored
    assert step == done
    assert [h["step"] for h in history] == list(range(2, done + 1, 2))
    assert int(state[0].step) == done
    moved = [
        np.abs(a - b).max()
        for a, b in zip(jax.tree.leaves(fresh), jax.tree.leaves(params), strict=True)
    ]
    assert (max(moved) > 0) == (done > 0)

    _, whole = finished
    for key in ("epsilon", "steps", "steps_charged", "noise_multiplier", "delta"):
        assert report[key] == whole[key], key
    assert report["starts"] == 2
    starts = json.loads((run_dir / "starts.json").read_text())
    assert len({s["key_fingerprint"] for s in starts}) == 2
    after = Ledger(run_dir / "ledger.sqlite").charges(scope)
    assert [c[:3] for c in after[: len(charged)]] == [c[:3] for c in charged]


def test_nothing_is_shown_before_its_checkpoint_commits(tmp_path, monkeypatch, capsys):
    def refuse(*_args, **_kwargs):
        raise _Crash

    monkeypatch.setattr(Checkpoints, "save", refuse)
    with pytest.raises(_Crash):
        loop.run(parse_config(small()), tmp_path / "run")
    assert "validation loss" not in capsys.readouterr().out


def test_nothing_is_released_when_the_budget_refuses(tmp_path, monkeypatch):
    """A smaller budget than the plan's: the block that does not fit never runs."""
    original = Ledger.open_budget

    def half(self, scope, *, epsilon, **rest):
        original(self, scope, epsilon=epsilon / 2, **rest)

    monkeypatch.setattr(Ledger, "open_budget", half)
    ran = []
    getitem = loop._Batches.__getitem__
    monkeypatch.setattr(
        loop._Batches, "__getitem__", lambda self, i: (ran.append(i), getitem(self, i))[1]
    )
    with pytest.raises(BudgetExceededError, match="Nothing was charged or released"):
        loop.run(parse_config(small()), tmp_path / "run")
    config = parse_config(small())
    ledger = Ledger(tmp_path / "run" / "ledger.sqlite")
    charged = sum(c.event.count for c in ledger.charges(f"run {config.fingerprint}"))
    assert len(ran) == charged < 12
    assert ledger.spent(f"run {config.fingerprint}") <= config.privacy.epsilon / 2
    assert not (tmp_path / "run" / "report.json").exists()


def test_reproducible_seed_repeats_and_is_called_not_private(tmp_path):
    config = parse_config(
        small(privacy__reproducible_seed=5, training__steps=2, model__flax_api="nnx")
    )
    with keys.allow_reuse_for_tests():
        a = loop.run(config, tmp_path / "a")
        b = loop.run(config, tmp_path / "b")
    assert a["validation_loss"] == b["validation_loss"]
    assert "NOT PRIVATE" in a["key_source"]
    assert "protects nobody" in (tmp_path / "a" / "report.html").read_text()
    other = parse_config(
        small(privacy__reproducible_seed=6, training__steps=2, model__flax_api="nnx")
    )
    assert loop.run(other, tmp_path / "c")["validation_loss"] != a["validation_loss"]


def test_message_unit_and_comparison(tmp_path):
    table = small(
        privacy__unit="message",
        data__population=220349,
        data__max_chunks_per_user=...,
        privacy__delta=4e-7,
        training__steps=2,
        training__expected_batch_size=400,
        training__padded_batch_size=500,
        training__microbatch_size=250,
        report__release_nonprivate_comparison=True,
        report__nonprivate_learning_rate=0.01,
    )
    config = parse_config(table)
    report = loop.run(config, tmp_path / "run")
    assert report["unit"] == "message"
    assert report["nonprivate_validation_loss"] > 0
    assert "one message" in report["guarantee"]
    assert "without privacy on the same data" in report["guarantee"]


def test_a_second_process_in_the_same_directory_is_refused(tmp_path, capsys):
    path = tmp_path / "c.toml"
    path.write_text(to_toml(small()))
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with loop.locked(run_dir):
        assert cli.main(["train", str(path), "--run-dir", str(run_dir)]) == 2
    assert "another process" in capsys.readouterr().err


def test_old_checkpoints_and_none_buy_no_second_release(tmp_path, capsys):
    """What was spent stands in the ledger, whatever a person does to the checkpoints."""
    path = tmp_path / "c.toml"
    path.write_text(to_toml(small(training__steps=4)))
    arguments = ["train", str(path), "--run-dir", str(tmp_path / "run")]
    assert cli.main(arguments) == 0
    (tmp_path / "run" / "report.json").unlink()
    checkpoints = tmp_path / "run" / "checkpoints"
    assert {p.name for p in checkpoints.iterdir()} >= {"2", "4"}
    for gone in (checkpoints / "4", checkpoints):
        shutil.rmtree(gone)
        capsys.readouterr()
        assert cli.main(arguments) == 2
        out, err = capsys.readouterr()
        assert "was charged and released before" in err
        assert "validation loss" not in out


def test_a_diverged_block_is_a_release_and_is_not_run_again(tmp_path, capsys):
    path = tmp_path / "c.toml"
    path.write_text(to_toml(small(training__learning_rate=1e38)))
    arguments = ["train", str(path), "--run-dir", str(tmp_path / "run")]
    for _ in range(2):
        assert cli.main(arguments) == 2
        assert "training.learning_rate: training diverged" in capsys.readouterr().err
    fingerprint = parse_config(small(training__learning_rate=1e38)).fingerprint
    charges = Ledger(tmp_path / "run" / "ledger.sqlite").charges(f"run {fingerprint}")
    assert [(c.label, c.released) for c in charges] == [("steps 0 to 1", True)]


def test_a_crash_between_commit_and_note_is_no_second_release(tmp_path, monkeypatch):
    def crash(self, scope, label):
        raise _Crash

    config = parse_config(small(training__steps=4))
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "mark_released", crash)
        with pytest.raises(_Crash):
            loop.run(config, tmp_path / "run")
    sampled = []
    original = loop._Batches.__getitem__
    monkeypatch.setattr(
        loop._Batches, "__getitem__", lambda self, i: (sampled.append(i), original(self, i))[1]
    )
    report = loop.run(config, tmp_path / "run")
    assert sampled == [2, 3]
    assert report["steps_charged"] == 4
    charges = Ledger(tmp_path / "run" / "ledger.sqlite").charges(f"run {config.fingerprint}")
    assert all(c.released for c in charges)
