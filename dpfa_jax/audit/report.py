"""The audit as one self-contained HTML page: what was attacked, and how far each attack got."""

import base64
import html
import io
from typing import Any

import matplotlib.figure
import numpy as np
from matplotlib.axes import Axes

from dpfa_jax.audit.chat import ChatAudit, Secret
from dpfa_jax.audit.curves import Claim
from dpfa_jax.audit.result import AuditResult
from dpfa_jax.audit.suite import Finding

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2530; background: #fff;
       max-width: 1000px; margin: 2.5rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
.holds { border-left: 4px solid #0b6e4f; background: #f0f7f4; padding: .8rem 1.1rem; }
.fails { border-left: 4px solid #b3261e; background: #fdf1f0; padding: .8rem 1.1rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
td, th { text-align: left; padding: .3rem .5rem; border-bottom: 1px solid #dde3e8; }
td { font-variant-numeric: tabular-nums; } tr.bad td { background: #fdf1f0; }
figure { margin: 1.2rem 0; } img { width: 100%; height: auto; }
figcaption, p.note { color: #56616d; font-size: .9rem; }
"""
_GREEN, _RED, _GREY = "#0b6e4f", "#b3261e", "#6b7785"


def _histogram(axes: Axes, result: AuditResult) -> None:
    both = np.concatenate([result.negatives, result.positives])
    low, high = np.quantile(both, [0.0005, 0.9995])
    edges = np.linspace(low, max(high, low + 1e-6), 61)
    for scores, color, label in (
        (result.negatives, _GREY, "without the record"),
        (result.positives, _GREEN, "with it"),
    ):
        counts, _ = np.histogram(scores, edges)
        axes.stairs(counts / scores.size, edges, color=color, label=label, fill=True, alpha=0.45)
    axes.axvline(result.bound.threshold, color=_RED, linewidth=1, linestyle="--")
    axes.set_title("Scores (in deviations of the noise)", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8)


def _roc(axes: Axes, result: AuditResult) -> None:
    """The attack's curve, and the highest that any attack can reach if the claim holds."""
    thresholds = np.quantile(np.concatenate([result.negatives, result.positives]), _SHARES)
    false, true = (
        1.0 - np.searchsorted(np.sort(x), thresholds, side="right") / x.size
        for x in (result.negatives, result.positives)
    )
    alpha = np.concatenate([np.geomspace(1e-6, 0.02, 60), np.linspace(0.02, 1.0, 140)])
    least = Claim(result.event, result.adjacency).least_false_negatives(alpha)
    axes.plot(alpha, 1.0 - least, color=_RED, label="what the claim's (ε, δ) curve allows")
    axes.plot(false, true, color=_GREEN, label="the attack")
    axes.plot([0, 1], [0, 1], color=_GREY, linewidth=1, linestyle=":", label="guessing")
    axes.set_title("True over false positives", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="lower right")


_SHARES = np.linspace(0.0, 1.0, 201)


def _figure(result: AuditResult) -> str:
    figure = matplotlib.figure.Figure(figsize=(9.2, 2.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    _histogram(left, result)
    _roc(right, result)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    picture = base64.b64encode(buffer.getvalue()).decode()
    name = html.escape(result.name)
    bound = result.bound
    return (
        f'<figure><img alt="{name}" src="data:image/svg+xml;base64,{picture}"><figcaption>'
        f"<b>{name}</b>: {result.verdict}. ε ≥ {result.epsilon:.3f} at {bound.confidence:.6g} "
        f"confidence, claimed {result.claim:.3f} (δ = {result.delta:g}); "
        f"{bound.false_positives} of {bound.negatives} false positives, {bound.false_negatives} "
        f"of {bound.positives} false negatives.</figcaption></figure>"
    )


def exposure_plot(axes: Axes, secrets: list[Secret], epsilon: float) -> None:
    """Exposure of each planted secret against how many units wrote it."""
    levels = sorted({s.writers for s in secrets})
    for shift, field, color, label in (
        (-0.12, 3, _RED, "trained without privacy"),
        (0.12, 2, _GREEN, f"trained with ε = {epsilon:.3g}"),
    ):
        x = [levels.index(s.writers) + shift for s in secrets]
        axes.plot(x, [s[field] for s in secrets], "o", color=color, alpha=0.7, label=label)
    axes.axhline(1.0, color=_GREY, linewidth=1, linestyle=":", label="never seen (median)")
    axes.set_xticks(range(len(levels)), [str(n) for n in levels])
    axes.set_xlabel("units that wrote the secret", fontsize=9)
    axes.set_ylabel("exposure (bits)", fontsize=9)
    axes.set_title("Planted secrets", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8)


def _chat(chat: ChatAudit) -> str:
    """The trained model: canaries of one run, and what it knows of planted secrets."""
    figure = matplotlib.figure.Figure(figsize=(9.2, 3.3), layout="constrained")
    left, right = figure.subplots(1, 2)
    both = np.concatenate([chat.joined, chat.absent])
    edges = np.linspace(both.min(), both.max() + 1e-9, 31)
    for scores, color, label in (
        (chat.absent, _GREY, "did not join"),
        (chat.joined, _GREEN, "joined"),
    ):
        counts, _ = np.histogram(scores, edges)
        left.stairs(counts, edges, color=color, label=label, fill=True, alpha=0.45)
    left.set_title("Scores of the canaries", loc="left", fontsize=10)
    left.legend(frameon=False, fontsize=8)
    exposure_plot(right, chat.secrets, chat.claim)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    picture = base64.b64encode(buffer.getvalue()).decode()
    guesses = chat.guesses
    return f"""<h2>The trained model</h2>
<p>One private training run with {guesses.canaries} canaries, each in the data by a fair coin: of
{guesses.made} guesses {guesses.right} were right. At {chat.confidence:g} confidence ε ≥
{chat.epsilon:.3f} (f-DP, the accountant's curve), ≥ {chat.epsilon_gaussian:.3f} (as if Gaussian), ≥
{chat.epsilon_steinke:.3f} (Steinke et al.), claimed {chat.claim:.3f} (δ = {chat.delta:g}). Bytes of
held-out users cost {chat.losses[0]:.3f} nats with privacy and {chat.losses[1]:.3f} without.</p>
<figure><img alt="canaries and secrets" src="data:image/svg+xml;base64,{picture}"><figcaption>
Exposure n means that the model finds one code in 2ⁿ as likely as the planted one. A secret that one
unit wrote should be like one that nobody wrote; what many units wrote is no longer one unit's.
</figcaption></figure>"""


def page(findings: list[Finding], facts: dict[str, Any], chat: ChatAudit | None = None) -> str:
    """The page. ``facts`` is what :func:`dpfa_jax.audit.suite.to_json` returned."""
    results = [f.result for f in findings if f.result is not None]
    failed = facts["failed"]
    summary = (
        f"{len(failed)} of {len(results) + (chat is not None)} claims FAIL: "
        f"{html.escape('; '.join(failed))}"
        if failed
        else f"All {len(results)} claims hold: no attack passed its claim, and every tight one "
        "came near."
    )
    rows = []
    for f in findings:
        name = html.escape(f.name)
        r = f.result
        if r is None:
            rows.append(f"<tr><td>{name}</td><td>refused</td><td colspan=4></td></tr>")
            continue
        ratio = f"{r.ratio:.3f}" + ("" if r.is_tight else " (not tight)")
        rows.append(
            f"<tr{'' if r.passed else ' class=bad'}><td>{name}</td><td>{r.verdict}</td>"
            f"<td>{r.claim:.3f}</td><td>{r.epsilon:.3f}</td><td>{ratio}</td>"
            f"<td>{r.samples:,}</td></tr>"
        )
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    confidence = f"{results[0].bound.confidence:g}" if results else "–"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Privacy audit</title><style>{_STYLE}</style></head><body>
<h1>Privacy audit{html.escape(f": {facts['config']}") if "config" in facts else ""}</h1>
<p class="note">{html.escape(versions)}; {html.escape(facts["device"])}; {facts["date"]};
noise keys: {html.escape(facts["noise"])}</p>
<p class="{"fails" if failed else "holds"}">{summary}</p>
<p>Each line is an attack on real releases under two neighbouring inputs. From its errors follows
a lower bound on ε that is wrong with probability at most 1 − {confidence}. A claim fails if the
bound passes it, or if an attack that can reach the claim stays far below it. An audit can refute
a claim; it cannot prove one. The command was <code>{html.escape(facts["command"])}</code>.</p>
<table><tr><th>attack</th><th>verdict</th><th>ε claimed</th><th>ε at least</th><th>ratio</th>
<th>samples</th></tr>{"".join(rows)}</table>
<h2>Scores and curves</h2>
{"".join(_figure(r) for r in results)}
{"" if chat is None else _chat(chat)}
</body></html>
"""
