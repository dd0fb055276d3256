"""This library's attention, as versions to measure."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from dpfa_jax.attention import AttentionPrivacy
from dpfa_jax.bench.cases import LOGIT_BOUND, Case, Shape, Version
from dpfa_jax.bench.peers import VALUE_CLIP, prepare_jax
from dpfa_jax.bench.timing import Build
from pallas_kernels.attention import AttentionSpec, attention, explain


def exact_spec(shape: Shape) -> AttentionSpec:
    """Softmax attention, as ``privacy=None`` asks for it."""
    return AttentionSpec(mode="exact", scale=shape.scale, is_causal=shape.is_causal)


def record_spec(shape: Shape, *, rounds: Any = 8, bound_logits: bool = True) -> AttentionSpec:
    """Record-level attention with the noise that :class:`AttentionPrivacy` computes."""
    privacy = AttentionPrivacy(
        unit="record",
        noise_multiplier=1.0,
        value_clip=VALUE_CLIP,
        adjacency="add_remove",
        logit_bound=LOGIT_BOUND,
        rounds=rounds,
    )
    spec = privacy.spec(
        scale=shape.scale,
        head_dim=shape.head_dim,
        num_keys=shape.length,
        dtype="bfloat16",
        is_causal=shape.is_causal,
    )
    return dataclasses.replace(spec, bound_logits=bound_logits)


def chosen_implementation(shape: Shape, spec: AttentionSpec) -> str:
    """The implementation that ``implementation=None`` takes on this machine."""
    full = (shape.batch, shape.length, shape.heads, shape.head_dim)
    query = jax.ShapeDtypeStruct(full, jnp.bfloat16)
    return next(name for name, reason in explain(query, query, spec) if reason is None)


def _prepare(case: Case, spec: AttentionSpec, implementation: Any) -> Build:
    if not spec.is_noisy:

        def exact(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return attention(q, k, v, spec, implementation=implementation)

        return prepare_jax(exact, case)

    def noisy(q: jax.Array, k: jax.Array, v: jax.Array, words: jax.Array) -> jax.Array:
        return attention(q, k, v, spec, key_words=words, implementation=implementation)

    return prepare_jax(noisy, case, case.key_words)


def _version(name: str, make_spec: Any, implementation: str | None = None) -> Version:
    def chosen(shape: Shape) -> str:
        return implementation or chosen_implementation(shape, make_spec(shape))

    return Version(
        name,
        "ours",
        lambda case: _prepare(case, make_spec(case.shape), implementation),
        for_targets=implementation is None,
        implementation=chosen,
    )


# Record-level privacy where nothing else is said; "norms": the bound on the logits is known
# from the norms of queries and keys, and not enforced again.
EXACT = "dpfa exact"
CHACHA8 = "dpfa ChaCha8"
CHACHA20 = "dpfa ChaCha20"
CHACHA8_NORMS = "dpfa ChaCha8, norms"
CHACHA20_NORMS = "dpfa ChaCha20, norms"

VERSIONS = (
    _version(EXACT, exact_spec),
    _version(CHACHA8, functools.partial(record_spec, rounds=8)),
    _version(CHACHA20, functools.partial(record_spec, rounds=20)),
    _version(CHACHA8_NORMS, functools.partial(record_spec, rounds=8, bound_logits=False)),
    _version(CHACHA20_NORMS, functools.partial(record_spec, rounds=20, bound_logits=False)),
    _version("dpfa exact, triton", exact_spec, "triton"),
    _version("dpfa ChaCha8, triton", functools.partial(record_spec, rounds=8), "triton"),
    _version("dpfa exact, xla", exact_spec, "xla"),
    _version("dpfa ChaCha8, xla", functools.partial(record_spec, rounds=8), "xla"),
)
