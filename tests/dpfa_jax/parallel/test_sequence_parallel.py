"""What attention over several devices refuses, and its sensitivity; one device suffices here."""

import re
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpfa_jax import (
    AttentionPrivacy,
    attention,
    attention_fn,
    device_axes,
    dp_dot_product_attention,
    keys,
    noise_key,
)
from dpfa_jax.mechanisms import record_sensitivity
from dpfa_jax.parallel import dp_sequence_parallel_attention
from pallas_kernels.attention import common

KEY = keys.reproducible_key(11)
PRIVATE = {
    "unit": "record", "noise_multiplier": 2.0, "value_clip": 1.0, "logit_bound": 2.0,
    "adjacency": "add_remove", "public_queries": True,
}  # fmt: skip
RECORD = AttentionPrivacy(**PRIVATE)
SEQUENCE = AttentionPrivacy(
    unit="sequence", noise_multiplier=2.0, value_clip=1.0, adjacency="replace_one"
)


def mesh():
    return jax.make_mesh((1,), ("keys",), axis_types=(jax.sharding.AxisType.Auto,))


def call(query=(1, 4, 2, 8), key=(1, 600, 2, 8), **options):
    options = {"mesh": mesh(), "axis": "keys", "privacy": RECORD, "rng": KEY} | options
    q, k = jnp.ones(query), jnp.ones(key)
    return dp_sequence_parallel_attention(q, k, k, **options)


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("axis='rows'", {"axis": "rows"}),
        ("batch_axis='data'", {"batch_axis": "data"}),
        ("needs an axis of its own", {"head_axis": "keys"}),
        ("mesh=None", {"mesh": None}),
        ("strategy='tree'", {"strategy": "tree"}),
        ("implementation='cuda'", {"implementation": "cuda"}),
        ("implementation='reference'", {"implementation": "reference"}),
        ("implementation='triton' cannot", {"implementation": "triton"}),
        ("scale=nan", {"scale": float("nan")}),
        ("is_causal=True with 4 rows and 600 keys", {"is_causal": True}),
        ("query has 3 heads", {"query": (1, 4, 3, 8)}),
        ("no axis may be empty", {"key": (1, 0, 2, 8)}),
        ("lengths has shape", {"key_value_seq_lengths": jnp.array([1, 2])}),
        ("rng=None", {"rng": None}),
        ("too short to hide noise", {"rng": jax.random.key(0)}),
        ("rng has shape", {"rng": jax.random.split(KEY)}),
        ("leave the key out", {"privacy": None}),
        ("AttentionPrivacy or None", {"privacy": 3.0}),
        ("privacy.unit='sequence'", {"privacy": SEQUENCE}),
        ("rows_per_record=2", {"privacy": AttentionPrivacy(**PRIVATE | {"rows_per_record": 2})}),
        (
            "one number for all heads",
            {"privacy": AttentionPrivacy(**PRIVATE | {"noise_multiplier": (1.0, 2.0)})},
        ),
        (
            "too large for sums",
            {"privacy": AttentionPrivacy(**PRIVATE | {"noise_multiplier": 1e6})},
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_the_key_is_used(message, options):
    rng = keys.SecureKey.generate().key()
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        call(**{"rng": rng} | options)
    keys.consume(rng)  # still fresh


@pytest.mark.parametrize("axis", ["batch_axis", "head_axis"])
def test_an_axis_that_does_not_divide_is_refused(axis):
    abstract = jax.sharding.AbstractMesh((1, 2), ("keys", "other"))
    with pytest.raises(ValueError, match=rf"{axis}='other' has 2 devices, which do not divide"):
        call(query=(1, 4, 1, 8), key=(1, 600, 1, 8), mesh=abstract, **{axis: "other"})


def test_a_key_makes_noise_once():
    rng = keys.SecureKey.generate().key()
    call(rng=rng)
    with pytest.raises(ValueError, match="has made noise before"):
        call(rng=rng)


def test_inside_shard_map_it_is_refused():
    def local(q, rng):
        return dp_sequence_parallel_attention(
            q, q, q, mesh=mesh(), axis="keys", privacy=RECORD, rng=rng
        )

    mapped = jax.shard_map(
        local, mesh=mesh(), in_specs=(jax.P(None, "keys"), jax.P()), out_specs=jax.P(None, "keys")
    )
    with pytest.raises(ValueError, match="inside shard_map or pmap"):
        jax.eval_shape(mapped, jnp.ones((1, 600, 2, 8)), KEY)


@pytest.mark.parametrize("way", ["shard_map", "pmap"])
def test_inside_a_map_over_any_axis_it_is_refused(way):
    """Also over one that the call does not name."""

    def local(q, rng):
        return dp_sequence_parallel_attention(
            q, q, q, mesh=mesh(), axis="keys", privacy=RECORD, rng=rng
        )

    q = jnp.ones((1, 600, 2, 8))
    other = jax.make_mesh((1,), ("other",))
    if way == "shard_map":
        mapped = jax.shard_map(local, mesh=other, in_specs=(jax.P(), jax.P()), out_specs=jax.P())
    else:
        mapped, q = jax.pmap(local, axis_name="other", in_axes=(0, None)), q[None]
    with pytest.raises(ValueError, match=r"inside shard_map or pmap over \['other'\]"):
        jax.eval_shape(mapped, q, KEY)


def test_vmap_gives_every_lane_its_own_noise():
    q = jnp.zeros((3, 1, 4, 2, 8))
    k = jnp.zeros((1, 600, 2, 8))
    run = jax.vmap(
        lambda q, rng: dp_sequence_parallel_attention(
            q, k, k, mesh=mesh(), axis="keys", privacy=RECORD, rng=rng
        ),
        in_axes=(0, None),
    )
    out = np.asarray(jax.jit(run)(q, keys.reproducible_key(13)))
    for i, j in ((0, 1), (0, 2), (1, 2)):
        # On a grid of a thousandth of the noise: some agree by chance.
        assert np.mean(out[i] == out[j]) < 0.05


@pytest.mark.parametrize("adjacency", ["add_remove", "replace_one"])
@pytest.mark.parametrize("num_keys", [1, 600, 65_536, 2**20])
def test_noise_covers_the_units_of_the_sums(num_keys, adjacency):
    """What rounding adds between neighbours is within what the sensitivity counts for it."""
    for dtype in ("float32", "bfloat16", "float16"):
        found = record_sensitivity(
            3.0, head_dim=128, num_keys=num_keys, dtype=dtype, adjacency=adjacency,
            summation="chunks",
        )  # fmt: skip
        privacy = AttentionPrivacy(
            **PRIVATE | {"value_clip": 3.0, "adjacency": adjacency, "noise_multiplier": 50.0}
        )
        spec = privacy.spec(
            scale=1.0, head_dim=128, num_keys=num_keys, dtype=dtype, summation="chunks"
        )
        units = common.sum_units(spec, num_keys)
        assert spec.numerator_std == found.numerator_std(50.0)
        error = np.sqrt(128) * units.numerator / 3.0
        factor = 2.0 if adjacency == "replace_one" else 1.0
        exact = 3.0 * max(factor, np.hypot(1.0, found.denominator_weight / 3.0))
        assert found.joint >= exact * (1 + error / factor)
        # All keys at the bound and 8 standard deviations of noise fit 31 bits.
        for total, std, unit in zip(
            (1.02 * 3.0 * num_keys, num_keys),
            (spec.numerator_std, spec.denominator_std), units, strict=True,
        ):  # fmt: skip
            assert total / unit + 8 * std / unit < 2**31


def test_without_a_tree_of_sums_long_inputs_need_less_noise():
    def joint(summation):
        return record_sensitivity(
            1.0, head_dim=128, num_keys=2**20, dtype="bfloat16", adjacency="add_remove",
            summation=summation,
        ).joint  # fmt: skip

    assert joint("chunks") < 0.75 * joint("any")


# --- device_axes --------------------------------------------------------------------------


def mapped(axes, *, check_vma=True, own_keys=False):
    def local(q, rng):
        if own_keys:
            rng = jax.random.fold_in(rng, jax.lax.axis_index("keys"))
        return dp_dot_product_attention(q, q, q, privacy=SEQUENCE, rng=rng, device_axes=axes)

    return jax.shard_map(
        local, mesh=mesh(), in_specs=(jax.P("keys"), jax.P()), out_specs=jax.P("keys"),
        check_vma=check_vma,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("'rows' is no axis", {"axes": {"rows": "batch"}}),
        ("allowed are the values", {"axes": {"keys": "sequence"}}),
        ("the key does not", {"axes": None}),
        ("the key does not", {"axes": {"keys": "same"}}),
        ("the key differs", {"axes": {"keys": "batch"}, "own_keys": True}),
        ("JAX does not say", {"axes": None, "check_vma": False}),
        ("JAX does not say", {"axes": None, "check_vma": False, "own_keys": True}),
    ],
)
def test_noise_that_would_repeat_on_devices_is_refused(message, options):
    x = jnp.ones((2, 5, 2, 8))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(mapped(**options), x, KEY)


