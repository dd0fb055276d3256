"""``dpfa train`` as one of several processes: how it begins and how it ends."""

import pytest
from ended import Ended, end_is_raised  # noqa: F401
from small_runs import small, to_toml

from dpfa_jax import cli
from dpfa_jax.parallel import processes
from dpfa_jax.train import loop
from dpfa_jax.train.schema import ConfigError

INTERRUPTED = "dpfa: interrupted; the same command continues from the last checkpoint.\n"


pytestmark = pytest.mark.usefixtures("end_is_raised")


@pytest.fixture
def command(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(to_toml(small()))
    return ["train", str(path), "--run-dir", str(tmp_path / "run")]


def several(count, number, host="localhost:1"):
    return f"--coordinator {host} --processes {count} --process-id {number}".split()


def ended(command):
    with pytest.raises(Ended) as status:
        cli.main(command)
    return status.value.args[0]


def raising(error):
    def function(*_, **__):
        raise error

    return function


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--coordinator", "localhost:1"], "allowed are all three, or none"),
        (["--process-id", "0"], "allowed are all three, or none"),
        (several(0, 0), "processes=0: allowed is a whole number >= 1."),
        (several(2, 2), "process_id=2: allowed is a whole number from 0 to 1."),
        (several(2, -1), "process_id=-1: allowed is a whole number from 0 to 1."),
        (several(2, 0, "host"), "coordinator='host': allowed is 'host:port'."),
    ],
)
def test_what_does_not_fit_together_is_one_line(command, options, said, capsys):
    assert cli.main([*command, *options]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.startswith("dpfa: ")
    assert err.count("\n") == 1


def test_processes_that_cannot_join_are_one_line(command, monkeypatch, capsys):
    error = RuntimeError("DEADLINE_EXCEEDED: nobody\nmore")
    monkeypatch.setattr("jax.distributed.initialize", raising(error))
    assert ended([*command, *several(2, 1)]) == 3
    err = capsys.readouterr().err
    assert err == "dpfa: the processes cannot join: DEADLINE_EXCEEDED: nobody\n"


def test_no_cluster_to_find_them_in_is_one_line(command, monkeypatch, capsys):
    error = ValueError("coordinator_address should be defined.")
    monkeypatch.setattr("jax.distributed.initialize", raising(error))
    assert ended([*command, "--distributed"]) == 3
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("where", ["joining", "training"])
def test_an_interrupted_process_does_not_wait_for_the_others(command, where, monkeypatch, capsys):
    monkeypatch.setattr(processes, "start", lambda *_: None)
    target, name = (processes, "start") if where == "joining" else (loop, "run")
    monkeypatch.setattr(target, name, raising(KeyboardInterrupt()))
    assert ended([*command, *several(2, 0)]) == 130
    assert capsys.readouterr().out == "\n" + INTERRUPTED


def test_one_process_alone_that_is_interrupted_ends_as_usual(command, monkeypatch, capsys):
    monkeypatch.setattr(loop, "run", raising(KeyboardInterrupt()))
    assert cli.main(command) == 130
    assert capsys.readouterr().out == "\n" + INTERRUPTED


@pytest.mark.parametrize(("error", "status"), [(ConfigError("no"), 2), (OSError("disk"), 3)])
def test_an_error_while_training_ends_this_process(command, error, status, monkeypatch, capsys):
    monkeypatch.setattr(processes, "start", lambda *_: None)
    monkeypatch.setattr(loop, "run", raising(error))
    assert ended([*command, *several(2, 0)]) == status
    assert ("Traceback" in capsys.readouterr().err) == (status == 3)
