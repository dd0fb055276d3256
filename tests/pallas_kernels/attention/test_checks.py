"""Arguments that do not fit: one ValueError that names them, while tracing."""

import functools
import re
import types

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.attention import AttentionSpec, api, attention, explain, implementations

F32, BF16 = jnp.float32, jnp.bfloat16
EXACT = AttentionSpec(mode="exact", scale=1.0)
NOISY = AttentionSpec(mode="sequence", scale=1.0, value_clip=1.0, numerator_std=1.0)


def _q(*shape, dtype=F32):
    return jax.ShapeDtypeStruct(shape, dtype)


GOOD = {"query": _q(2, 3, 4, 8), "key": _q(2, 5, 2, 8), "value": _q(2, 5, 2, 8)}

BAD = {
    "query axes": (
        {"query": _q(2, 3, 8)},
        "query has shape (2, 3, 8): four axes are needed, [B, T, N, H]",
    ),
    "value axes": ({"value": _q(2)}, "value has shape (2,): four axes"),
    "key dtype": (
        {"key": _q(2, 5, 2, 8, dtype=jnp.int32)},
        "key is int32: allowed are float32, bfloat16 and float16",
    ),
    "query dtype": ({"query": _q(2, 3, 4, 8, dtype=jnp.uint8)}, "query is uint8: allowed"),
    "mixed dtypes": (
        {"value": _q(2, 5, 2, 8, dtype=BF16)},
        "query, key and value are float32, float32 and bfloat16: one dtype",
    ),
    "empty": ({"key": _q(2, 0, 2, 8), "value": _q(2, 0, 2, 8)}, "key has shape (2, 0, 2, 8): no"),
    "key and value": (
        {"value": _q(2, 6, 2, 8)},
        "key has shape (2, 5, 2, 8) and value (2, 6, 2, 8): they must agree",
    ),
    "batch": (
        {"query": _q(3, 3, 4, 8)},
        "query has shape (3, 3, 4, 8) and key (2, 5, 2, 8): the batch",
    ),
    "depth": ({"query": _q(2, 3, 4, 6)}, "the head dimension (last) must agree"),
    "heads": ({"query": _q(2, 3, 3, 8)}, "query has 3 heads and key 2: the first must be a"),
    "lengths shape": ({"lengths": _q(3, dtype=jnp.int32)}, "lengths has shape (3,): (2,) is"),
    "lengths dtype": ({"lengths": _q(2)}, "lengths is float32: an integer dtype is needed"),
    "mask dtype": ({"mask": _q(1, 1, 3, 5)}, "mask is float32: bool is needed"),
    "mask axes": (
        {"mask": _q(3, 5, dtype=jnp.bool_)},
        "mask has shape (3, 5): it must broadcast to (2, 4, 3, 5)",
    ),
    "mask size": (
        {"mask": _q(1, 2, 3, 5, dtype=jnp.bool_)},
        "mask has shape (1, 2, 3, 5): it must broadcast to (2, 4, 3, 5)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case):
    changes, message = BAD[case]
    arguments = GOOD | changes
    q, k, v = (arguments.pop(name) for name in ("query", "key", "value"))

    def call(q, k, v, rest):
        return attention(q, k, v, EXACT, **rest)

    with pytest.raises(ValueError, match=re.escape(message)):
        jax.eval_shape(call, q, k, v, arguments)


def test_the_same_arguments_without_the_fault_are_accepted():
    mask, lengths = _q(1, 4, 1, 5, dtype=jnp.bool_), _q(2, dtype=jnp.int32)
    for name in (None, "xla", "reference"):
        out = jax.eval_shape(
            lambda q, k, v, n, m, name=name: attention(
                q, k, v, EXACT, lengths=n, mask=m, implementation=name
            ),
            *GOOD.values(),
            lengths,
            mask,
        )
        assert out.shape == (2, 3, 4, 8)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.int16, jnp.uint32, jnp.int32])
def test_lengths_of_any_integer_dtype(dtype):
    """Also under strict dtype promotion."""
    q, k = jnp.ones((2, 3, 4, 8)), jnp.ones((2, 5, 2, 8))
    v = jnp.arange(5, dtype=F32)[None, :, None, None] * k
    out = attention(q, k, v, EXACT, lengths=jnp.asarray([1, 5], dtype))
    assert out[:, 0, 0, 0].tolist() == pytest.approx([0.0, 2.0])


