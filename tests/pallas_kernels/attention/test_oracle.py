"""The oracle's hand-written backward against numerical differences of its forward."""

import numpy as np
import pytest

from pallas_kernels.attention import AttentionSpec

SPECS = {
    "exact": AttentionSpec(mode="exact", scale=0.4),
    "record": AttentionSpec(
        mode="record",
        scale=0.4,
        value_clip=1.8,
        logit_bound=0.5,
        numerator_std=0.7,
        denominator_std=0.6,
        denominator_floor=1.7,
    ),
    "sequence": AttentionSpec(mode="sequence", scale=0.4, value_clip=1.8, numerator_std=0.7),
}


@pytest.mark.parametrize("mode", SPECS)
def test_backward_is_the_derivative_of_the_forward(oracle, mode):
    random = np.random.default_rng(5)
    batch, num_rows, num_keys, heads, kv_heads, depth = 2, 3, 4, 4, 2, 3
    x = [
        random.normal(size=(batch, num_rows, heads, depth)),
        random.normal(size=(batch, num_keys, kv_heads, depth)),
        1.1 * random.normal(size=(batch, num_keys, kv_heads, depth)),
    ]
    dout = random.normal(size=x[0].shape)
    noise = random.normal(size=x[0].shape), random.normal(size=x[0].shape[:3])
    allowed = oracle.visible((batch, heads, num_rows, num_keys), lengths=(4, 3))

    def forward(*x):
        return oracle.attention(*x, SPECS[mode], allowed=allowed, dout=dout, noise=noise)

    result = forward(*x)
    if mode == "record":
        assert 0 < result.clamped < 1
        assert 0 < result.at_floor < 1
    if mode != "exact":
        assert 0 < result.clipped < 1
    step = 1e-6
    for i, gradient in enumerate(result.grads):
        numerical = np.zeros_like(x[i])
        for at in np.ndindex(x[i].shape):
            ends = []
            for sign in (1, -1):
                moved = [a.copy() for a in x]
                moved[i][at] += sign * step
                ends.append(np.sum(forward(*moved).out * dout))
            numerical[at] = (ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose(gradient, numerical, atol=1e-7)


def test_visible_is_the_union_of_all_restrictions(oracle):
    shape = (2, 1, 3, 4)
    mask = np.ones((1, 1, 1, 4), bool)
    mask[..., 0] = False
    got = oracle.visible(shape, is_causal=True, window=(1, 0), lengths=(4, 2), mask=mask)
    assert got[0, 0].astype(int).tolist() == [[0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0]]
    assert got[1, 0].astype(int).tolist() == [[0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0]]
