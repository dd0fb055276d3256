"""Planted bugs: each is one line, and an audit must fail for it (docs/auditing.md, table).

An audit fails for a correct library with probability below 10⁻³ (99 % bounds, both rates),
so a bug that is not there would be "found" at that rate; what counts here is that a bug
that is there is missed with probability below 10⁻⁶: every bound below is more than five
deviations (0.031 in μ at 4,000 samples, 0.020 at 10,000) beyond the claim. Keys are fixed.
"""

import importlib
from pathlib import Path

import mutants
import pytest

from dpfa_jax import attention, keys
from dpfa_jax.accounting import convention, events
from dpfa_jax.audit import (
    attention_cases,
    audit_attention,
    audit_sampled,
    audit_training,
    sampled_cases,
    training_cases,
)
from dpfa_jax.clipping import engines, plan, tree, vmap
from dpfa_jax.clipping.tree import Clip
from dpfa_jax.mechanisms import attention as sensitivity
from dpfa_jax.mechanisms import gradient
from dpfa_jax.optim import noise
from dpfa_jax.sampling import PoissonSampler
from pallas_kernels.attention import common

# The package exports a function of the module's name.
attention_fn = importlib.import_module("dpfa_jax.attention_fn")

ATTENTION = {case.name: case for case in attention_cases()}
TRAINING = {case.name: case for case in training_cases()}


# name -> (function, its class or None, line, line with the bug, case, samples, verdict)
_ATTENTION_BUGS = {
    "noise of the numerator halved": (
        sensitivity.RecordSensitivity.numerator_std, sensitivity.RecordSensitivity,
        "return noise_multiplier * self.joint", "return noise_multiplier * self.joint / 2",
        "record, replace_one, one row", 4000, "broken",
    ),
    "noise doubled": (
        sensitivity.RecordSensitivity.numerator_std, sensitivity.RecordSensitivity,
        "return noise_multiplier * self.joint", "return noise_multiplier * self.joint * 2",
        "record, replace_one, one row", 10_000, "wasteful",
    ),
    "no noise on the sum of weights": (
        common.release_record, None,
        "noisy_l = denominator + _times(g_l, spec.denominator_std)",
        "noisy_l = denominator",
        "record, add_remove, one row", 10_000, "broken",
    ),
    "values not clipped": (
        common.clip_rows, None,
        "return value * _scale(jnp.sum(value * value, axis=-1, keepdims=True), bound)",
        "return value",
        "record, add_remove, one row", 4000, "broken",
    ),
    "logit bound ignored": (
        common.bounded_weights, None,
        "jnp.minimum(jnp.exp(jnp.where(free, logits, bound) - bound), 1.0)",
        "jnp.exp(jnp.where(seen, logits, bound) - bound)",
        "record, add_remove, one row", 4000, "broken",
    ),
    "largest logit of the data instead of the public bound": (
        common.bounded_weights, None,
        "jnp.minimum(jnp.exp(jnp.where(free, logits, bound) - bound), 1.0)",
        "jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))",
        "record, add_remove, one row", 4000, "broken",
    ),
    "replace_one with the sensitivity of one value": (
        sensitivity.record_sensitivity, None,
        "joint = max(math.hypot(2 * c, c_l * 2 * error), math.hypot(c, c_l * weight))",
        "joint = c",
        "record, replace_one, one row", 4000, "broken",
    ),
    "a sequence with half its sensitivity": (
        sensitivity.sequence_sensitivity, None,
        "return 2 * value_clip * held", "return value_clip * held",
        "sequence, replace_one, one row", 4000, "broken",
    ),
    "rows of a record not in the sensitivity": (
        sensitivity.record_sensitivity, None,
        "RecordSensitivity(rows_per_record * joint, c_l)", "RecordSensitivity(joint, c_l)",
        "record, add_remove, three rows a record", 4000, "broken",
    ),
    "rows of a record beyond the limit kept": (
        attention._keep_first_rows, None,
        ".set(rank < most)", ".set(rank >= 0)",
        "record, add_remove, three rows a record", 4000, "broken",
    ),
    "lengths ignored": (
        common.allowed_columns, None,
        "if lengths is not None:", "if False:",
        "record, replace_one, lengths", 4000, "broken",
    ),
    "mask ignored": (
        common.allowed_columns, None,
        "if mask is not None:", "if False:",
        "record, add_remove, mask", 4000, "broken",
    ),
    "NaN rows kept": (
        common.clip_rows, None,
        "value = jnp.where(jnp.isfinite(square), value, 0.0)", "value = value + 0.0 * square",
        "sequence, replace_one, not a number", 4000, "broken",
    ),
    "query heads counted as key/value heads": (
        attention.attention_event, None,
        "rows, heads = int(query_shape[1]) * calls, int(query_shape[2])",
        "rows, heads = int(query_shape[1]) * calls, int(query_shape[2]) // 2",
        "record, replace_one, grouped queries", 4000, "broken",
    ),
    "query rows not counted": (
        attention.attention_event, None,
        "rows, heads = int(query_shape[1]) * calls,", "rows, heads = calls,",
        "sequence, replace_one, grouped queries", 4000, "broken",
    ),
    "layers not counted": (
        attention.attention_event, None,
        "rows, heads = int(query_shape[1]) * calls,", "rows, heads = int(query_shape[1]),",
        "sequence, replace_one, two layers", 4000, "broken",
    ),
    "composition not counted under replace_one": (
        events.leaves, None,
        'leaves(event.event, count * _value_to_json("count", event.count))',
        "leaves(event.event, count)",
        "sequence, replace_one, grouped queries", 4000, "broken",
    ),
    "replace_one translated twice": (
        convention.to_replace_one, None,
        "return dp_accounting.GaussianDpEvent(2 * z)",
        "return dp_accounting.GaussianDpEvent(4 * z)",
        "record, replace_one, one row", 4000, "broken",
    ),
    "one noise for all heads": (
        common.numerator_noise, None,
        "child, batch, rows, heads, depth, rounds=rounds, first_head=first_head)",
        "child, batch, rows, 1, depth, rounds=rounds).repeat(heads, 2)",
        "sequence, replace_one, grouped queries", 4000, "broken",
    ),
    "one noise for all rows": (
        common.numerator_noise, None,
        "child, batch, rows, heads,", "child, batch, jnp.zeros_like(rows), heads,",
        "record, replace_one, a known twin row", 4000, "broken",
    ),
    "one noise for all elements of a batch": (
        common.numerator_noise, None,
        "child, batch, rows, heads,", "child, jnp.zeros_like(batch), rows, heads,",
        "record, replace_one, a known twin in the batch", 4000, "broken",
    ),
    "one key for all layers": (
        attention_fn._next_key, None,
        "return jax.random.fold_in(source.key, source.calls - 1)", "return source.key",
        "record, replace_one, two layers", 4000, "broken",
    ),
}  # fmt: skip