def test_unknown_implementation():
    call = functools.partial(attention, spec=EXACT, implementation="flash")
    message = (
        "implementation='flash': allowed are None, "
        "'mosaic_gpu', 'triton', 'mosaic_tpu', 'xla', 'reference'."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        jax.eval_shape(call, *GOOD.values())


@pytest.fixture
def no_accelerator(monkeypatch):
    """The same answers on a machine that has one."""
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")


@pytest.fixture
def every_device(monkeypatch):
    """As if this process had whatever the kernels need."""
    monkeypatch.setattr(api, "_wrong_device", lambda name: None)


@pytest.mark.parametrize(
    ("name", "kind"), [("mosaic_gpu", "GPU"), ("triton", "GPU"), ("mosaic_tpu", "TPU")]
)
def test_forced_kernels_say_why_they_cannot_run_here(name, kind, no_accelerator):
    message = (
        f"implementation={name!r} cannot do this call: needs a {kind}, "
        "the default backend is 'cpu'. None picks one that can."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        jax.eval_shape(
            functools.partial(attention, spec=EXACT, implementation=name), *GOOD.values()
        )


@pytest.mark.parametrize(
    ("platform", "capability", "usable"),
    [
        ("cpu", None, []),
        ("gpu", "7.5", []),
        ("gpu", "8.0", ["triton"]),
        ("gpu", "8.9", ["triton"]),
        ("gpu", "9.0", ["mosaic_gpu", "triton"]),
        ("gpu", "10.0", ["triton"]),
        ("tpu", None, ["mosaic_tpu"]),
    ],
)
def test_explain_lists_all_with_reasons(monkeypatch, platform, capability, usable):
    device = types.SimpleNamespace(platform=platform, compute_capability=capability)
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(jax, "devices", lambda *_: [device])
    x = _q(2, 64, 4, 64, dtype=BF16)
    reasons = explain(x, x, EXACT)
    assert tuple(name for name, _ in reasons) == implementations()
    assert [name for name, reason in reasons if reason is None] == [*usable, "xla", "reference"]
    for name, reason in reasons:
        if reason is not None and platform == "gpu" and name != "mosaic_tpu":
            assert reason.endswith(f"this is {capability}")
        elif reason is not None:
            assert reason.endswith(f"the default backend is {platform!r}")


@pytest.mark.parametrize("name", ["mosaic_gpu", "triton", "mosaic_tpu"])
def test_kernels_refuse_masks_and_large_heads(name, every_device):
    x, wide = _q(1, 64, 2, 64, dtype=BF16), _q(1, 64, 2, 257, dtype=BF16)
    assert dict(explain(x, x, EXACT))[name] is None
    assert "mask array" in dict(explain(x, x, EXACT, has_mask=True))[name]
    assert "257 is above 256" in dict(explain(wide, wide, EXACT))[name]
    # What no kernel can do is done by XLA.
    assert api._best(x, x, EXACT, True) == api._best(wide, wide, EXACT, False) == "xla"
    mask = _q(1, 1, 1, 64, dtype=jnp.bool_)

    def call(x, mask):
        return attention(x, x, x, EXACT, mask=mask, implementation=name)

    with pytest.raises(ValueError, match=f"implementation='{name}' cannot do this call: a mask"):
        jax.eval_shape(call, x, mask)


def test_hopper_kernels_leave_float32_to_others(every_device):
    x = _q(1, 64, 2, 64)
    reasons = dict(explain(x, x, EXACT))
    assert reasons["mosaic_gpu"].startswith("float32 operands")
    assert reasons["triton"] is None


@pytest.mark.parametrize("name", [None, "xla", "reference"])
def test_only_kernels_are_interpreted(name):
    message = (
        f"interpret=True with implementation={name!r}: name the kernels to interpret, "
        "one of ('mosaic_gpu', 'triton', 'mosaic_tpu')."
    )
    call = functools.partial(attention, spec=EXACT, implementation=name, interpret=True)
    with pytest.raises(ValueError, match=re.escape(message)):
        jax.eval_shape(call, *GOOD.values())


def test_noise_needs_a_key():
    with pytest.raises(ValueError, match="key_words=None: mode 'sequence' adds noise and needs"):
        jax.eval_shape(functools.partial(attention, spec=NOISY), *GOOD.values())


def test_a_clip_that_float16_cannot_hold():
    spec = AttentionSpec(mode="sequence", scale=1.0, value_clip=1e5, numerator_std=1.0)
    half = [_q(*x.shape, dtype=jnp.float16) for x in GOOD.values()]

    def call(q, k, v):
        return attention(q, k, v, spec, key_words=jnp.zeros(8, jnp.uint32))

    with pytest.raises(ValueError, match=r"value_clip=100000\.0: a float16 value holds at most"):
        jax.eval_shape(call, *half)
    assert jax.eval_shape(call, *GOOD.values()).shape == (2, 3, 4, 8)
