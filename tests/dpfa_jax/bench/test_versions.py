"""What is timed computes what it says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpfa_jax.bench import attention, cases, ours, peers
from dpfa_jax.bench.cases import Shape, make_case
from pallas_kernels.attention import attention as attend

SHAPE = Shape(2, 32, 2, 64, True)


@pytest.fixture(scope="module")
def case():
    return make_case(SHAPE, "forward+backward")


def test_standard_shapes():
    sizes = {(s.batch, s.length, s.heads, s.head_dim) for s in cases.ALL}
    assert sizes == {
        (4, 4096, 16, 128), (4, 4096, 32, 64), (16, 1024, 16, 128), (1, 16384, 16, 128),
        (64, 256, 16, 64), (1, 65536, 16, 128),
    }  # fmt: skip
    assert len(cases.ALL) == 12


def test_flops():
    assert Shape(4, 4096, 16, 128, False).flops("forward") == pytest.approx(5.5e11, rel=1e-2)
    causal = Shape(4, 4096, 16, 128, True)
    assert causal.flops("forward+backward") == pytest.approx(5.5e11 * 3.5 / 2, rel=1e-2)


@pytest.mark.parametrize("shape", [*cases.SMALL, Shape(1, 512, 4, 128, False)])
def test_norms_keep_their_promise(shape):
    case = make_case(shape, "forward")
    q, k = (np.asarray(x, np.float64) for x in (case.query, case.key))
    norms = np.linalg.norm(q, axis=-1).max() * np.linalg.norm(k, axis=-1).max()
    assert 0.9 * cases.LOGIT_BOUND < shape.scale * norms <= cases.LOGIT_BOUND
    assert np.abs(np.asarray(case.value, np.float32)).max() > 1.0


def test_the_bound_from_norms_changes_no_result(case):
    def run(bound_logits):
        spec = ours.record_spec(SHAPE, rounds=8, bound_logits=bound_logits)
        return attend(case.query, case.key, case.value, spec, key_words=case.key_words)

    np.testing.assert_array_equal(*(np.asarray(run(b), np.float32) for b in (True, False)))


def test_record_spec_has_the_noise_of_the_public_op():
    spec = ours.record_spec(SHAPE, rounds=20)
    assert (spec.mode, spec.rounds, spec.bound_logits, spec.is_causal) == ("record", 20, True, True)
    # C = 8, d = 64, add/remove: Δ = C·√(1 + 1/√d), and a little for rounding.
    assert spec.numerator_std == pytest.approx(8.0 * np.sqrt(1 + 1 / 8.0), rel=2e-2)
    assert spec.denominator_std == pytest.approx(spec.numerator_std / (8.0 * 64**-0.25), rel=2e-2)


def test_forward_and_backward_of_our_version(case):
    version = next(v for v in ours.VERSIONS if v.name == ours.EXACT)
    runnable = version.prepare(case)()
    spec = ours.exact_spec(SHAPE)
    inputs = [x.astype(jnp.float32) for x in (case.query, case.key, case.value)]
    out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, spec, implementation="reference"), *inputs)
    for got, want in zip(runnable.call(), (out, *pull(case.d_out.astype(out.dtype))), strict=True):
        error = np.linalg.norm(np.asarray(got, np.float32) - want) / np.linalg.norm(want)
        assert error < 1e-2


def test_forward_alone_returns_the_output():
    version = next(v for v in ours.VERSIONS if v.name == ours.CHACHA20)
    out = version.prepare(make_case(SHAPE, "forward"))().call()
    assert out.shape == (2, 32, 2, 64)


def test_names_are_different():
    names = [v.name for v in attention.VERSIONS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("std", [0.0, 0.5])
def test_separate_steps(case, monkeypatch, std):
    # cuDNN is not here; its place is taken by what it would compute.
    original = jax.nn.dot_product_attention

    def stand_in(q, k, v, *, implementation, **more):
        assert implementation == "cudnn"
        arrays = (x.astype(jnp.float32) for x in (q, k, v))
        return original(*arrays, implementation="xla", **more).astype(q.dtype)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    run = functools.partial(peers.clip_then_noise, scale=SHAPE.scale, is_causal=True, std=std)
    v = case.value.astype(jnp.float32)
    norms = np.linalg.norm(v, axis=-1, keepdims=True)
    assert (norms > peers.VALUE_CLIP).any()
    clipped = v * np.minimum(1.0, peers.VALUE_CLIP / norms)
    spec = ours.exact_spec(SHAPE)
    want = attend(case.query.astype(v.dtype), case.key.astype(v.dtype), clipped, spec)
    got = run(case.query, case.key, case.value, jax.random.key(0))
    rest = np.asarray(got, np.float32) - want
    assert np.std(rest) == pytest.approx(std, rel=0.05, abs=3e-3)
