"""Does spending a budget unevenly help? The chat data, three ways to spend the same (ε, δ).

    python -m benchmarks.budget_schedules --json OUT

* constant: the same noise in every step (what ``dpfa train`` does);
* planned: 1.25 times the noise in the first half of the steps, 0.8 times in the second, in units
  that meet the total exactly (tight composition, the plan stands beforehand);
* adaptive: starts with more noise, and takes less when the released gradients of the last block
  show little signal; a Rényi filter ends it within the total.

The statistic of the adaptive one is |released mean gradient|² / (d·σ²) − 1, averaged over a
block: post-processing of what was released. All other settings are the configuration's.
"""

import argparse
import datetime
import json
import statistics
import tempfile
import time
from pathlib import Path

import dp_accounting
import jax
import optax

from dpfa_jax import Ledger, SecureKey, clipped_grad, optim
from dpfa_jax.accounting import (
    AdaptiveSchedule,
    calibrate_noise_multiplier,
    planned_multipliers,
)
from dpfa_jax.bench.files import write_json
from dpfa_jax.train import data, loop
from dpfa_jax.train.config import load_config
from dpfa_jax.train.model import make_model

LADDER = (1.5, 1.2, 1.0, 0.8)  # in units of the constant multiplier
THRESHOLD = 0.25


def multipliers(how, config, event, block):
    """The multiplier of each block; a generator that is sent the block's statistic."""
    p, blocks = config.privacy, config.training.steps // block
    total = {"epsilon": p.epsilon, "delta": p.delta, "adjacency": p.adjacency}

    def of_block(z):
        return dp_accounting.SelfComposedDpEvent(event(z), block)

    constant = calibrate_noise_multiplier(
        lambda z: dp_accounting.SelfComposedDpEvent(event(z), config.training.steps), **total
    )
    if how == "constant":
        plan = [constant] * blocks
    elif how == "planned":
        late = blocks // 2
        plan = planned_multipliers(of_block, [1.25] * (blocks - late) + [0.8] * late, **total)
    else:
        ladder = [constant * f for f in LADDER]
        schedule = AdaptiveSchedule(of_block, ladder, threshold=THRESHOLD, **total)
        statistic = None
        for _ in range(blocks):
            z = schedule.next(statistic)
            if z is None:
                return
            statistic = yield z
        return
    for z in plan:
        yield z


def train(config, how, block, ledger, scope, chunks):
    """Trains as ``how`` says; returns the losses on the validation users and what was spent."""
    c, t = config, config.training
    model = make_model(c.model, c.data.chunk_bytes)
    train_chunks, validation = chunks
    ledger.open_budget(
        scope, epsilon=c.privacy.epsilon, delta=c.privacy.delta, adjacency=c.privacy.adjacency,
        unit=c.privacy.unit, composition="adaptive" if how == "adaptive" else "fixed",
    )  # fmt: skip
    key = SecureKey.generate().key()
    task = loop._Task(c, model, train_chunks, validation, None, 0.0)
    batches = loop._Batches(task, jax.random.fold_in(key, 1))
    params = jax.jit(model.init)(jax.random.fold_in(key, 2))
    size = sum(x.size for x in jax.tree.leaves(params))
    grad = clipped_grad(
        loop._unit_loss(model), l2_clip_norm=c.privacy.l2_clip_norm,
        microbatch_size=t.microbatch_size,
    )  # fmt: skip
    compiled = {}

    def make(z):
        noise = optim.add_noise(
            c.privacy.l2_clip_norm, z, t.expected_batch_size, SecureKey.generate(),
            adjacency=c.privacy.adjacency,
        )  # fmt: skip
        std = optim.noise_std(c.privacy.l2_clip_norm, z, t.expected_batch_size, c.privacy.adjacency)
        adam = optim.dp_adamw(
            loop._schedule(c, t.learning_rate), std, b1=t.b1, b2=t.b2,
            floor=t.adam_floor_share * std, weight_decay=t.weight_decay,
        )  # fmt: skip

        @jax.jit
        def step(params, noise_state, adam_state, symbols, padding):
            mean, noise_state = noise.update(
                grad(params, symbols, is_padding_example=padding), noise_state
            )
            signal = optax.tree.norm(mean, squared=True) / (size * std**2) - 1
            updates, adam_state = adam.update(mean, adam_state, params)
            return optax.apply_updates(params, updates), noise_state, adam_state, signal

        return step, noise.init(params), adam

    adam_state, losses, zs, signals, done = None, [], [], [], 0
    source = multipliers(how, c, lambda z: loop.step_event(c, z), block)
    z = next(source, None)
    while z is not None:
        if z not in compiled:
            compiled[z] = make(z)
        step, noise_state, adam = compiled[z]
        adam_state = adam.init(params) if adam_state is None else adam_state
        event = dp_accounting.SelfComposedDpEvent(loop.step_event(c, z), block)
        ledger.charge(scope, f"steps {done} to {done + block - 1}", event)
        found = []
        for i in range(done, done + block):
            params, noise_state, adam_state, signal = step(
                params, noise_state, adam_state, *batches[i]
            )
            found.append(float(signal))
        compiled[z] = (step, noise_state, adam)
        done += block
        ledger.mark_released(scope, f"steps {done - block} to {done - 1}")
        losses.append(loop._evaluate(model, params, validation.symbols))
        zs.append(z)
        signals.append(statistics.fmean(found))
        try:
            z = source.send(signals[-1])
        except StopIteration:
            z = None
    return {"losses": losses, "noise_multipliers": zs, "signals": signals, "steps": done,
            "epsilon": ledger.spent(scope)}  # fmt: skip


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=Path("configs/chat_user_level.toml"))
    parser.add_argument("--block", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=2, help="runs of each, each with new noise")
    parser.add_argument("--json", type=Path, default=Path("runs/budget_schedules.json"))
    args = parser.parse_args(argv)
    config = load_config(args.config)
    chunks = data.load_chunks(config)
    result = {
        "what": "the same (epsilon, delta) spent in three ways; validation loss, nats a byte",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "config": str(args.config), "epsilon": config.privacy.epsilon,
        "delta": config.privacy.delta, "runs": [],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder) / "ledger.sqlite")
        for seed in range(args.seeds):
            for how in ("constant", "planned", "adaptive"):
                started = time.monotonic()
                run = train(config, how, args.block, ledger, f"{how} {seed}", chunks)
                run = {"how": how, "run": seed, **run, "loss": run["losses"][-1],
                       "seconds": round(time.monotonic() - started, 1)}  # fmt: skip
                shown = ("how", "loss", "epsilon", "steps", "seconds")
                print(json.dumps({k: run[k] for k in shown}), flush=True)
                result["runs"].append(run)
                write_json(args.json, result)


if __name__ == "__main__":
    main()
