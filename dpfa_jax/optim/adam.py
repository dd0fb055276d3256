"""Adam for noisy gradients of known noise.

Adam divides by the root of a running mean of squared gradients. Under DP noise of
variance φ that mean estimates E[g²] + φ, and where φ dominates, every coordinate gets the
same step and Adam becomes SGD with momentum. The correction subtracts φ.

Source: Q. Tang, F. Shpilevskiy and M. Lécuyer, DP-AdamBC: Your DP-Adam Is Actually
DP-SGD (Unless You Apply Bias Correction), AAAI 2024, algorithm 1.
"""

import math
import numbers
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int32, PyTree


class DPAdamState(NamedTuple):
    """Step count and the two moments, float32: in bfloat16 slow means stall."""

    step: Int32[Array, ""]
    mu: PyTree
    nu: PyTree


def scale_by_dp_adam(
    noise_std: float, *, b1: float = 0.9, b2: float = 0.999, floor: float | None = None
) -> optax.GradientTransformation:
    """m̂ / √max(v̂ − φ, floor²) with φ = ``noise_std``².

    Args:
        noise_std: standard deviation of the noise on each coordinate of the gradient, as
            :func:`dpfa_jax.optim.noise_std` gives it. A public constant.
        b1: decay of the first moment.
        b2: decay of the second moment.
        floor: the divisor is at least this, in the gradient's units. None means
            ``noise_std`` (and 1e-8 without noise): v̂ − φ is itself noisy, and a smaller
            floor lets coordinates take off on noise alone.

    Raises:
        ValueError: for a number that is not allowed.

    Example:
        >>> tx = scale_by_dp_adam(0.0)
        >>> updates, _ = tx.update(jnp.array([3.0]), tx.init(jnp.zeros(1)))
        >>> f"{updates[0]:.3f}"
        '1.000'
    """
    if not (isinstance(noise_std, numbers.Real) and 0 <= noise_std < math.inf):
        raise ValueError(f"noise_std={noise_std!r}: allowed is a finite number >= 0.")
    for name, value in (("b1", b1), ("b2", b2)):
        if not 0 <= value < 1:
            raise ValueError(f"{name}={value!r}: allowed is 0 <= {name} < 1.")
    least = floor if floor is not None else (noise_std or 1e-8)
    if not 0 < least < math.inf:
        raise ValueError(f"floor={floor!r}: allowed is a finite number > 0.")

    def init(params: PyTree) -> DPAdamState:
        def zeros() -> PyTree:
            return jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)

        return DPAdamState(jnp.int32(0), zeros(), zeros())

    def update(
        updates: PyTree, state: DPAdamState, params: PyTree | None = None
    ) -> tuple[PyTree, DPAdamState]:
        del params
        count = state.step + jnp.int32(1)
        steps = count.astype(jnp.float32)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), updates)
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, grads)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, grads)
        first, second = 1 - b1**steps, 1 - b2**steps

        def scale(m: jax.Array, v: jax.Array, g: jax.Array) -> jax.Array:
            root = jnp.sqrt(jnp.maximum(v / second - noise_std**2, least**2))
            return (m / first / root).astype(g.dtype)

        return jax.tree.map(scale, mu, nu, updates), DPAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def dp_adamw(
    learning_rate: optax.ScalarOrSchedule,
    noise_std: float,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    floor: float | None = None,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """AdamW (decoupled weight decay) with the correction of :func:`scale_by_dp_adam`.

    Example:
        >>> tx = dp_adamw(1e-3, noise_std=0.01, weight_decay=1e-4)
        >>> params = jnp.ones(2)
        >>> updates, _ = tx.update(jnp.ones(2), tx.init(params), params)
        >>> updates.shape
        (2,)
    """
    return optax.chain(
        scale_by_dp_adam(noise_std, b1=b1, b2=b2, floor=floor),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
