"""Attention of other libraries, and the private pipeline made of separate steps.

A library that is not installed, or refuses a shape, raises when its version is
prepared; the bench records that text.
"""

import importlib
from typing import Any, Literal

import jax
import jax.numpy as jnp

from dpfa_jax.bench.cases import Case, Version, with_gradients
from dpfa_jax.bench.timing import Build, Runnable, compiled_call

VALUE_CLIP = 8.0


def prepare_jax(function: Any, case: Case, *more: jax.Array) -> Build:
    """``function(q, k, v, *more)`` in the case's direction, traced and lowered."""
    arguments: tuple[jax.Array, ...] = (case.query, case.key, case.value, *more)
    if case.direction == "forward+backward":
        function = with_gradients(function)
        arguments = (case.d_out, *arguments)
    lowered = jax.jit(function).lower(*arguments)
    return lambda: compiled_call(lowered.compile(), *arguments)


def _cudnn(case: Case) -> Build:
    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(
            q, k, v, scale=case.shape.scale, is_causal=case.shape.is_causal, implementation="cudnn"
        )

    return prepare_jax(attend, case)


def _tokamax(case: Case, implementation: str) -> Build:
    tokamax = importlib.import_module("tokamax")

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        out: jax.Array = tokamax.dot_product_attention(
            q,
            k,
            v,
            scale=case.shape.scale,
            is_causal=case.shape.is_causal,
            implementation=implementation,
        )
        return out

    return prepare_jax(attend, case)


def _torch(case: Case, backend: Literal["FLASH_ATTENTION", "CUDNN_ATTENTION"]) -> Build:
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        raise RuntimeError("PyTorch sees no CUDA device")
    choose = importlib.import_module("torch.nn.attention")
    # The same memory as JAX's arrays, seen as [B, H, T, D].
    q, k, v, d_out = (
        torch.from_dlpack(x).transpose(1, 2) for x in (case.query, case.key, case.value, case.d_out)
    )
    backward = case.direction == "forward+backward"
    if backward:
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))

    def once() -> None:
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, scale=case.shape.scale, is_causal=case.shape.is_causal
        )
        if backward:
            torch.autograd.grad(out, (q, k, v), d_out)

    def run(times: int) -> None:
        with choose.sdpa_kernel(getattr(choose.SDPBackend, backend)):
            for _ in range(times):
                once()
        torch.cuda.synchronize()

    return lambda: Runnable(run)


def clip_then_noise(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    noise_key: jax.Array,
    *,
    scale: float,
    is_causal: bool,
    std: float = 1.0,
) -> jax.Array:
    """Clipped values, cuDNN's attention, float32 normals from JAX, and their sum."""
    square = jnp.sum(jnp.square(v.astype(jnp.float32)), axis=-1, keepdims=True)
    factor = jnp.minimum(1.0, VALUE_CLIP * jax.lax.rsqrt(square))
    v = (v.astype(jnp.float32) * factor).astype(v.dtype)
    out = jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=is_causal, implementation="cudnn"
    )
    noise = std * jax.random.normal(noise_key, out.shape, jnp.float32)
    return (out.astype(jnp.float32) + noise).astype(out.dtype)


def _separate_steps(case: Case) -> Build:
    def attend(q: jax.Array, k: jax.Array, v: jax.Array, noise_key: jax.Array) -> jax.Array:
        shape = case.shape
        return clip_then_noise(q, k, v, noise_key, scale=shape.scale, is_causal=shape.is_causal)

    return prepare_jax(attend, case, jax.random.key(0))


CUDNN = "cuDNN (jax.nn)"
TORCH_CUDNN = "PyTorch SDPA, cuDNN"
SEPARATE = "clip+cuDNN+normal+add"

# tokamax's own cuDNN back end is the first of these again.
VERSIONS = (
    Version(CUDNN, "jax", _cudnn),
    Version("tokamax mosaic", "jax", lambda case: _tokamax(case, "mosaic")),
    Version("tokamax triton", "jax", lambda case: _tokamax(case, "triton")),
    Version(TORCH_CUDNN, "torch", lambda case: _torch(case, "CUDNN_ATTENTION")),
    Version("PyTorch SDPA, flash", "torch", lambda case: _torch(case, "FLASH_ATTENTION")),
    Version(SEPARATE, "steps", _separate_steps, directions=("forward",)),
)
