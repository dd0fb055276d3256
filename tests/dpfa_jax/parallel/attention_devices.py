"""Checks of attention on eight CPU devices, run by test_attention_devices.py in a process.

Each function named ``check_*`` raises AssertionError where something is wrong; the results
go to standard output as JSON.
"""

import functools
import json
import sys
import time
import traceback
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dpfa_jax import AttentionPrivacy, dp_dot_product_attention, keys
from dpfa_jax.bench import hlo
from dpfa_jax.parallel import attention, attention_parts, dp_sequence_parallel_attention
from pallas_kernels import attention as kernels
from pallas_kernels.attention import AttentionSpec, common

COUNTS = (1, 2, 4, 8)
KEY = keys.reproducible_key(6)
MODES = {
    "record": {
        "value_clip": 1.0, "logit_bound": 1.0, "numerator_std": 0.5, "denominator_std": 0.5,
        "denominator_floor": 0.5,
    },
    "sequence": {"value_clip": 1.0, "numerator_std": 0.5},
    "exact": {},
}  # fmt: skip


def private(**options):
    return AttentionPrivacy(
        **{
            "unit": "record", "noise_multiplier": 2.0, "value_clip": 1.0, "logit_bound": 2.0,
            "adjacency": "add_remove", "public_queries": True,
        } | options
    )  # fmt: skip


def arrays(batch, num_rows, num_keys, heads, kv_heads, depth, dtype="float32"):
    rng = np.random.default_rng(0)
    shapes = [(batch, num_rows, heads, depth), *[(batch, num_keys, kv_heads, depth)] * 2]
    shapes.append(shapes[0])
    return [jnp.asarray(rng.normal(size=s), dtype) for s in shapes]


def mesh_of(axis_type=AxisType.Auto, **axes):
    devices = np.array(jax.devices()[: int(np.prod(list(axes.values())))])
    return Mesh(devices.reshape(*axes.values()), tuple(axes), axis_types=(axis_type,) * len(axes))


def collectives(compiled):
    return [sent.kind for sent in hlo.collectives(compiled.as_text())]


def same(first, second):
    return all(
        np.array_equal(np.asarray(a), np.asarray(b))
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    )


