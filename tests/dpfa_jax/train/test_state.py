"""What goes wrong with checkpoints is said as what it is."""

import jax
import jax.numpy as jnp
import pytest

from dpfa_jax.train import state
from dpfa_jax.train.schema import ConfigError
from dpfa_jax.train.state import Checkpoints


def test_a_folder_that_cannot_be_made_is_no_damaged_checkpoint(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(ConfigError, match=r"kept there \(FileExistsError") as found:
        Checkpoints(tmp_path)
    assert "backup" not in str(found.value)


def test_a_full_disk_is_no_damaged_checkpoint(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state.ocp, "CheckpointManager", full)
    with pytest.raises(ConfigError, match=r"kept there \(OSError: .*No space left") as found:
        Checkpoints(tmp_path)
    assert "backup" not in str(found.value)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_lost_process_is_no_damaged_checkpoint(tmp_path, monkeypatch, processes):
    params, error = {"w": jnp.ones(3)}, jax.errors.JaxRuntimeError("UNAVAILABLE: gone")
    checkpoints = Checkpoints(tmp_path)

    def lost():
        raise error

    monkeypatch.setattr(checkpoints._manager, "latest_step", lost)
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    with pytest.raises((ConfigError, RuntimeError)) as found:
        checkpoints.restore(params, {})
    assert (found.value is error) == (processes == 2)
    monkeypatch.undo()
    checkpoints.close()


def test_a_damaged_checkpoint_is_one(tmp_path):
    params = {"w": jnp.ones(3)}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, params, {}, [])
    assert checkpoints.restore({"w": jnp.zeros(3)}, {})[0] == 1
    for file in (tmp_path / "checkpoints" / "1" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(ConfigError, match=r"cannot be read \(.*backup"):
        checkpoints.restore(params, {})
    checkpoints.close()
