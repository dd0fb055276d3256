"""The training run: charge, train, commit, show; and the same again after a crash.

Order within a block of steps, which is what the guarantee rests on:

1. the block's events are charged to the ledger, on disk;
2. its steps run, each on a fresh Poisson batch with fresh noise;
3. the checkpoint commits: this is the release, and the ledger notes that it was made;
4. only then is anything shown that depends on the parameters.

Every start of the program draws a new key from the operating system and writes down its
fingerprint, nothing more. Steps that a crash undid were not released; they run again
under the charge they have, with another key.
"""

import contextlib
import math
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Key, PyTree

from dpfa_jax import keys, optim
from dpfa_jax.accounting import calibrate_noise_multiplier
from dpfa_jax.clipping import clipped_grad
from dpfa_jax.ledger import Ledger, ledger_name
from dpfa_jax.parallel import processes
from dpfa_jax.sampling import UserSampler
from dpfa_jax.sampling.poisson import sampling_event
from dpfa_jax.train import data as data_lib
from dpfa_jax.train.config import Config
from dpfa_jax.train.model import Model, losses, make_model
from dpfa_jax.train.placement import Placement
from dpfa_jax.train.progress import Progress
from dpfa_jax.train.report import write_report
from dpfa_jax.train.schema import ConfigError
from dpfa_jax.train.state import Checkpoints, locked, read_json, write_json
from dpfa_jax.versions import package_versions

# Packages whose versions a reader needs to repeat a run.
_REPORTED_VERSIONS = ("dpfa_jax", "jax", "flax", "optax", "dp-accounting")

# Children of a start's key.
_NOISE, _SAMPLING, _INIT = 0, 1, 2


class _Task(NamedTuple):
    """Everything fixed during a run."""

    config: Config
    model: Model
    train: data_lib.Chunks
    validation: data_lib.Chunks
    event: dp_accounting.DpEvent
    noise_multiplier: float
    placement: Placement


def run(
    config: Config, run_dir: Path, *, ledger: str | Path | None = None, parent: str | None = None
) -> dict[str, Any]:
    """Trains, or continues, or finds everything done; returns the report.

    Args:
        config: a checked configuration.
        run_dir: created if missing. Holds one run of one configuration.
        ledger: a path or URL of a shared ledger; None: one in ``run_dir``.
        parent: the scope in it that pays as well, with the run's unit and adjacency.

    Raises:
        ConfigError: if the directory holds another run, or the data does not fit.
        LedgerError: if a charge would pass a budget, breaks a policy or cannot be written; nothing
            is released.
    """

    def lock() -> contextlib.AbstractContextManager[None]:
        run_dir.mkdir(parents=True, exist_ok=True)
        return locked(run_dir)

    with processes.held_by_first(lock):
        return _run(config, run_dir, ledger, parent)


def _run(
    config: Config, run_dir: Path, where: str | Path | None, parent: str | None
) -> dict[str, Any]:
    placement = Placement(config)
    plan = _plan(config, run_dir, where, parent)
    finished = processes.on_first(lambda: read_json(run_dir / "report.json"))
    if finished is not None:
        return finished
    train, validation = data_lib.load_chunks(config)
    ledger = _FirstsLedger(config, run_dir, where, plan)
    task = _Task(
        config=config,
        model=make_model(config.model, config.data.chunk_bytes),
        train=train,
        validation=validation,
        event=step_event(config, plan["noise_multiplier"]),
        noise_multiplier=plan["noise_multiplier"],
        placement=placement,
    )
    started = time.monotonic()
    result = _train_private(task, run_dir, ledger)
    result["training_seconds"] = round(time.monotonic() - started, 1)
    comparison = _compare(task, run_dir)
    facts = {**plan, **result, **comparison}
    return processes.on_first(lambda: write_report(run_dir, config, facts))


def step_event(config: Config, noise_multiplier: float) -> dp_accounting.DpEvent:
    """What one step costs."""
    return sampling_event(
        config.data.population,
        config.sampling_probability,
        config.training.padded_batch_size,
        noise_multiplier,
    )


