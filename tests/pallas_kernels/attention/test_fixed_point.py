"""The units of the fixed-point sums: no overflow, and what the sensitivity counts on."""

import math

import jax
import jax.numpy as jnp
from hypothesis import given, settings
from hypothesis import strategies as st

from dpfa_jax.mechanisms import record_sensitivity
from pallas_kernels.attention import AttentionSpec, common, mosaic_gpu

CLIPS = st.floats(1e-6, 1e6)
KEYS = st.integers(1, 2**20)


def spec(clip, std):
    return AttentionSpec(mode="record", scale=1.0, value_clip=clip, numerator_std=std)


@given(clip=CLIPS, num_keys=KEYS)
@settings(deadline=None, max_examples=300)
def test_all_keys_at_the_bound_fit_thirty_bits(clip, num_keys):
    unit = common.fixed_point_unit(clip, num_keys)
    assert clip * num_keys / unit <= 2**29
    assert unit <= clip * num_keys * 2.0**-28
    assert math.frexp(unit)[0] == 0.5  # a power of two: scaling by it is exact


@given(clip=CLIPS, num_keys=KEYS, multiplier=st.floats(1e-3, 1e3), depth=st.sampled_from([16, 128]))
@settings(deadline=None, max_examples=300)
def test_hopper_sums_and_noise_fit_and_are_as_fine_as_the_sensitivity_says(
    clip, num_keys, multiplier, depth
):
    sensitivity = record_sensitivity(
        clip, head_dim=depth, num_keys=num_keys, dtype="bfloat16", adjacency="replace_one"
    )
    s = spec(clip, sensitivity.numerator_std(multiplier))
    unit = mosaic_gpu.numerator_unit(s, num_keys)
    # One chunk: 22 bits and a sign, with what rounding adds to a row.
    assert 1.02 * clip * min(num_keys, common.HOPPER_CHUNK) / unit <= 2**22
    # Everything: 31 bits.
    assert 1.02 * clip * num_keys / unit + 8 * s.numerator_std / unit < 2**31
    assert unit <= max(1.02 * 2.0**-11, num_keys * 2.0**-28) * clip


def test_a_noise_that_needs_a_coarser_unit_is_refused():
    q = jax.ShapeDtypeStruct((1, 64, 1, 64), jnp.bfloat16)
    assert mosaic_gpu.unsupported(spec(1.0, 100.0), q, q, has_mask=False) is None
    reason = mosaic_gpu.unsupported(spec(1.0, 1e6), q, q, has_mask=False)
    assert reason is not None
    assert "numerator_std" in reason