@pytest.mark.parametrize("bug", _ATTENTION_BUGS)
def test_attention(bug, monkeypatch):
    function, owner, old, new, case, samples, verdict = _ATTENTION_BUGS[bug]
    mutants.patch_line(monkeypatch, function, old, new, owner)
    key = keys.reproducible_key(900 + list(_ATTENTION_BUGS).index(bug))
    case = ATTENTION[case]
    if bug == "one key for all layers":
        # The first line of defence: a key that makes noise twice raises.
        with pytest.raises(ValueError, match="made noise before"):
            audit_attention(case, rng=keys.reproducible_key(930), samples=100)
        with keys.allow_reuse_for_tests():
            result = audit_attention(case, rng=key, samples=samples, implementation="xla")
    else:
        result = audit_attention(case, rng=key, samples=samples, implementation="xla")
    assert result.verdict == verdict, result.to_json()


_NOISE_BUGS = {
    "noise halved": (
        noise.add_noise,
        "sum_std = inflated_sum_std(std, expected_batch_size)",
        "sum_std = inflated_sum_std(std, expected_batch_size) / 2",
        "training, add_remove, one step", 4000, "broken",
    ),
    "noise of the mean added to the sum": (
        noise.add_noise,
        "sum_std = inflated_sum_std(std, expected_batch_size)",
        "sum_std = inflated_sum_std(std, 1.0)",
        "training, add_remove, one step", 4000, "broken",
    ),
    "noise on each of two devices": (
        noise.add_noise,
        "sum_std = inflated_sum_std(std, expected_batch_size)",
        "sum_std = inflated_sum_std(std, expected_batch_size) * 2**0.5",
        "training, add_remove, one step", 10_000, "wasteful",
    ),
    "one key for all steps": (
        noise._step_words,
        "keys.purpose_words(key, step, keys.GRADIENT)",
        "keys.purpose_words(key, jnp.uint32(0), keys.GRADIENT)",
        "training, add_remove, two steps", 4000, "broken",
    ),
    "the step is not counted": (
        noise.add_noise,
        "DPNoiseState(state.step + jnp.uint32(1), state.key)",
        "DPNoiseState(state.step, state.key)",
        "training, replace_one, four steps of DP AdamW", 4000, "broken",
    ),
    "one leaf goes around the noise": (
        noise._release,
        "g = first[n]", "g = first[n] * min(n, 1)",
        "training, add_remove, one step", 4000, "broken",
    ),
    "one noise for all leaves": (
        noise._release,
        "g = first[n]", "g = jnp.resize(first[0], x.shape)",
        "training, add_remove, one step", 10_000, "broken",
    ),
    "replace_one with the noise of add_remove": (
        gradient.gradient_sensitivity,
        "return adjacency_factor(adjacency) * l2_clip_norm", "return l2_clip_norm",
        "training, replace_one, one step", 4000, "broken",
    ),
}  # fmt: skip