def close(first, second, share):
    for a, b in zip(first, second, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.abs(a - b).max() <= share * np.abs(b).max(), np.abs(a - b).max()


def with_gradients(function):
    def run(q, k, v, d_out, rng):
        out, pull = jax.vjp(lambda q, k, v: function(q, k, v, rng), q, k, v)
        return out, *pull(d_out)

    return run


def over_keys(count, strategy, privacy, **options):
    """The release on ``count`` devices and, last, all gradients."""
    call = functools.partial(
        dp_sequence_parallel_attention, mesh=mesh_of(keys=count), axis="keys",
        privacy=privacy, strategy=strategy, **options,
    )  # fmt: skip
    return jax.jit(with_gradients(lambda q, k, v, rng: call(q, k, v, rng=rng)))


def check_the_release_is_the_same_on_1_2_4_8_devices(counts=COUNTS, rows=70):
    q, k, v, _ = arrays(2, rows, 4500, 4, 2, 32)
    lengths = jnp.array([4500, 3100])
    first = None
    for strategy in ("reduce", "ring"):
        for count in counts:
            call = functools.partial(
                dp_sequence_parallel_attention, mesh=mesh_of(keys=count), axis="keys",
                privacy=private(), strategy=strategy, key_value_seq_lengths=lengths,
            )  # fmt: skip
            out = jax.jit(lambda q, k, v, rng, call=call: call(q, k, v, rng=rng))(q, k, v, KEY)
            first = out if first is None else first
            assert same(out, first), (strategy, count)


def check_gradients():
    operands = arrays(1, 40, 2100, 4, 2, 32)
    lengths = jnp.array([2050])

    def whole(q, k, v, rng):
        return dp_dot_product_attention(
            q, k, v, privacy=private(), rng=rng, key_value_seq_lengths=lengths
        )

    # The definition's noise is larger by what it counts for a tree of sums.
    want = jax.jit(with_gradients(whole))(*operands, KEY)
    for strategy in ("reduce", "ring"):
        run = over_keys(4, strategy, private(), key_value_seq_lengths=lengths)
        close(run(*operands, KEY), want, 0.02)


def check_causal_and_bfloat16():
    for strategy in ("reduce", "ring"):
        runs = [
            over_keys(count, strategy, private(), is_causal=True)(
                *arrays(1, 2048, 2048, 2, 1, 16, "bfloat16"), KEY
            )
            for count in (1, 2)
        ]
        assert same(runs[0][0], runs[1][0]), strategy
        close(
            [x.astype(jnp.float32) for x in runs[0][1:]],
            [x.astype(jnp.float32) for x in runs[1][1:]], 0.01,
        )  # fmt: skip


def check_exact_attention():
    for is_causal, shape in ((False, (1, 70, 2100, 4, 2, 32)), (True, (1, 2048, 2048, 2, 1, 16))):
        operands = arrays(*shape)
        lengths = jnp.array([1900])

        def whole(q, k, v, rng, lengths=lengths, is_causal=is_causal):
            return dp_dot_product_attention(
                q, k, v, key_value_seq_lengths=lengths, is_causal=is_causal
            )

        want = jax.jit(with_gradients(whole))(*operands, None)
        for strategy in ("reduce", "ring"):
            found = over_keys(
                2, strategy, None, key_value_seq_lengths=lengths, is_causal=is_causal
            )(*operands, None)
            close(found, want, 1e-5)


def check_batch_and_heads_on_axes_of_their_own():
    q, k, v, _ = arrays(2, 64, 4096, 4, 2, 16)
    one = dp_sequence_parallel_attention(
        q, k, v, mesh=mesh_of(keys=1), axis="keys", privacy=private(), rng=KEY
    )
    call = functools.partial(
        dp_sequence_parallel_attention, axis="keys", batch_axis="data", head_axis="model",
        privacy=private(),
    )  # fmt: skip
    mesh = mesh_of(data=2, model=2, keys=2)
    place = NamedSharding(mesh, P("data", "keys", "model", None))
    placed = [jax.device_put(x, place) for x in (q, k, v)]
    run = jax.jit(lambda q, k, v, rng: call(q, k, v, rng=rng, mesh=mesh))
    compiled = run.lower(*placed, KEY).compile()
    out = compiled(*placed, KEY)
    assert same(one, out)
    assert out.sharding.is_equivalent_to(place, 4)
    with jax.set_mesh(mesh):
        assert same(one, jax.jit(lambda q, k, v, rng: call(q, k, v, rng=rng))(*placed, KEY))


def check_what_travels_and_what_a_device_holds():
    """Queries are few: sums travel, never keys. Many: keys go around, nobody has them all."""
    q, k, v, d_out = arrays(1, 64, 65536, 2, 2, 16)
    for strategy, forward, both in (
        ("reduce", ["reduce-scatter"] * 2, ["all-gather"] * 3 + ["reduce-scatter"] * 3),
        ("ring", ["collective-permute"] * 2, ["collective-permute"] * 6),
    ):
        mesh = mesh_of(keys=8)
        split = NamedSharding(mesh, P(None, "keys"))
        rows = NamedSharding(mesh, P() if strategy == "reduce" else P(None, "keys"))
        operands = [
            jax.device_put(x, s)
            for x, s in zip((q, k, v, d_out), (rows, split, split, split), strict=True)
        ]
        call = functools.partial(
            dp_sequence_parallel_attention, mesh=mesh, axis="keys", privacy=private(),
            strategy=strategy,
        )  # fmt: skip
        run = jax.jit(lambda q, k, v, rng, call=call: call(q, k, v, rng=rng))
        compiled = run.lower(*operands[:3], KEY).compile()
        assert sorted(collectives(compiled)) == forward, collectives(compiled)
        assert compiled.memory_analysis().temp_size_in_bytes < k.nbytes
        compiled = over_keys(8, strategy, private()).lower(*operands, KEY).compile()
        assert sorted(collectives(compiled)) == sorted(both), collectives(compiled)


def noise_share(count, strategy):
    """Variance of the released numerators over the accounted one: values are zero."""
    q, k, _, _ = arrays(1, 256, 4096, 4, 4, 32)
    privacy = private(noise_multiplier=8.0)
    call = functools.partial(
        dp_sequence_parallel_attention, mesh=mesh_of(keys=count), axis="keys",
        privacy=privacy, strategy=strategy,
    )  # fmt: skip
    # All weights are 1 (the bound clamps): L is 4096, beside a noise of some tens.
    out = jax.jit(lambda q, k, rng: call(q * 0.0, k, k * 0.0, rng=rng, scale=1.0))(q, k, KEY)
    spec = dataclass_spec(privacy)
    weight = 4096 * np.exp(-privacy.logit_bound)
    return float(np.var(np.asarray(out)) * (weight / spec.numerator_std) ** 2)


def dataclass_spec(privacy):
    return privacy.spec(scale=1.0, head_dim=32, num_keys=4096, dtype="float32", summation="chunks")


def check_noise_is_added_once():
    """32768 normals: the variance's standard deviation is 0.8 %; L's own noise adds some.

    False alarms: beyond 6 standard deviations, 2·10⁻⁹, if the seed were not fixed.
    """
    for strategy in ("reduce", "ring"):
        for count in (1, 8):
            assert abs(noise_share(count, strategy) - 1.0) < 0.1, noise_share(count, strategy)


def check_noise_on_every_device_is_caught():
    """The planted bug: each device adds the call's noise to its own sums."""
    own = attention_parts.one_part

    def noisy_part(plan, spec, query, kv, lengths):
        part = own(plan, spec, query, kv, lengths)
        heads, depth = query.shape[2:]
        g = common.numerator_noise(
            jax.random.key_data(KEY), jnp.arange(1, dtype=jnp.uint32),
            jnp.arange(query.shape[1], dtype=jnp.uint32), heads, depth, 20,
        )  # fmt: skip
        noise = jnp.round(g * (spec.numerator_std / plan.units.numerator)).astype(jnp.int32)
        return part._replace(rows=part.rows + noise)

    with mock.patch.object(attention_parts, "one_part", noisy_part):
        jax.clear_caches()
        for check in (
            check_noise_is_added_once,
            lambda: check_the_release_is_the_same_on_1_2_4_8_devices((1, 2)),
        ):
            try:
                check()
            except AssertionError:
                continue
            raise AssertionError("a check does not see it")
    jax.clear_caches()


def sharded_op(implementation, mode, mesh, q, k, v, d_out):
    """The op under plain jit: results on a mesh and on one device, and the collectives."""
    words = None if mode == "exact" else jax.random.key_data(KEY)
    options = {} if implementation == "xla" else {"interpret": True}
    spec = AttentionSpec(mode=mode, scale=0.2, **MODES[mode])

    def call(q, k, v, words):
        return kernels.attention(
            q, k, v, spec, key_words=words, implementation=implementation, **options
        )

    run = jax.jit(with_gradients(call))
    want = run(q, k, v, d_out, words)
    place = NamedSharding(mesh, P("data", None, "model", None))
    operands = [jax.device_put(x, place) for x in (q, k, v, d_out)]
    if words is not None:
        words = jax.device_put(words, NamedSharding(mesh, P()))
    compiled = run.lower(*operands, words).compile()
    return want, compiled(*operands, words), collectives(compiled)


def check_jit_with_sharded_operands():
    """Batch over one axis, heads over another: one device's bits, and nothing travels."""
    operands = arrays(4, 40, 130, 4, 2, 64)
    for implementation, modes, meshes in (
        ("xla", MODES, ((4, 2),)),
        ("xla", ["record"], ((2, 1), (1, 2))),
        ("triton", ["record", "sequence"], ((4, 2),)),
        ("mosaic_tpu", ["record"], ((4, 2),)),
    ):
        for mode in modes:
            for data, model in meshes:
                mesh = mesh_of(data=data, model=model)
                want, found, travels = sharded_op(implementation, mode, mesh, *operands)
                what = implementation, mode, data, model
                if implementation == "xla" and mode != "record":
                    # XLA may order softmax's sums otherwise: the noise is the same.
                    close(found, want, 1e-5)
                else:
                    assert same(want, found), what
                if mode == "sequence":
                    assert same(want[0], found[0]), what
                assert not travels, (what, travels)
                place = NamedSharding(mesh, P("data", None, "model", None))
                assert found[0].sharding.is_equivalent_to(place, 4), found[0].sharding


def check_more_devices_than_key_heads():
    """Query heads over 8 devices, 2 key heads: right, though something must travel."""
    mesh = mesh_of(data=1, model=8)
    q, k, v, _ = arrays(1, 40, 130, 8, 2, 64)
    spec = AttentionSpec(mode="record", scale=0.2, **MODES["record"])
    words = jax.random.key_data(KEY)
    run = jax.jit(
        lambda q, k, v: kernels.attention(
            q, k, v, spec, key_words=words, implementation="triton", interpret=True
        )
    )
    placed = jax.device_put(q, NamedSharding(mesh, P(None, None, "model", None)))
    everywhere = NamedSharding(mesh, P())
    assert same(run(q, k, v), run(placed, *(jax.device_put(x, everywhere) for x in (k, v))))


def check_explicit_axes():
    mesh = mesh_of(AxisType.Explicit, data=4, model=2)
    with jax.set_mesh(mesh):
        want, found, travels = sharded_op("xla", "record", mesh, *arrays(4, 40, 130, 4, 2, 64))
    assert same(want, found)
    assert not travels


def check_shard_map_and_pmap_make_one_device_s_noise():
    q, k, v, _ = arrays(4, 40, 130, 4, 2, 16)
    call = functools.partial(dp_dot_product_attention, privacy=private())
    want = jax.jit(lambda q, k, v, rng: call(q, k, v, rng=rng))(q, k, v, KEY)
    mesh, place = mesh_of(data=4, model=2), P("data", None, "model", None)
    axes = {"data": "batch", "model": "heads"}
    for check_vma in (True, False):
        mapped = jax.shard_map(
            lambda q, k, v, rng: call(q, k, v, rng=rng, device_axes=axes),
            mesh=mesh, in_specs=(place, place, place, P()), out_specs=place, check_vma=check_vma,
        )  # fmt: skip
        assert same(want, jax.jit(mapped)(q, k, v, KEY)), check_vma
    for count in (2, 4):
        mapped = jax.pmap(
            lambda q, k, v, rng: call(q, k, v, rng=rng, device_axes={"data": "batch"}),
            axis_name="data", in_axes=(0, 0, 0, None), devices=jax.devices()[:count],
        )  # fmt: skip
        parts = [x.reshape(count, -1, *x.shape[1:]) for x in (q, k, v)]
        assert same(want, mapped(*parts, KEY).reshape(q.shape)), count


def check_kernels_in_shard_map():
    q, k, v, _ = arrays(2, 40, 130, 2, 2, 64)
    spec = AttentionSpec(mode="record", scale=0.2, **MODES["record"])
    words = jax.random.key_data(KEY)
    call = functools.partial(
        kernels.attention, spec=spec, key_words=words, implementation="triton", interpret=True
    )
    mesh, place = mesh_of(data=2, model=2), P("data", None, "model", None)

    def local(q, k, v):
        return call(
            q, k, v, first_batch=jax.lax.axis_index("data"), batch_in_all=2,
            first_head=jax.lax.axis_index("model"),
        )  # fmt: skip

    mapped = functools.partial(jax.shard_map, local, mesh=mesh, in_specs=place, out_specs=place)
    assert same(jax.jit(call)(q, k, v), jax.jit(mapped(check_vma=False))(q, k, v))
    with pytest.raises(ValueError, match="check_vma=False"):
        jax.jit(mapped())(q, k, v)


def check_the_kernels_sums_over_devices():
    """The interpreted kernels in place of XLA's products: the same plan, the same bits."""
    q, k, v, _ = arrays(1, 64, 2048, 2, 1, 64)
    privacy = private()
    spec = privacy.spec(scale=0.2, head_dim=64, num_keys=2048, dtype="float32", summation="chunks")
    words = jax.random.key_data(KEY)
    for name in ("triton", "mosaic_tpu"):
        outs = []
        for count in (1, 4):
            plan = attention.make_plan(
                q, k, spec, mesh=mesh_of(keys=count), devices=count, axis="keys",
                strategy="reduce", implementation=name, interpret=True,
            )  # fmt: skip
            run = functools.partial(attention.run, plan, lengths=jnp.array([1900]), words=words)
            outs.append(jax.jit(run)(q, k, v))
        assert same(*outs), name


def main():
    names = sys.argv[1:] or [name for name in globals() if name.startswith("check_")]
    results = {}
    with keys.allow_reuse_for_tests(), jax.numpy_dtype_promotion("strict"):
        for name in names:
            start = time.monotonic()
            try:
                globals()[name]()
                results[name] = None
            except Exception:
                results[name] = traceback.format_exc()[-2000:]
            print(f"{name}: {time.monotonic() - start:.1f} s", file=sys.stderr)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
