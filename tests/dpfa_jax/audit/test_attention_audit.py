"""Attention's claims under attack. ``dpfa audit`` runs every case; here is one of each kind."""

import numpy as np
import pytest

from dpfa_jax import keys
from dpfa_jax.audit import AttentionCase, attention_cases, audit_attention

CASES = {case.name: case for case in attention_cases()}


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        ("record, add_remove, one row", "reference"),
        ("record, add_remove, three rows a record", "xla"),
        ("record, add_remove, grouped queries", "xla"),
        ("record, add_remove, causal", "xla"),
        ("record, add_remove, a known twin in the batch", "xla"),
        ("record, replace_one, lengths", "xla"),
        ("record, replace_one, mask", "reference"),
        ("record, replace_one, two layers", "xla"),
        ("record, add_remove, one row, bfloat16", "xla"),
        ("record, replace_one, causal, bfloat16", "xla"),
        ("record, replace_one, not a number", "xla"),
        ("sequence, replace_one, grouped queries", "xla"),
        ("sequence, replace_one, 8 rounds", "reference"),
    ],
)
def test_claims_stand(name, implementation, stands):
    key = keys.reproducible_key(700 + list(CASES).index(name))
    result = audit_attention(CASES[name], rng=key, implementation=implementation)
    assert result.name == f"{name}, {implementation}"
    stands(result)


def test_cases_cover_what_is_promised():
    """Units, adjacencies, groups, masks, lengths, causal, records of several rows, layers."""
    cases = attention_cases()
    assert {(c.unit, c.adjacency) for c in cases} == {
        ("record", "add_remove"),
        ("record", "replace_one"),
        ("sequence", "replace_one"),
    }
    for adjacency in ("add_remove", "replace_one"):
        records = [c for c in cases if c.unit == "record" and c.adjacency == adjacency]
        assert {c.hidden for c in records} == {None, "lengths", "mask"}
        assert {c.is_causal for c in records} == {False, True}
        assert max(c.rows_per_record for c in records) > 1
        assert any(c.kv_heads < c.heads for c in records)
        assert max(c.calls for c in records) > 1
    assert all({"xla", "reference"} <= set(c.implementations()) for c in cases)
    # Kernels that take only 16 bits, and no mask, meet all else that is attacked in float32.
    names = {c.name: c.dtype for c in cases}
    for case in cases:
        if case.dtype == "float32" and case.hidden != "mask" and case.rows_per_record == 1:
            assert names[f"{case.name}, bfloat16"] == "bfloat16"


def test_bad_input():
    case = attention_cases()[0]
    key = keys.reproducible_key(1)
    for samples in (19, 0, 1e4, True):
        with pytest.raises(ValueError, match="samples"):
            audit_attention(case, rng=key, samples=samples)
    for mu in (0.0, -1.0, float("inf"), "1"):
        with pytest.raises(ValueError, match="mu"):
            audit_attention(case, rng=key, mu=mu)
    with pytest.raises(ValueError, match="rng=None"):
        audit_attention(case, rng=None)
    with pytest.raises(ValueError, match="implementation='no'"):
        audit_attention(case, rng=keys.reproducible_key(2), samples=100, implementation="no")


def test_a_key_serves_one_audit():
    case = AttentionCase(name="a test", unit="sequence", adjacency="replace_one")
    key = keys.reproducible_key(720)
    first = audit_attention(case, rng=key, samples=50)
    assert np.unique(np.concatenate([first.negatives, first.positives])).size == 100
    with pytest.raises(ValueError, match="made noise before"):
        audit_attention(case, rng=key, samples=50)
