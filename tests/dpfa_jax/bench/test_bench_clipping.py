"""``dpfa bench clipping`` on tiny shapes, and its verdicts."""

import dataclasses
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from dpfa_jax import cli
from dpfa_jax.bench import clipping, decoder, opacus_steps, steps
from dpfa_jax.bench.timing import BenchError, Plan

QUICK = Plan(samples=3, sample_seconds=1e-4, version_seconds=1.0)
SHAPE = dataclasses.replace(decoder.SMALL, layers=1, batch=2)


def test_whole_run(tmp_path, monkeypatch):
    monkeypatch.setitem(decoder.SHAPES, "small", (SHAPE,))
    few = (steps.NON_PRIVATE, steps.OURS, "jax_privacy, whole batch", "optax vmap")
    monkeypatch.setattr(steps, "VERSIONS", [v for v in steps.VERSIONS if v.name in few])
    path = tmp_path / "result.json"
    result = clipping.run(shapes="small", plan=QUICK, json_path=path, progress=lambda _: None)
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))
    (cell,) = result["cells"]
    entries = {e["name"]: e for e in cell["versions"]}
    assert set(entries) == {v.name for v in steps.VERSIONS} | set(opacus_steps.VERSIONS)
    # PyTorch is no dependency: where it is missing, the table says so.
    peers = [entries[n] for n in opacus_steps.VERSIONS]
    assert all("median_ms" in e or "not both installed" in e["error"] for e in peers)
    ours = [n for n in entries if n.startswith("dpfa") or n == steps.NON_PRIVATE]
    assert all("error" not in entries[n] for n in ours)
    assert entries[steps.NON_PRIVATE]["share"] == 1.0
    assert "engine bookkeeping" in cell["explanation"]
    assert all(t["share"] is None for t in result["targets"])  # these are about other shapes
    screen = io.StringIO()
    clipping.print_result(result, Console(file=screen, width=100))
    assert steps.OURS in screen.getvalue()


LORA = dataclasses.replace(decoder.SMALL_LORA, layers=1, batch=2)


@pytest.mark.parametrize("shape", [SHAPE, LORA], ids=["all", "LoRA"])
def test_the_steps_of_all_engines_are_the_same_step(shape):
    """Without noise, and with the same clipping: parameters agree after one step."""
    tokens = steps.make_tokens(shape)
    after = {}
    for version in steps.VERSIONS:
        if version.name in (steps.OURS_NO_NOISE, "dpfa two_pass", "dpfa vmap, microbatch of 1/4"):
            quiet = dataclasses.replace(version, noise="none")
            with jax.numpy_dtype_promotion("standard"):  # JAX compiles its bfloat16 softmax so
                state = jax.jit(steps.make_step(quiet, shape))(steps.make_state(shape), tokens)
            after[version.name] = state["adam"][0].mu
    first = after.pop(steps.OURS_NO_NOISE)
    assert len(after) == 2
    for other in after.values():
        for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True):
            largest = float(jnp.max(jnp.abs(y)))
            np.testing.assert_allclose(x, y, rtol=0, atol=5e-2 * largest + 1e-9)


def test_verdicts():
    wanted = dataclasses.asdict(decoder.GPT2_256)
    entry = {"name": steps.OURS, "share": 0.93, "memory": 1.3}
    verdicts = clipping.judge([{"shape": wanted, "versions": [entry]}])
    first = next(v for v in verdicts if v["name"] == str(decoder.GPT2_256))
    assert first["must_reached"] is True
    assert first["aim_reached"] is False
    assert first["memory_must_reached"] is False
    assert all(v["share"] is None for v in verdicts if v is not first)


def test_what_cannot_be_measured(capsys):
    if jax.default_backend() == "cpu":
        with pytest.raises(BenchError, match="need an accelerator"):
            clipping.choose_shapes("all", None)
    with pytest.raises(BenchError, match=r"--batch 0: allowed is"):
        clipping.choose_shapes("small", 0)
    assert cli.main(["bench", "clipping", "--shapes", "small", "--only", "none"]) == 2
    assert "--only 'none': none of the shapes" in capsys.readouterr().err


def test_shapes_are_those_of_the_models():
    def count(shape):
        made = jax.eval_shape(lambda: decoder.init(shape, jax.random.key(0)))["base"]
        return sum(x.size for x in jax.tree.leaves(made))

    assert 1.23e8 < count(decoder.GPT2_256) < 1.26e8
    assert 1.29e9 < count(decoder.LARGE) < 1.33e9
