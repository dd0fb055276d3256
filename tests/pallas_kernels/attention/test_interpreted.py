"""Kernels through the public function, in Pallas's interpreter: one small shape each.

How they compute is tested in test_triton.py and test_mosaic_tpu.py; here, that the entry
point, the padding, the noise and JAX's transformations fit around them.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import AttentionSpec, attention

WORDS = jnp.arange(1, 9, dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)
NUMBERS = {"value_clip": 2.0, "numerator_std": 0.7, "grid": None, "rounds": 8}
SPECS = {
    "exact": AttentionSpec(mode="exact", scale=0.3, is_causal=True),
    "record": AttentionSpec(
        mode="record",
        scale=0.3,
        logit_bound=0.4,
        denominator_std=0.6,
        denominator_floor=0.9,
        **NUMBERS,
    ),
    "sequence": AttentionSpec(mode="sequence", scale=0.3, window=(4, 1), **NUMBERS),
}
# Most of the time goes into compiling: the interpreter makes long programs.
FAST = {"xla_backend_optimization_level": 0}


def make_inputs(*lead):
    """q, k, v and the cotangent: T = 5, S = 7, two heads on one, and a depth to be padded."""
    random = np.random.default_rng(0)
    shapes = [(*lead, 1, 5, 2, 6), (*lead, 1, 7, 1, 6), (*lead, 1, 7, 1, 6), (*lead, 1, 5, 2, 6)]
    return [jnp.asarray(random.normal(size=s), jnp.float32) for s in shapes]


@functools.partial(
    jax.jit, static_argnames=("spec", "name", "interpret", "wrap"), compiler_options=FAST
)
def run(q, k, v, dout, *, spec, name, interpret, wrap=lambda f: f):
    """The output, and the gradients for ``dout``."""

    def call(q, k, v):
        return attention(
            q,
            k,
            v,
            spec,
            key_words=WORDS if spec.is_noisy else None,
            lengths=jnp.asarray([6], jnp.int32),
            implementation=name,
            interpret=interpret,
            first_head=3 if spec.is_noisy else 0,  # a part of a call, see by_head.py
        )

    out, pull = jax.vjp(wrap(call), q, k, v)
    return (out, *pull(dout))


def compare(name, inputs, spec, **options):
    ours = run(*inputs, spec=spec, name=name, interpret=True, **options)
    definition = run(*inputs, spec=spec, name="reference", interpret=False, **options)
    for got, expected, like in zip(ours, definition, (inputs[3], *inputs[:3]), strict=True):
        assert got.shape == like.shape
        size = float(jnp.abs(expected).max())
        assert size > 0
        np.testing.assert_allclose(got, expected, atol=2e-5 * size)


@pytest.mark.parametrize("name", ["triton", "mosaic_tpu"])
class TestInterpreted:
    @pytest.mark.parametrize("mode", SPECS)
    def test_jit_and_gradients(self, name, mode):
        compare(name, make_inputs(), SPECS[mode])

    def test_vmap_numbers_the_lanes_as_the_definition_does(self, name):
        compare(name, make_inputs(2), SPECS["record"], wrap=jax.vmap)

    def test_checkpoint(self, name):
        compare(name, make_inputs(), SPECS["sequence"], wrap=jax.checkpoint)


def test_sequence_outputs_lie_on_the_public_grid():
    """TPU; for Triton's, see test_triton.py."""
    spec = dataclasses.replace(SPECS["sequence"], grid=6)
    out = run(*make_inputs(), spec=spec, name="mosaic_tpu", interpret=True)[0]
    steps = np.asarray(out, np.float64) / spec.spacing(spec.numerator_std)
    assert len(np.unique(steps)) > 20
    np.testing.assert_array_equal(steps, np.round(steps))
