"""``dpfa audit CONFIG``: a configuration's claim, canaries and secrets in a tiny model."""

import json

import jax
import numpy as np
import pytest
from small_runs import small, to_toml

from dpfa_jax import cli, keys
from dpfa_jax.audit import chat, configured
from dpfa_jax.train import data, loop
from dpfa_jax.train.config import parse_config
from dpfa_jax.train.schema import ConfigError

COMPARED = {"release_nonprivate_comparison": True, "nonprivate_learning_rate": 0.02}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    for module in (chat, configured):
        monkeypatch.setattr(module, "calibrate_noise_multiplier", lambda *_, **__: 1.5)
    monkeypatch.setattr(chat, "CANARIES", 40)
    monkeypatch.setattr(chat, "WRITERS", (0, 2))
    monkeypatch.setattr(chat, "SECRETS_EACH", 2)
    monkeypatch.setattr(chat, "_SAMPLED_CODES", 127)
    with jax.numpy_dtype_promotion("standard"):  # the optimiser library's schedules
        yield


@pytest.mark.slow
def test_a_configuration_from_the_command_line(tmp_path, capsys):
    """12 steps, 400 samples, 40 canaries: what it prints and writes, not whether it finds."""
    path, page, figures = (tmp_path / n for n in ("c.toml", "audit.html", "audit.json"))
    path.write_text(to_toml(small(report=COMPARED)))
    argv = ["audit", str(path), "--samples", "400", "--confidence", "0.999999999"]
    status = cli.main([*argv, "--html", str(page), "--json", str(figures)])
    printed = capsys.readouterr().out
    facts = json.loads(figures.read_text())
    assert status == (0 if facts["passed"] else 1)
    assert facts["results"][0]["verdict"] == "holds"
    assert facts["results"][0]["adjacency"] == "add_remove"
    run = facts["one_run"]
    assert run["guesses"]["canaries"] == 40
    assert len(run["scores_joined"]) + len(run["scores_absent"]) == 40
    assert [s["writers"] for s in facts["secrets"]] == [0, 0, 2, 2]
    for secret in facts["secrets"]:
        assert 0 <= secret["exposure"] <= 7
        assert 0 <= secret["exposure_without_privacy"] <= 7
        assert len(secret["code"]) == 6
    assert "secrets of 2 units: exposure" in printed
    text = page.read_text()
    assert "The trained model" in text
    assert text.count("<figure>") == 2


def test_without_the_owners_leave_no_model_is_trained(tmp_path, capsys, monkeypatch):
    """Reads no private data either."""

    def refuse(*_):
        raise AssertionError("private data was read")

    monkeypatch.setattr(data, "read_chitchat", refuse)
    with pytest.raises(ConfigError, match=r"report\.release_nonprivate_comparison = false"):
        chat.audit_chat(parse_config(small()), rng=keys.SecureKey.generate())
    path = tmp_path / "c.toml"
    path.write_text(to_toml(small(training__steps=2)))
    assert cli.main(["audit", str(path), "--samples", "40"]) == 0
    assert "was not attacked" in capsys.readouterr().out


@pytest.mark.parametrize(
    "option",
    [
        ("--only", "training"),
        ("--implementation", "xla"),
        ("--jobs", "1"),
        ("--delta", "1e-5"),
    ],
)
def test_options_that_a_configuration_has_no_use_for_are_refused(option, tmp_path, capsys):
    path, figures = tmp_path / "c.toml", tmp_path / "new" / "audit.json"
    path.write_text(to_toml(small(training__steps=2)))
    assert cli.main(["audit", str(path), *option, "--json", str(figures)]) == 2
    assert capsys.readouterr().err == f"dpfa: {option[0]}: not with a configuration.\n"
    assert not figures.parent.exists()


def test_a_bad_configuration_leaves_no_files(tmp_path, capsys):
    path, figures, page = (tmp_path / n for n in ("c.toml", "audit.json", "audit.html"))
    path.write_text(to_toml(small(privacy__epsilon=-3.0)))
    assert cli.main(["audit", str(path), "--json", str(figures), "--html", str(page)]) == 2
    assert "privacy.epsilon = -3.0" in capsys.readouterr().err
    assert not figures.exists()
    assert not page.exists()


def test_what_is_planted():
    """Canaries by their coins, each secret as often as said, all in units of their own."""
    config = parse_config(small(report=COMPARED, data__chunk_bytes=40))
    train = data.Chunks(np.zeros((3, 40), np.int32), np.array([0, 0, 1], np.int32), 2)
    planted = chat._plant(train, config, np.random.default_rng(1), 30)
    joined = int(planted.joined.sum())
    marks = planted.chunks.symbols[3 : 3 + joined]
    assert (marks[:, 0] == data.SYMBOLS).all()
    assert (marks[:, 1] + 90 * marks[:, 2]).tolist() == np.flatnonzero(planted.joined).tolist()
    assert planted.chunks.symbols[3 + joined :].max() < data.SYMBOLS
    assert len(planted.chunks.symbols) == 3 + joined + 2 * 2
    assert planted.chunks.unit[3:].tolist() == list(range(2, 2 + joined + 4))
    texts = ["".join(chr(x + 30) if x > 1 else "\n" for x in row if x >= 0)
             for row in planted.chunks.symbols[3 + joined :]]  # fmt: skip
    for writers, code in planted.secrets:
        assert sum(f"my code is {code}." in text for text in texts) == writers
    grown = chat._with_population(config, 1044 + joined + 4)
    assert grown.data.population == 1044 + joined + 4
    assert grown.sampling_probability == pytest.approx(config.sampling_probability, rel=0.03)
    loop.step_event(grown, 1.0)


def test_bad_input():
    config = parse_config(small(report=COMPARED))
    for canaries in (19, 20.0, True):
        with pytest.raises(ValueError, match="canaries="):
            chat.audit_chat(config, rng=keys.SecureKey.generate(), canaries=canaries)
    with pytest.raises(ValueError, match="rng=None"):
        chat.audit_chat(config, rng=None)
