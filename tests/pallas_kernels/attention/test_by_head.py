"""Heads with options of their own: each is what a call with its options for all gives it.

That kernels number heads from ``first_head`` on is tested in test_interpreted.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels.attention import AttentionSpec, attention, attention_by_head
from pallas_kernels.attention.by_head import _pieces

WORDS = jnp.arange(1, 9, dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)
SPECS = {
    "record": AttentionSpec(
        mode="record", scale=0.3, value_clip=2.0, logit_bound=0.4, numerator_std=0.7,
        denominator_std=0.6, denominator_floor=0.9, rounds="threefry",
    ),
    "sequence": AttentionSpec(
        mode="sequence", scale=0.3, value_clip=2.0, numerator_std=0.7, rounds="threefry"
    ),
}  # fmt: skip
# Six heads on two: a run over a border, a whole key head, and parts of one.
FACTORS = (1.0, 2.0, 2.0, 2.0, 0.5, 3.0)
FAST = {"xla_backend_optimization_level": 0}


def by_head(mode, factors):
    spec = SPECS[mode]
    return [
        dataclasses.replace(
            spec, numerator_std=f * spec.numerator_std, denominator_std=f * spec.denominator_std
        )
        for f in factors
    ]


def make_inputs(heads=6, kv_heads=2, depth=8):
    random = np.random.default_rng(0)
    shapes = [(2, 5, heads, depth), (2, 7, kv_heads, depth), (2, 7, kv_heads, depth)]
    return [jnp.asarray(random.normal(size=s), jnp.float32) for s in shapes]


def with_gradients(run, inputs):
    @functools.partial(jax.jit, compiler_options=FAST)
    def both(*x):
        out, pull = jax.vjp(run, *x)
        return out, pull(jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape))[0]

    return both(*inputs)


@pytest.mark.parametrize(
    ("name", "mode", "masked"),
    [("xla", "record", True), ("xla", "sequence", False), ("reference", "record", False)],
)
def test_a_head_is_that_of_a_call_with_its_options(name, mode, masked):
    inputs, specs = make_inputs(), by_head(mode, FACTORS)
    mask = jnp.asarray(np.random.default_rng(1).random((1, 6, 5, 7)) < 0.7) if masked else None
    options = {"key_words": WORDS, "mask": mask, "implementation": name}
    got = with_gradients(lambda *x: attention_by_head(*x, specs, **options), inputs)
    for spec in set(specs):
        want = with_gradients(lambda *x, s=spec: attention(*x, s, **options), inputs)
        for head in (n for n in range(6) if specs[n] == spec):
            for ours, theirs in zip(got, want, strict=True):  # the output, and dq
                np.testing.assert_allclose(ours[:, :, head], theirs[:, :, head], atol=2e-3)


def test_lanes_and_heads_all_have_their_own_noise():
    query, key, value = make_inputs(4)
    many = jnp.broadcast_to(query[:, :1, :1], (3, 2, 4, 4, 8))
    key, value = (x[:, :, :1].repeat(2, 2) for x in (key, value))
    specs = by_head("sequence", (1.0, 1.0, 2.0, 1.0))

    @functools.partial(jax.jit, compiler_options=FAST)
    def noise(many):
        exact = AttentionSpec(mode="exact", scale=0.3)
        noisy = jax.vmap(lambda q: attention_by_head(q, key, value, specs, key_words=WORDS))(many)
        return noisy - jax.vmap(lambda q: attention(q, key, value, exact))(many)

    stds = np.array([s.numerator_std for s in specs])[:, None]
    found = np.round(np.asarray(noise(many)) / stds, 3)[..., 0].reshape(-1)
    # 96 draws in bins of 0.001: few coincide, and a repeated noise would halve the values.
    assert len(set(found.tolist())) > 85


@given(
    st.integers(1, 4), st.lists(st.integers(1, 3), min_size=1, max_size=6), st.data()
)  # fmt: skip
def test_pieces_cover_every_head_once_and_fit_the_key_heads(groups, kinds, data):
    heads = groups * len(kinds)
    choices = data.draw(st.lists(st.sampled_from(kinds), min_size=heads, max_size=heads))
    specs = by_head("sequence", [float(c) for c in choices])
    numbered = []
    for piece in _pieces(specs, groups):
        wanted = range(piece.heads.start, piece.heads.stop)
        numbered += wanted
        assert all(specs[n] == piece.spec for n in wanted)
        read = {n // groups for n in wanted}
        assert sorted(read) == list(range(piece.kv_heads.start, piece.kv_heads.stop))
        # Within the piece every key head has equally many query heads, in order.
        each = len(wanted) // len(read)
        assert [n // groups - piece.kv_heads.start for n in wanted] == [
            i // each for i in range(len(wanted))
        ]
    assert numbered == list(range(heads))


def test_another_number_of_specs_is_refused():
    with pytest.raises(ValueError, match="5 specs for 6 query heads"):
        attention_by_head(*make_inputs(), by_head("record", FACTORS[:5]), key_words=WORDS)
