"""No output is one neighbour's alone: the grid and bfloat16, and what finds it when it is."""

import importlib.util
from pathlib import Path

import mutants
import numpy as np
import pytest

from dpfa_jax.audit.outputs import off_grid, one_sided
from dpfa_jax.optim import noise

_FILE = Path(__file__).parents[3] / "benchmarks" / "audit_numerics.py"
_SPEC = importlib.util.spec_from_file_location("audit_numerics", _FILE)
numerics = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(numerics)


def test_shares_by_hand():
    assert off_grid(np.array([0.0, -3.0, 2.5, 0.1]), 0.5) == 0.25
    first, second = np.array([1.0, 1.0, 2.0, 3.0]), np.array([2.0, 2.0, 3.0, 4.0])
    assert one_sided(first, second, least=2) == 2 / 8
    assert one_sided(first, second, least=1) == 3 / 8
    assert one_sided(first, first, least=1) == 0.0


@pytest.mark.parametrize("least", [0, 1.5])
def test_bad_input(least):
    with pytest.raises(ValueError, match="least="):
        one_sided(np.zeros(3), np.zeros(3), least=least)
    with pytest.raises(ValueError, match="equally many"):
        one_sided(np.zeros(3), np.zeros(4), least=1)


def test_gradients_stay_on_the_grid():
    """Of draws where both neighbours have at least e^-1.5 of each other's probability, none that
    one has 150 times is missing from the other: by chance below exp(-30) for each value."""
    found = numerics.gradients(200_000)
    assert found["share_off_the_grid"] == [0.0, 0.0]
    assert found["share_of_one_neighbour"] == 0.0
    assert found["unrounded_share_of_one_neighbour_at_least"] > 0.2


@pytest.mark.parametrize("unit", ["record", "sequence"])
def test_attention_is_on_a_grid_or_in_bfloat16(unit):
    found = numerics.attention(100_000, unit)
    assert found["share_off_the_grid"] == [0.0, 0.0]
    assert found["share_of_one_neighbour"] == 0.0


def test_a_release_without_the_grid_is_found(monkeypatch):
    mutants.patch_line(monkeypatch, noise._release, "jnp.round(noisy / spacing) * spacing", "noisy")
    assert min(numerics.gradients(50_000)["share_off_the_grid"]) > 0.9


def test_a_cell_of_one_neighbour_is_found():
    random = np.random.default_rng(0)
    cells = np.round(random.normal(size=(2, 100_000)) * 8) / 8
    assert one_sided(cells[0], cells[1], least=150) == 0.0
    cells[1][cells[1] == 0.5] = 0.625
    assert one_sided(cells[0], cells[1], least=150) > 0.01


def test_tails_are_a_normals():
    """Three exact tests; each fails with probability 10⁻⁷."""
    assert all(t["p"] > 1e-7 for t in numerics.tails(500_000))


def test_timing_measures_every_input():
    rows = numerics.timing(2)
    assert {len(v) for v in rows.values()} == {6}
    assert all(row["median_us"] > 0 for v in rows.values() for row in v)
    assert all(0 <= row["p_against_first"] <= 1 for v in rows.values() for row in v)
    assert {name: [row["input"] for row in v] for name, v in rows.items()} == {
        "attention, records, xla": [
            "all records",
            "one record less",
            "one record",
            "a NaN record",
            "a long record",
            "subnormal values",
        ],
        "clipped_grad, auto": [
            "all examples",
            "one example less",
            "no example",
            "a NaN example",
            "a long gradient",
            "subnormal inputs",
        ],
        "clipped_grad, microbatches of 16, 64 rows": [
            f"{count} examples" for count in (64, 63, 49, 48, 16, 0)
        ],
    }