@pytest.mark.parametrize("bug", _NOISE_BUGS)
def test_noise(bug, monkeypatch):
    function, old, new, case, samples, verdict = _NOISE_BUGS[bug]
    mutants.patch_line(monkeypatch, function, old, new)
    key = keys.reproducible_key(940 + list(_NOISE_BUGS).index(bug))
    result = audit_training(TRAINING[case], rng=key, samples=samples)
    assert result.verdict == verdict, result.to_json()


# --- clipping ---------------------------------------------------------------------------


_CLIPPING_BUGS = {
    "clip skipped": (
        Clip.factors,
        "scale = jnp.minimum(1.0, target / jnp.where(norm > 0.0, norm, 1.0))",
        "scale = jnp.ones_like(norm)",
        "training, add_remove, one step", "vmap", 4000,
    ),
    "clip of the batch, not the example": (
        vmap.clipped_sum,
        "clip_and_sum_with_norms(grads, clip, padding)",
        "clip_and_sum_with_norms([jax.numpy.where(padding, 0.0, 1.0)[None] @ g.reshape(len(g), -1)"
        " for g in grads], clip, None)\n"
        "    sums = [x.reshape(g.shape[1:]) for x, g in zip(sums, grads)]",
        "training, add_remove, one step", "vmap", 4000,
    ),
    "padding counted": (
        Clip.factors,
        "keep = keep & ~is_padding_example", "keep = keep",
        "training, add_remove, one step", "vmap", 4000,
    ),
    "mean over the actual batch size": (
        tree.clip_and_sum_with_norms,
        "weighted_sum(x, weights[g])",
        "weighted_sum(x, weights[g]) * (7.0 / jnp.sum(jnp.sign(weights[g])))",
        "training, add_remove, one step", "vmap", 4000,
    ),
    "a leaf left out of the norm": (
        Clip.factors,
        "norms.append(jnp.sqrt(sum(mine[1:], mine[0])))", "norms.append(jnp.sqrt(mine[1]))",
        "training, add_remove, one step", "vmap", 4000,
    ),
    "a tied weight's uses counted apart": (
        engines._groups,
        "for group in layouts(plan.trace.sites[leaf]):",
        "for group in ([site] for site in plan.trace.sites[leaf]):",
        "training, add_remove, a kernel used twice", "bookkeeping", 10_000,
    ),
}  # fmt: skip


@pytest.mark.parametrize("bug", _CLIPPING_BUGS)
def test_clipping(bug, monkeypatch):
    function, old, new, case, engine, samples = _CLIPPING_BUGS[bug]
    # The Gram form for every leaf that has one: small ones would be materialised.
    monkeypatch.setattr(plan, "_PREFERENCE", 1e9)
    owner = Clip if function is Clip.factors else None
    mutants.patch_line(monkeypatch, function, old, new, owner)
    key = keys.reproducible_key(960 + list(_CLIPPING_BUGS).index(bug))
    result = audit_training(TRAINING[case], rng=key, engine=engine, samples=samples)
    assert result.verdict == "broken", result.to_json()


# --- sampling -----------------------------------------------------------------------------


_SAMPLING_BUGS = {
    "shuffled batches accounted as Poisson": (
        PoissonSampler.sample,
        "join, order = map(np.asarray, _words(self._key, jnp.uint32(index), self._like))\n"
        "    chosen = np.flatnonzero(join.astype(np.uint64) < self._threshold)",
        "join, order = map(np.asarray, _words(self._key, jnp.uint32(0), self._like))\n"
        "    chosen = np.flatnonzero(join >> 30 == index)",  # an epoch is four batches
    ),
    "records join twice as often as accounted": (
        PoissonSampler.sample,
        "join.astype(np.uint64) < self._threshold", "join.astype(np.uint64) < 2 * self._threshold",
    ),
}  # fmt: skip


@pytest.mark.parametrize("bug", _SAMPLING_BUGS)
def test_sampling(bug, monkeypatch):
    function, old, new = _SAMPLING_BUGS[bug]
    mutants.patch_line(monkeypatch, function, old, new, PoissonSampler)
    case = sampled_cases()[0]
    assert (case.sampling_probability, case.steps) == (0.25, 4)
    key = keys.reproducible_key(985 + list(_SAMPLING_BUGS).index(bug))
    result = audit_sampled(case, rng=key, samples=4000)
    assert result.verdict == "broken", result.to_json()


def test_the_table_names_every_bug():
    page = (Path(__file__).parents[3] / "docs" / "auditing.md").read_text(encoding="utf-8")
    table = page[page.index("## Planted bugs") : page.index("## What is not audited")]
    bugs = [*_ATTENTION_BUGS, *_NOISE_BUGS, *_SAMPLING_BUGS, *_CLIPPING_BUGS]
    assert len(bugs) >= 35
    for bug in bugs:
        assert bug in table, bug