def _plan(
    config: Config, run_dir: Path, where: str | Path | None, parent: str | None
) -> dict[str, Any]:
    """The noise multiplier and the facts of the first start; later starts read them."""
    path = run_dir / "run.json"
    plan = processes.on_first(lambda: read_json(path))
    shared = None if where is None else ledger_name(where)
    if plan is not None:
        plan = {"ledger": None, "parent": None, "scope": f"run {config.fingerprint}"} | plan
        if plan["config_fingerprint"] != config.fingerprint:
            raise ConfigError(
                f"--run-dir {run_dir}: holds a run of another configuration "
                f"({plan['name']!r}); choose another directory."
            )
        if (plan["ledger"], plan["parent"]) != (shared, parent):
            raise ConfigError(
                f"--ledger {shared}, --parent {parent}: the run in {run_dir} charges "
                f"--ledger {plan['ledger']}, --parent {plan['parent']}; what it has spent is there."
            )
        return plan
    noise_multiplier = calibrate_noise_multiplier(
        lambda z: dp_accounting.SelfComposedDpEvent(step_event(config, z), config.training.steps),
        epsilon=config.privacy.epsilon,
        delta=config.privacy.delta,
        adjacency=config.privacy.adjacency,
    )
    plan = {
        "name": config.name,
        "config_fingerprint": config.fingerprint,
        "noise_multiplier": noise_multiplier,
        "ledger": shared,
        "parent": parent,
        # In a shared ledger two runs of one configuration are two runs.
        "scope": f"run {config.fingerprint}" + (f" {uuid.uuid4().hex[:12]}" if shared else ""),
        "data_source": data_lib.source_description(config.data.source),
        "versions": package_versions(_REPORTED_VERSIONS),
    }
    # Every process solved for the noise; what the first one wrote holds.
    processes.on_first(lambda: write_json(path, plan))
    return processes.agreed(plan)


def _open_ledger(
    config: Config, run_dir: Path, where: str | Path | None, plan: dict[str, Any]
) -> Ledger:
    """The ledger that pays, with the run's budget open."""
    ledger = Ledger(run_dir / "ledger.sqlite" if where is None else where)
    privacy = config.privacy
    ledger.open_budget(
        plan["scope"],
        epsilon=privacy.epsilon,
        delta=privacy.delta,
        adjacency=privacy.adjacency,
        unit=privacy.unit,
        parent=plan["parent"],
        # Every step's event is fixed before the first: the plan is calibrated as a whole.
        composition="fixed",
        reason=config.name,
    )
    return ledger


class _FirstsLedger:
    """The ledger, which the first process alone has open. An error of it stops all."""

    def __init__(
        self, config: Config, run_dir: Path, where: str | Path | None, plan: dict[str, Any]
    ):
        self._scope = plan["scope"]
        self._ledger: Ledger | None = None

        def open_it() -> None:
            self._ledger = _open_ledger(config, run_dir, where, plan)

        processes.on_first(open_it)

    def ask[Value](self, question: Callable[[Ledger], Value]) -> Value:
        """Calls with the ledger, in the first process."""

        def ask() -> Value:
            assert self._ledger is not None
            return question(self._ledger)

        return processes.on_first(ask)

    def charge(self, label: str, event: dp_accounting.DpEvent, fingerprint: str) -> None:
        """Charges the run's scope."""
        self.ask(lambda book: book.charge(self._scope, label, event, key_fingerprint=fingerprint))

    def mark_released(self, label: str) -> None:
        """Notes that the checkpoint was committed."""
        self.ask(lambda book: book.mark_released(self._scope, label))

    def epsilon_so_far(self) -> float:
        """Of the run's scope, quickly."""
        return self.ask(lambda book: book.spent(self._scope, fine=False))

    def summary(self) -> dict[str, Any]:
        """What the report says of it."""
        return self.ask(
            lambda book: {
                "epsilon": book.spent(self._scope),
                "steps_charged": sum(c.event.count for c in book.charges(self._scope)),
                "ledger": book.name,
                "ledger_head": list(book.head()),
                "scope": self._scope,
            }
        )


def _start_key(config: Config, run_dir: Path) -> tuple[Key[Array, ""], str, str]:
    """This start's key, where it comes from, its fingerprint; on disk before its use.

    Every process draws one. What it is handed to takes the first process's (``keys.take_key``).
    """
    path = run_dir / "starts.json"
    starts = processes.on_first(lambda: read_json(path) or [])
    seed = config.privacy.reproducible_seed
    if seed is None:
        secure = keys.SecureKey.generate()
        key, source, fingerprint = secure.key(), secure.source, secure.fingerprint
    else:
        key = jax.random.fold_in(keys.reproducible_key(seed), len(starts))
        source = f"reproducible seed {seed}: NOT PRIVATE, anybody can remove this noise"
        fingerprint = f"seed {seed}, start {len(starts)}"
    starts.append({"key_fingerprint": fingerprint, "time": time.time()})
    processes.on_first(lambda: write_json(path, starts))
    return keys.take_key(key), source, processes.agreed(fingerprint)


