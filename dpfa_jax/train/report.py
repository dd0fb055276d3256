"""The report: one JSON file for programs, one self-contained HTML page for people."""

import base64
import dataclasses
import html
import io
import json
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
from matplotlib.axes import Axes

from dpfa_jax.accounting import Accountant
from dpfa_jax.train.config import Config
from dpfa_jax.train.state import write_json

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2530; background: #fff;
       max-width: 860px; margin: 2.5rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
.guarantee { border-left: 4px solid #0b6e4f; background: #f0f7f4; padding: .8rem 1.1rem; }
.warning { border-left: 4px solid #b3261e; background: #fdf1f0; padding: .8rem 1.1rem; }
table { border-collapse: collapse; width: 100%; }
td, th { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid #dde3e8;
         vertical-align: top; }
td:last-child { font-variant-numeric: tabular-nums; }
figure { margin: 1rem 0; } img { width: 100%; height: auto; }
pre { background: #f5f7f9; padding: .8rem 1rem; overflow-x: auto; font-size: .85rem; }
p.note { color: #56616d; }
"""


def _unit_phrase(unit: str) -> str:
    return {"user": "all messages of one user", "message": "one message"}[unit]


def guarantee(config: Config, result: dict[str, Any]) -> str:
    """The exact promise in one sentence, and what it leaves out in a second."""
    p, t = config.privacy, config.training
    change = {
        "add_remove": f"Adding or removing {_unit_phrase(p.unit)}",
        "replace_one": f"Replacing {_unit_phrase(p.unit)} by others",
    }[p.adjacency]
    if t.padded_batch_size < config.data.population:
        truncated = f", batches truncated at {t.padded_batch_size}"
    else:
        truncated = ""
    return (
        f"{change} ({p.adjacency}) changes the distribution of everything released by at most "
        f"(ε = {result['epsilon']:.3f}, δ = {p.delta:.3g}): {t.steps} steps on Poisson samples "
        f"of {p.unit}s with probability {config.sampling_probability:.4f}{truncated}, each a sum "
        f"of gradients clipped to norm {p.l2_clip_norm:g} with Gaussian noise of multiplier "
        f"{result['noise_multiplier']:.4f}, composed with {result['accountant']}; released are "
        "the parameters and optimiser moments at every checkpoint. "
        f"Not covered: the {result['validation_users']} validation users, whose texts the "
        f"validation and unigram losses describe; the number of training {p.unit}s "
        f"({config.data.population}), which is public; the choice of this configuration, where it "
        "was made by looking at the same data"
        + (
            "; and the comparison trained without privacy on the same data."
            if result["nonprivate_validation_loss"] is not None
            else "."
        )
    )


def rederivation(config: Config, result: dict[str, Any]) -> str:
    """A few lines of Python that compute ε with ``dp_accounting`` alone."""
    p, t, n = config.privacy, config.training, config.data.population
    z = result["noise_multiplier"] * (2 if p.adjacency == "replace_one" else 1)
    relation = "REPLACE_ONE" if p.adjacency == "replace_one" else "ADD_OR_REMOVE_ONE"
    q = f"{t.expected_batch_size} / {n}"
    if t.padded_batch_size < n:
        event = (
            "dp_accounting.TruncatedSubsampledGaussianDpEvent(\n"
            f"    dataset_size={n + 1}, sampling_probability={q},\n"
            f"    truncated_batch_size={t.padded_batch_size}, noise_multiplier={z!r})"
        )
    else:
        event = (
            f"dp_accounting.PoissonSampledDpEvent(\n    {q}, dp_accounting.GaussianDpEvent({z!r}))"
        )
    return (
        "import dp_accounting\n"
        "from dp_accounting import pld\n\n"
        f"step = {event}\n"
        f"relation = dp_accounting.NeighboringRelation.{relation}\n"
        f"accountant = pld.PLDAccountant(relation).compose(step, {t.steps})\n"
        f"print(accountant.get_epsilon({p.delta!r}))\n"
    )


def _draw(axes_of: Any) -> str:
    figure = matplotlib.figure.Figure(figsize=(8.2, 3.4), layout="constrained")
    axes_of(figure.subplots())
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _plain(axes: Axes, title: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("step")
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def _epsilon_plot(config: Config, result: dict[str, Any]) -> str:
    history = result["history"]

    def draw(axes: Axes) -> None:
        steps = [0, *(h["step"] for h in history)]
        axes.plot(steps, [0.0, *(h["epsilon"] for h in history)], color="#0b6e4f", marker=".")
        axes.axhline(config.privacy.epsilon, color="#b3261e", linestyle="--", linewidth=1)
        axes.annotate("budget", (0, config.privacy.epsilon), va="bottom", color="#b3261e")
        _plain(axes, f"Privacy loss spent (δ = {config.privacy.delta:.3g})", "ε")
        axes.set_ylim(bottom=0)

    return _draw(draw)


def _loss_plot(result: dict[str, Any]) -> str:
    def draw(axes: Axes) -> None:
        for name, key, color in (
            ("private", "history", "#0b6e4f"),
            ("without privacy", "nonprivate_history", "#6b7785"),
        ):
            points = result.get(key)
            if points:
                x = [h["step"] for h in points]
                axes.plot(
                    x, [h["validation_loss"] for h in points], color=color, marker=".", label=name
                )
        unigram = result["unigram_loss"]
        axes.axhline(unigram, color="#b3261e", linestyle="--", linewidth=1, label="unigram")
        _plain(axes, "Validation loss, users disjoint from training", "nats a byte")
        axes.legend(frameon=False)

    return _draw(draw)


def _delta_plot(config: Config, result: dict[str, Any]) -> str:
    """δ for every ε at the end: the whole guarantee, of which (ε, δ) is one point."""
    from dpfa_jax.train.loop import step_event

    event = step_event(config, result["noise_multiplier"])
    accountant = Accountant(config.privacy.adjacency, interval=1e-3)
    accountant.compose(event, config.training.steps)
    epsilons = np.linspace(0.25, 1.6 * result["epsilon"], 60)

    def draw(axes: Axes) -> None:
        axes.semilogy(epsilons, [accountant.delta(float(e)) for e in epsilons], color="#0b6e4f")
        axes.plot([result["epsilon"]], [config.privacy.delta], "o", color="#b3261e")
        _plain(axes, "The whole trade-off after the last step", "δ")
        axes.set_xlabel("ε")

    return _draw(draw)


def write_report(run_dir: Path, config: Config, result: dict[str, Any]) -> dict[str, Any]:
    """Writes ``report.html``, then ``report.json``, whose existence means "finished".

    Args:
        run_dir: the run's directory.
        config: its configuration.
        result: what the loop found out.

    Returns:
        The contents of ``report.json``.
    """
    p = config.privacy
    result = {**result, "accountant": Accountant(p.adjacency).name}
    report = {
        "name": config.name,
        "guarantee": guarantee(config, result),
        "unit": p.unit,
        "adjacency": p.adjacency,
        "target_epsilon": p.epsilon,
        "epsilon": result["epsilon"],
        "delta": p.delta,
        "noise_multiplier": result["noise_multiplier"],
        "sampling_probability": config.sampling_probability,
        "steps": result["steps"],
        "steps_charged": result["steps_charged"],
        "validation_loss": result["validation_loss"],
        "unigram_loss": result["unigram_loss"],
        "nonprivate_validation_loss": result["nonprivate_validation_loss"],
        "accountant": result["accountant"],
        "key_source": result["key_source"],
        "ledger": result["ledger"],
        "ledger_head": result["ledger_head"],
        "scope": result["scope"],
        "starts": result["starts"],
        "parameters": result["parameters"],
        "population": config.data.population,
        "validation_users": result["validation_users"],
        "training_seconds": result["training_seconds"],
        "nonprivate_seconds": result.get("nonprivate_seconds"),
        "data_source": result["data_source"],
        "versions": result["versions"],
        "config_fingerprint": result["config_fingerprint"],
        "config": dataclasses.asdict(config),
        "history": result["history"],
        "nonprivate_history": result.get("nonprivate_history"),
        "rederive_epsilon": rederivation(config, result),
    }
    (run_dir / "report.html").write_text(_page(config, result, report), encoding="utf-8")
    write_json(run_dir / "report.json", report)
    return report


def _page(config: Config, result: dict[str, Any], report: dict[str, Any]) -> str:
    def row(name: str, value: Any) -> str:
        return f"<tr><td>{html.escape(name)}</td><td>{html.escape(str(value))}</td></tr>"

    nonprivate = report["nonprivate_validation_loss"]
    gain = report["unigram_loss"] - report["validation_loss"]
    rows = [
        row("Validation loss, private model", f"{report['validation_loss']:.4f} nats a byte"),
        row("Best unigram model of the validation text", f"{report['unigram_loss']:.4f}"),
        row("Private model better than unigram by", f"{gain:.4f}"),
        row(
            "Same model, same steps, without privacy",
            "not asked for" if nonprivate is None else f"{nonprivate:.4f}",
        ),
        row("Unit; adjacency", f"{report['unit']}; {report['adjacency']}"),
        row("ε spent, of target", f"{report['epsilon']:.4f} of {report['target_epsilon']:g}"),
        row("δ", f"{report['delta']:.4g}"),
        row("Noise multiplier", f"{report['noise_multiplier']:.5f}"),
        row("Sampling probability", f"{report['sampling_probability']:.5f}"),
        row("Steps; charged", f"{report['steps']}; {report['steps_charged']}"),
        row("Parameters", f"{report['parameters']:,}"),
        row("Accountant", report["accountant"]),
        row("Noise key", report["key_source"]),
        row("Ledger; scope", f"{report['ledger']}; {report['scope']}"),
        row("Starts of the program", report["starts"]),
        row("Data", f"{report['data_source']}; {report['population']:,} training units"),
        row("Training time", f"{report['training_seconds']} s"),
    ]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    insecure = config.privacy.reproducible_seed is not None
    warning = (
        '<p class="warning">This run used a reproducible key. It is a test: it protects nobody.</p>'
        if insecure
        else ""
    )
    figures = "\n".join(
        f'<figure><img alt="{html.escape(alt)}" src="{src}"></figure>'
        for alt, src in (
            ("ε over steps", _epsilon_plot(config, result)),
            ("validation loss over steps", _loss_plot(result)),
            ("δ over ε", _delta_plot(config, result)),
        )
    )
    settings = html.escape(json.dumps(dataclasses.asdict(config), indent=1))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(config.name)}</title><style>{_STYLE}</style></head><body>
<h1>{html.escape(config.name)}</h1>
<p class="note">A private training run ({html.escape(versions)})</p>
{warning}
<p class="guarantee">{html.escape(report["guarantee"])}</p>
<table>{"".join(rows)}</table>
{figures}
<h2>Re-derive ε</h2>
<p>These lines need <code>dp_accounting</code> and nothing of this library.</p>
<pre>{html.escape(report["rederive_epsilon"])}</pre>
<h2>What was released, and what was not</h2>
<p>Released: parameters and optimiser moments at each checkpoint, and what is computed from
them. Not released: per-example gradients and losses, clipped fractions, batch sizes and the
noise keys, which were never written to disk. Training losses are not shown, because they
describe training data without noise.</p>
<h2>Configuration</h2>
<pre>{settings}</pre>
</body></html>
"""
