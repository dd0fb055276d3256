"""What is on disk: the run's directory, its checkpoints, and what they may hold.

A checkpoint is the release: parameters and optimiser moments after some number of steps,
both functions of noisy gradients only. It holds no noise key. Steps after the last
committed checkpoint were charged and never released; they are run again, with a fresh
key and fresh batches, under the same charge (docs/privacy.md, section 6).
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from dpfa_jax.optim import without_keys
from dpfa_jax.parallel.processes import of_another
from dpfa_jax.train.schema import ConfigError


def write_json(path: Path, value: Any) -> None:
    """Writes a file that is either the old one or the new one, whenever power fails."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_json(path: Path) -> Any:
    """What :func:`write_json` wrote, or None if the file does not exist."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Only one process trains in a directory; the lock goes with its process."""
    with (run_dir / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"--run-dir {run_dir}: another process is training there.") from None
        yield


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: " + str(error).strip().split("\n")[0][:200]


class Checkpoints:
    """Orbax checkpoints of one run; a save is on disk when it returns.

    Raises:
        ConfigError: where its folder cannot be made or listed, or what is there is damaged.
    """

    def __init__(self, run_dir: Path):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2,
            enable_async_checkpointing=False,
            # What a crash left half written was not released; it goes.
            cleanup_tmp_directories=True,
        )
        self._folder = (run_dir / "checkpoints").absolute()
        with self._reading():
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._manager = ocp.CheckpointManager(self._folder, options=options)
            except OSError as error:  # of the folder or the disk; no checkpoint is opened here
                raise ConfigError(
                    f"{self._folder}: checkpoints cannot be kept there ({_why(error)})."
                ) from error

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Whatever goes wrong with what is on the disk is one error that says so."""
        try:
            yield
        except ConfigError:
            raise
        except Exception as error:  # of Orbax, TensorStore, JSON, the file system, ...
            if jax.process_count() > 1 and of_another(error):
                raise  # a process is lost, and no checkpoint
            raise ConfigError(
                f"{self._folder}: a checkpoint cannot be read ({_why(error)}). "
                "Bring it back from a backup; what was released is charged and stays so."
            ) from error

    @staticmethod
    def _leaves(params: PyTree, opt_state: PyTree) -> dict[str, list[jax.Array]]:
        # Leaves in order, not the trees: the optimiser's state holds None where keys were.
        return {
            "params": jax.tree.leaves(params),
            "opt_state": jax.tree.leaves(without_keys(opt_state)),
        }

    def save(self, step: int, params: PyTree, opt_state: PyTree, history: list[Any]) -> None:
        """Commits the state after ``step`` steps."""
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(self._leaves(params, opt_state)),
                history=ocp.args.JsonSave(history),
            ),
        )
        self._manager.wait_until_finished()

    def restore(self, params: PyTree, opt_state: PyTree) -> tuple[int, PyTree, PyTree, list[Any]]:
        """The last committed state, or step 0 with what was given.

        Args:
            params: freshly initialised, for shapes.
            opt_state: freshly initialised; its noise keys are kept.

        Raises:
            ConfigError: for a checkpoint that is damaged, or of another model.
        """
        with self._reading():
            step = self._manager.latest_step()
            if step is None:
                return 0, params, opt_state, []
            like = jax.tree.map(ocp.utils.to_shape_dtype_struct, self._leaves(params, opt_state))
            found = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(like), history=ocp.args.JsonRestore()
                ),
            )
            state, history = found["state"], found["history"]
            params = jax.tree.unflatten(jax.tree.structure(params), state["params"])
            return step, params, self._refill(opt_state, state["opt_state"]), history

    @staticmethod
    def _refill(opt_state: PyTree, saved: list[jax.Array]) -> PyTree:
        """``opt_state`` with every leaf but the keys replaced by the saved one."""
        leaves, structure = jax.tree.flatten(opt_state)
        keep = [jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in leaves]
        values = iter(saved)
        filled = [x if is_key else next(values) for x, is_key in zip(leaves, keep, strict=True)]
        return jax.tree.unflatten(structure, filled)

    def close(self) -> None:
        """Ends background work."""
        self._manager.close()