def _optimizer(task: _Task, noise_key: Key[Array, ""]) -> optax.GradientTransformation:
    c, t = task.config, task.config.training
    std = optim.noise_std(
        c.privacy.l2_clip_norm,
        task.noise_multiplier,
        t.expected_batch_size,
        c.privacy.adjacency,
    )
    return optax.chain(
        optim.add_noise(
            c.privacy.l2_clip_norm,
            task.noise_multiplier,
            t.expected_batch_size,
            noise_key,
            adjacency=c.privacy.adjacency,
        ),
        optim.dp_adamw(
            _schedule(c, t.learning_rate),
            std,
            b1=t.b1,
            b2=t.b2,
            floor=t.adam_floor_share * std,
            weight_decay=t.weight_decay,
        ),
    )


def _schedule(config: Config, peak: float) -> optax.Schedule:
    t = config.training
    return optax.warmup_cosine_decay_schedule(
        init_value=peak / (t.warmup_steps + 1),
        peak_value=peak,
        warmup_steps=t.warmup_steps,
        decay_steps=t.steps,
        end_value=peak * t.final_learning_rate_share,
    )


def _unit_loss(model: Model) -> Callable[[PyTree, Array], Array]:
    """Mean nats a byte of one unit: of all of a user's chunks, or of one message."""

    def loss(params: PyTree, symbols: Array) -> Array:
        total, count = losses(model.apply(params, symbols), symbols)
        return total / jnp.maximum(count, 1.0)

    return loss


class _Batches:
    """Sampled batches as padded arrays [batch, chunks of a unit, bytes]."""

    def __init__(self, task: _Task, key: Key[Array, ""]):
        c = task.config
        self._symbols, self._placement = task.train.symbols, task.placement
        self._sampler = UserSampler(
            task.train.unit,
            max_examples_per_user=c.data.max_chunks_per_user or 1,
            sampling_probability=c.sampling_probability,
            batch_size=c.training.padded_batch_size,
            rng=key,
        )

    def __getitem__(self, step: int) -> tuple[Array, Array]:
        return self._placement.load(self._symbols, self._sampler.sample(step))


def _evaluate(model: Model, params: PyTree, symbols: np.ndarray, size: int = 256) -> float:
    """Nats a byte over some chunks."""
    extra = -len(symbols) % size
    padded = np.concatenate([symbols, np.full((extra, symbols.shape[1]), -1, np.int32)])
    sums = _EVALUATE(model, params, padded.reshape(-1, size, symbols.shape[1]))
    return float(sums[0] / sums[1])


def _evaluate_sums(model: Model, params: PyTree, chunks: Array) -> tuple[Array, Array]:
    totals = jax.lax.map(lambda x: losses(model.apply(params, x), x), chunks)
    return jnp.sum(totals[0]), jnp.sum(totals[1])


_EVALUATE = jax.jit(_evaluate_sums, static_argnums=0)