def test_pmap_needs_to_be_told():
    x = jnp.ones((1, 2, 5, 2, 8))

    def local(q, rng, axes=None):
        return dp_dot_product_attention(q, q, q, privacy=SEQUENCE, rng=rng, device_axes=axes)

    with pytest.raises(ValueError, match="pmap"):
        jax.pmap(local, axis_name="d", in_axes=(0, None))(x, KEY)
    with pytest.raises(ValueError, match="pmap"):
        jax.pmap(local, in_axes=(0, None))(x, KEY)

    def told(q, rng):
        return local(q, rng, {"d": "batch"})

    out = jax.pmap(told, axis_name="d", in_axes=(0, None))(x, KEY)
    with keys.allow_reuse_for_tests():
        np.testing.assert_array_equal(out[0], jax.jit(local)(x[0], KEY))


def test_own_keys_are_accepted_where_they_are_declared():
    x = jnp.ones((2, 5, 2, 8))
    for options in ({"axes": None}, {"axes": {"keys": "key"}, "check_vma": False}):
        jax.eval_shape(mapped(**options, own_keys=True), x, KEY)


def test_multipliers_of_heads_and_heads_over_devices_do_not_go_together():
    """A device would need other options than its neighbour."""
    privacy = AttentionPrivacy(
        unit="sequence", noise_multiplier=(1.0, 2.0), value_clip=1.0, adjacency="replace_one"
    )
    x = jnp.ones((1, 5, 2, 8))
    two = device_axes.Position(0, 1), device_axes.Position(0, 2)
    with (
        mock.patch.object(attention, "positions", return_value=two),
        pytest.raises(ValueError, match="one noise_multiplier for each head"),
    ):
        dp_dot_product_attention(x, x, x, privacy=privacy, rng=keys.reproducible_key(14))


def test_flax_layers_take_the_axes_from_noise_key():
    x = jnp.ones((2, 5, 2, 8))
    attend = attention_fn(SEQUENCE)

    def local(q, rng, axes):
        with noise_key(rng, device_axes=axes):
            return attend(q, q, q)

    def run(axes):
        return jax.shard_map(
            lambda q, rng: local(q, rng, axes), mesh=mesh(),
            in_specs=(jax.P("keys"), jax.P()), out_specs=jax.P("keys"),
        )  # fmt: skip

    with pytest.raises(ValueError, match="the key does not"):
        jax.eval_shape(run(None), x, KEY)
    out = jax.jit(run({"keys": "batch"}))(x, KEY)
    with keys.allow_reuse_for_tests():
        np.testing.assert_array_equal(out, jax.jit(lambda q, rng: local(q, rng, None))(x, KEY))


def test_the_example_of_the_documentation_runs():
    page = (Path(__file__).parents[3] / "docs" / "scaling_attention.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names = {}
    exec(code, names)
    assert names["out"].shape == (1, 16, 4, 32)
