import math
import tomllib
from pathlib import Path

import pytest
from small_runs import small, to_toml

from dpfa_jax import cli
from dpfa_jax.train import data
from dpfa_jax.train.config import load_config, parse_config
from dpfa_jax.train.schema import ConfigError

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda p: p.stem)
def test_shipped_configs_are_valid(path):
    config = load_config(path)
    assert config.privacy.epsilon <= 8
    assert config.privacy.reproducible_seed is None
    assert config.privacy.delta <= 1 / (10 * config.data.population)


BAD = [
    ("privacy__epsilon", 0.0, "a finite number > 0"),
    ("privacy__epsilon", -1.0, "a finite number > 0"),
    ("privacy__epsilon", math.nan, "a finite number > 0"),
    ("privacy__epsilon", math.inf, "a finite number > 0"),
    ("privacy__epsilon", True, "a finite number > 0"),
    ("privacy__epsilon", "8", "a finite number > 0"),
    ("privacy__delta", 1 / 1044, "1/data.population"),
    ("privacy__delta", 0.0, "> 0"),
    ("privacy__delta", math.nan, "> 0"),
    ("privacy__l2_clip_norm", 0.0, "> 1e-09"),
    ("privacy__l2_clip_norm", math.nan, "> 1e-09"),
    ("privacy__l2_clip_norm", math.inf, "<= 1e+09"),
    ("privacy__unit", "household", "'user' or 'message'"),
    ("privacy__adjacency", "swap", "'add_remove' or 'replace_one'"),
    ("privacy__reproducible_seed", -1, ">= 0"),
    ("training__expected_batch_size", 1045, "data.population = 1044"),
    ("training__padded_batch_size", 1045, "data.population = 1044"),
    ("training__padded_batch_size", 19, "training.expected_batch_size = 20"),
    ("training__microbatch_size", 41, "training.padded_batch_size = 40"),
    ("training__steps", 0, ">= 1"),
    ("training__steps", 1.5, "whole number"),
    ("training__warmup_steps", 12, "training.steps = 12"),
    ("training__learning_rate", math.nan, "> 0"),
    ("training__b1", 1.0, "<= 0.999999"),
    ("model__width", 9, "a multiple of the 2 heads"),
    ("model__head_windows", [[2, 1]], "nearest <= farthest"),
    ("model__head_windows", [], "a list of pairs"),
    ("data__source", "enron", "'chitchat'"),
    ("data__validation_fraction", 0.0, "> 0"),
    ("data__max_chunks_per_user", 0, ">= 1"),
    ("name", " ", "not empty"),
    ("report__release_nonprivate_comparison", 1, "true or false"),
]


@pytest.mark.parametrize(("key", "value", "allowed"), BAD, ids=lambda x: str(x)[:40])
def test_impossible_value_names_key_value_and_allowed(key, value, allowed):
    with pytest.raises(ConfigError) as error:
        parse_config(small(**{key: value}))
    message = str(error.value)
    assert message.startswith(key.replace("__", "."))
    assert allowed in message
    assert "\n" not in message


def test_missing_unknown_and_misspelt_keys():
    with pytest.raises(ConfigError, match=r"^privacy\.delta: the key is missing"):
        parse_config(small(privacy__delta=...))
    with pytest.raises(ConfigError, match=r"^privacy\.epsilom: .*did you mean privacy\.epsilon"):
        parse_config(small(privacy__epsilom=1.0))
    with pytest.raises(ConfigError, match=r"^extra: unknown key"):
        parse_config(small(extra=1))
    with pytest.raises(ConfigError, match=r"^model: the table is missing"):
        parse_config(small(model=...))
    with pytest.raises(ConfigError, match=r"^model: a table is needed"):
        parse_config(small(model=3))
    with pytest.raises(ConfigError, match=r"report\.nonprivate_learning_rate"):
        parse_config(small(report__release_nonprivate_comparison=True))


def test_cap_belongs_to_the_user_unit_only():
    with pytest.raises(ConfigError, match=r"data\.max_chunks_per_user = 2: .*'message'"):
        parse_config(small(privacy__unit="message"))
    with pytest.raises(ConfigError, match=r"data\.max_chunks_per_user = None"):
        parse_config(small(data__max_chunks_per_user=...))
    parse_config(small(privacy__unit="message", data__max_chunks_per_user=...))


def test_every_option_changes_the_fingerprint():
    base = parse_config(small()).fingerprint
    assert parse_config(small()).fingerprint == base
    for change in ({"training__steps": 13}, {"privacy__delta": 8e-5}, {"name": "other"}):
        assert parse_config(small(**change)).fingerprint != base


def test_toml_writer_of_the_tests_round_trips():
    assert tomllib.loads(to_toml(small())) == small()


def test_bad_config_is_one_line_and_reads_no_data(tmp_path, capsys, monkeypatch):
    def forbidden():
        raise AssertionError("the data was read before the configuration was checked")

    monkeypatch.setattr(data, "read_chitchat", forbidden)
    path = tmp_path / "bad.toml"
    path.write_text(to_toml(small(privacy__epsilon=-3.0)))
    assert cli.main(["train", str(path), "--run-dir", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "privacy.epsilon = -3.0" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [b"a = ", b"\xff\xfe", None])
def test_unreadable_file_is_one_line(tmp_path, capsys, content):
    path = tmp_path / "config.toml"
    if content is not None:
        path.write_bytes(content)
    assert cli.main(["train", str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