def _train_private(task: _Task, run_dir: Path, ledger: _FirstsLedger) -> dict[str, Any]:
    c, t, place = task.config, task.config.training, task.placement
    key, key_source, fingerprint = _start_key(c, run_dir)
    tx = _optimizer(task, jax.random.fold_in(key, _NOISE))
    batches = _Batches(task, jax.random.fold_in(key, _SAMPLING))
    grad = clipped_grad(
        _unit_loss(task.model),
        l2_clip_norm=c.privacy.l2_clip_norm,
        microbatch_size=t.microbatch_size,
        batch_sharding=place.rows,
    )

    @jax.jit
    def step(params: PyTree, state: PyTree, symbols: Array, padding: Array) -> tuple[Any, Any]:
        total = grad(params, symbols, is_padding_example=padding)
        updates, state = tx.update(total, state, params)
        return optax.apply_updates(params, updates), state

    params = place.make(task.model.init, jax.random.fold_in(key, _INIT))
    state = place.optimiser_state(tx, params)
    parameters = sum(x.size for x in jax.tree.leaves(params))
    with (
        contextlib.closing(Checkpoints(run_dir)) as checkpoints,
        Progress(t.steps, quiet=not processes.is_first()) as progress,
    ):
        done, params, state, history = checkpoints.restore(params, state)
        _check_finite(params)
        for block in _blocks(t.steps, t.checkpoint_every):
            label = f"steps {block.start} to {block.stop - 1}"
            if block.stop <= done:
                ledger.mark_released(label)
                continue
            # Refuses a block that was released: its checkpoint is gone, and running it
            # again would release it a second time under one charge.
            event = dp_accounting.SelfComposedDpEvent(task.event, len(block))
            ledger.charge(label, event, fingerprint)
            for i in block:
                params, state = step(params, state, *batches[i])
                progress.step(i + 1)
            loss = _evaluate(task.model, params, task.validation.symbols)
            epsilon = ledger.epsilon_so_far()
            history.append({"step": block.stop, "validation_loss": loss, "epsilon": epsilon})
            # The release. A process that is gone is missed here, before anything is written.
            processes.wait_for_all(f"commit {block.stop}")
            checkpoints.save(block.stop, params, state, history)
            ledger.mark_released(label)
            progress.committed(block.stop, loss, epsilon)
            _check_finite(params)
    return {
        **ledger.summary(),
        "starts": processes.on_first(lambda: len(read_json(run_dir / "starts.json"))),
        "steps": t.steps,
        "key_source": key_source,
        "parameters": parameters,
        "validation_loss": history[-1]["validation_loss"],
        "unigram_loss": data_lib.unigram_loss(task.validation),
        "validation_users": task.validation.users,
        "history": history,
    }


def _check_finite(params: PyTree) -> None:
    # After the commit: that a run diverged is something it shows about its parameters.
    if not bool(_ALL_FINITE(params)):
        raise ConfigError("training.learning_rate: training diverged; a smaller one is needed.")


_ALL_FINITE = jax.jit(
    lambda params: jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(params)]).all()
)


def _blocks(steps: int, size: int) -> Iterator[range]:
    for start in range(0, steps, size):
        yield range(start, min(start + size, steps))


def _compare(task: _Task, run_dir: Path) -> dict[str, Any]:
    """The same model trained WITHOUT privacy, if the configuration asks for it."""
    if not task.config.report.release_nonprivate_comparison:
        return {"nonprivate_validation_loss": None}
    path = run_dir / "nonprivate.json"
    done = processes.on_first(lambda: read_json(path))
    if done is None:
        _, done = train_without_privacy(task)
        processes.on_first(lambda: write_json(path, done))
    return done


def train_without_privacy(task: _Task) -> tuple[PyTree, dict[str, Any]]:
    """Trains the model WITHOUT privacy, on the same data; parameters and facts."""
    c, t = task.config, task.config.training
    assert c.report.nonprivate_learning_rate is not None
    key = keys.take_key(keys.SecureKey.generate())
    batches = _Batches(task, jax.random.fold_in(key, _SAMPLING))
    params = task.placement.make(task.model.init, jax.random.fold_in(key, _INIT))
    tx = optax.adamw(
        _schedule(c, c.report.nonprivate_learning_rate),
        b1=t.b1,
        b2=t.b2,
        weight_decay=t.weight_decay,
    )
    state = task.placement.optimiser_state(tx, params)
    unit_loss = _unit_loss(task.model)

    def batch_loss(params: PyTree, symbols: Array, padding: Array) -> Array:
        each = jax.vmap(unit_loss, in_axes=(None, 0))(params, symbols)
        return jnp.sum(jnp.where(padding, 0.0, each)) / t.expected_batch_size

    @jax.jit
    def step(params: PyTree, state: PyTree, symbols: Array, padding: Array) -> tuple[Any, Any]:
        grads = jax.grad(batch_loss)(params, symbols, padding)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    history = []
    started = time.monotonic()
    with Progress(t.steps, title="not private", quiet=not processes.is_first()) as progress:
        for block in _blocks(t.steps, t.checkpoint_every):
            for i in block:
                params, state = step(params, state, *batches[i])
                progress.step(i + 1)
            loss = _evaluate(task.model, params, task.validation.symbols)
            history.append({"step": block.stop, "validation_loss": loss})
            progress.committed(block.stop, loss, math.inf)
    done = {
        "nonprivate_validation_loss": history[-1]["validation_loss"],
        "nonprivate_history": history,
        "nonprivate_seconds": round(time.monotonic() - started, 1),
    }
    return params, done
