"""A million Gaussians pass; generators with one planted fault each fail where they should."""

import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

DRAWS = 1_000_000


@pytest.fixture(scope="module")
def statistics():
    path = Path(__file__).parents[2] / "benchmarks" / "noise_statistics.py"
    spec = importlib.util.spec_from_file_location("noise_statistics", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_million_gaussians_pass(statistics, tmp_path, capsys):
    out = tmp_path / "results" / "noise.json"
    arguments = ["--draws", str(DRAWS), "--rounds", "8", "12", "20", "--json", str(out)]
    assert statistics.main(arguments) == 0
    written = json.loads(out.read_text())
    assert written["passed"]
    assert [r["generator"] for r in written["results"]] == ["ChaCha8", "ChaCha12", "ChaCha20"]
    tests = [test for r in written["results"] for test in r["tests"]]
    assert all(test["passed"] for test in tests)
    assert written["smallest_p_value_allowed"] * len(tests) == pytest.approx(1e-6)
    # p-values of a perfect generator are spread over (0, 1), not stuck at its ends.
    assert 0.3 < sum(test["p_value"] for test in tests) / len(tests) < 0.7
    for result in written["results"]:
        assert result["draws"] >= DRAWS
        names = [test["name"] for test in result["tests"]]
        assert len(set(names)) == len(names) == 1 + 10 + 2 * 11
        assert {"Kolmogorov-Smirnov", "beyond 5 sigma", "beyond -5 sigma"} <= set(names)
    assert set(written["versions"]) == {"python", "jax", "jaxlib", "numpy", "scipy"}
    assert written["device"] == jax.devices()[0].device_kind
    assert "passed at p >= 1e-08" in capsys.readouterr().out


# --- planted faults ---------------------------------------------------------------------


def _ideal(key_words, batch, rows, heads, columns, rounds):
    """A quick generator with the same arguments; the faults are planted into it."""
    key = jax.random.wrap_key_data(key_words[:2], impl="threefry2x32")
    key = jax.random.fold_in(key, rows[0])
    return jax.random.normal(key, (batch.size, rows.size, heads, columns), jnp.float32)


def _changed(change):
    return lambda *arguments, rounds: change(_ideal(*arguments, rounds))


def _same_for_all_keys(key_words, *arguments, rounds):
    return _ideal(jnp.zeros_like(key_words), *arguments, rounds)


def _half_circle(*arguments, rounds):
    """Partners 8 columns apart have one radius but too few angles: uncorrelated, dependent."""
    x = _ideal(*arguments, rounds)
    pair = x.reshape(*x.shape[:-1], -1, 2, 8)
    radius = jnp.sqrt(jnp.sum(pair**2, axis=-2))
    corner = jnp.sign(pair) * (radius * jnp.float32(0.5**0.5))[..., None, :]
    return corner.reshape(x.shape)


FAULTS = {
    "2% too much noise": (_changed(lambda x: x * 1.02), "Kolmogorov-Smirnov"),
    "shifted": (_changed(lambda x: x + 0.01), "Kolmogorov-Smirnov"),
    "tail cut at 4": (_changed(lambda x: jnp.clip(x, -3.99, 3.99)), "beyond 4 sigma"),
    "lower tail doubled at 3": (
        _changed(lambda x: jnp.where(x < -2.8, x - 0.3, x)),
        "beyond -3 sigma",
    ),
    "tail made heavy": (_changed(lambda x: jnp.where(abs(x) > 4, x + 1, x)), "beyond 5 sigma"),
    "the key is ignored": (_same_for_all_keys, "correlation, calls"),
    "batch is ignored": (
        _changed(lambda x: jnp.broadcast_to(x[:1], x.shape)),
        "correlation, batch",
    ),
    "rows come twice": (_changed(lambda x: x[:, jnp.arange(x.shape[1]) // 2]), "correlation, rows"),
    "rows repeat": (
        _changed(lambda x: x[:, jnp.arange(x.shape[1]) % 8]),
        "correlation, rows, 8 apart",
    ),
    "heads are shared": (
        _changed(lambda x: x[:, :, jnp.arange(x.shape[2]) % 4]),
        "correlation, heads, 4 apart",
    ),
    "heads leak": (_changed(lambda x: x + 0.02 * jnp.roll(x, 1, axis=2)), "correlation, heads"),
    "tiles repeat": (
        _changed(lambda x: x[..., jnp.arange(x.shape[3]) % 128]),
        "correlation, columns, 128 apart",
    ),
    "mirrored columns": (
        _changed(lambda x: x * jnp.where(jnp.arange(x.shape[3]) % 16 < 8, 1.0, 0.0)
                 - jnp.roll(x, 8, 3) * jnp.where(jnp.arange(x.shape[3]) % 16 < 8, 0.0, 1.0)),
        "correlation, columns, 8 apart",
    ),
    "four angles": (_half_circle, "of squares, columns, 8 apart"),
    "noise level by row": (
        _changed(lambda x: x * (1 + 0.1 * jnp.abs(x[..., :1]))),
        "of squares, columns",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(statistics, fault):
    make, where = FAULTS[fault]
    drawn, tests = statistics.measure(20, DRAWS, seed=0, make=make)
    assert drawn >= DRAWS
    p_values = {test["name"]: test["p_value"] for test in tests}
    assert p_values[where] < 1e-8


def test_the_quick_generator_passes_without_a_fault(statistics):
    make = _changed(lambda x: x)
    assert min(t["p_value"] for t in statistics.measure(20, DRAWS, seed=0, make=make)[1]) > 1e-8


def test_a_generator_that_fails_or_gives_nan_is_reported(statistics, monkeypatch, capsys):
    bad = {"name": "planted", "p_value": 0.0}
    good = {"name": "good", "p_value": 0.5}
    for value in (0.0, float("nan")):
        bad["p_value"] = value
        outcome = (DRAWS, [dict(good), dict(bad)])
        monkeypatch.setattr(statistics, "measure", lambda *a, outcome=outcome: outcome)
        assert statistics.main(["--draws", "1", "--rounds", "20"]) == 1
        assert 'FAILED {"name": "planted"' in capsys.readouterr().out


def test_every_chunk_draws_other_rows(statistics, monkeypatch):
    """The same rows in every chunk would count each Gaussian many times."""
    seen = []
    chunk = statistics.chunk

    def spy(keys, first_row, rows, rounds, make):
        seen.append((int(first_row), rows))
        return chunk(keys, first_row, rows, rounds, make)

    monkeypatch.setattr(statistics, "chunk", spy)
    monkeypatch.setattr(statistics, "MOST_ROWS", 16)
    drawn, _ = statistics.measure(8, 3 * 16 * statistics.PER_ROW - 5, seed=1)
    assert seen == [(0, 16), (16, 16), (32, 16)]
    assert drawn == 48 * statistics.PER_ROW


@pytest.mark.parametrize("arguments", [["--draws", "0"], ["--rounds", "7"]])
def test_bad_arguments_stop_before_anything_is_drawn(statistics, capsys, arguments):
    with pytest.raises(SystemExit):
        statistics.main(arguments)
    assert "allowed" in capsys.readouterr().err
