"""A clip norm that follows a quantile of the gradients' norms, privately.

Each step releases one vector: the clipped sum in units of the clip norm C, and beside it
a count of the examples whose norm is below C. From the noisy count, C moves towards the
quantile. One noise covers both, so a step costs what it costs without adapting.

Source: G. Andrew, O. Thakkar, B. McMahan and S. Ramaswamy, Differentially Private
Learning with Adaptive Clipping, 2021, algorithm 1. There the two parts have noises of their
own; here the count is scaled and released jointly (docs/privacy.md, section 4).
"""

import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, PyTree

from dpfa_jax.clipping.api import ClippedGrad, clipped_grad
from dpfa_jax.clipping.tree import check_clip_norm
from dpfa_jax.mechanisms import gradient_sensitivity

# Where clipping holds (dpfa_jax.clipping.tree.check_clip_norm).
_LEAST, _MOST = 1e-9, 1e9


class Adapted(NamedTuple):
    """What is summed over a batch, and, with noise, released.

    Attributes:
        gradient: Σ_b min(1/C, 1/‖g_b‖) g_b: the clipped sum over C.
        below: Σ_b ±a, + where ‖g_b‖ <= C.
    """

    gradient: PyTree
    below: Float32[Array, ""]


@dataclasses.dataclass(frozen=True)
class AdaptiveClippedGrad:
    """What :func:`adaptive_clipped_grad` returns. Every field is public."""

    grad: ClippedGrad
    quantile: float
    learning_rate: float
    count_weight: float

    @property
    def l2_clip_norm(self) -> float:
        """√(1 + a²), the bound on one example's term: give it to ``add_noise``."""
        return math.sqrt(1.0 + self.count_weight**2)

    def sensitivity(self, adjacency: Literal["add_remove", "replace_one"]) -> float:
        """Largest L2 change of the returned sum between neighbours."""
        return gradient_sensitivity(self.l2_clip_norm, adjacency)

    def init(self) -> Float32[Array, ""]:
        """The first clip norm."""
        return jnp.float32(self.grad.l2_clip_norm)

    def __call__(
        self,
        clip_norm: Float32[Array, ""],
        *args: Any,
        is_padding_example: Bool[Array, "b"] | None = None,
    ) -> Any:
        """The sum to be released, or ``(sum, per-example aux)``; private until noised.

        Args:
            clip_norm: C of this step, from :meth:`init` or :meth:`update`.
            *args: as for :class:`ClippedGrad`.
            is_padding_example: bool[batch]; True rows contribute exactly zero.
        """
        # Whatever comes in, C is where clipping holds; NaN becomes the least.
        bound = jnp.nan_to_num(jnp.asarray(clip_norm, jnp.float32), nan=_LEAST, posinf=_MOST)
        bound = jnp.clip(bound, _LEAST, _MOST)
        total, aux, norms = self.grad._run(args, is_padding_example, bound)
        signs = jnp.where(norms <= bound, 1.0, -1.0)
        signs = jnp.where(jnp.isfinite(norms), signs, 0.0)
        below = jnp.sum(signs) * jnp.float32(self.count_weight)
        out = Adapted(jax.tree.map(lambda x: x / bound, total), below)
        return (out, aux) if self.grad.has_aux else out

    def update(
        self, clip_norm: Float32[Array, ""], released: Adapted
    ) -> tuple[PyTree, Float32[Array, ""]]:
        """The private mean gradient, and the next step's clip norm. Post-processing.

        Args:
            clip_norm: C of this step.
            released: what ``add_noise`` made of the sum: noisy, over the public batch size.
        """
        gradient = jax.tree.map(lambda x: x * clip_norm, released.gradient)
        share = 0.5 + released.below / (2.0 * self.count_weight)
        step = -self.learning_rate * (jnp.clip(share, 0.0, 1.0) - self.quantile)
        return gradient, jnp.clip(clip_norm * jnp.exp(step), _LEAST, _MOST)


def adaptive_clipped_grad(
    loss_fn: Callable[..., Any],
    *,
    initial_l2_clip_norm: float,
    quantile: float = 0.5,
    learning_rate: float = 0.2,
    count_weight: float = 0.1,
    **options: Any,
) -> AdaptiveClippedGrad:
    """Clipped sums whose clip norm follows a quantile of the norms.

    Guarantee. For any parameters and any public clip norm, the returned sum changes by at
    most ``sensitivity(adjacency)`` in L2 norm between neighbours: one example's term is a
    vector of norm at most 1 beside ±a. With ``add_noise(adaptive.l2_clip_norm, z, ...)`` a
    step is one ``GaussianDpEvent(z)``, the next clip norm included.

    Args:
        loss_fn: the loss of one example, as for :func:`clipped_grad`.
        initial_l2_clip_norm: the first step's C.
        quantile: the share of examples that should be below C, between 0 and 1.
        learning_rate: η of C ← C exp(−η (share − quantile)).
        count_weight: a. The gradient's noise grows by √(1 + a²), 0.5 % at 0.1; the share's
            standard deviation is z k √(1 + a²)/(2 a B).
        **options: of :func:`clipped_grad`, without ``automatic``, ``groups`` and ``verify``.

    Raises:
        ValueError: for an argument that is not allowed; the message names it.

    Example:
        >>> from dpfa_jax import SecureKey, add_noise
        >>> def loss(w, x):
        ...     return jnp.sum(w * x)
        >>> adaptive = adaptive_clipped_grad(loss, initial_l2_clip_norm=100.0)
        >>> noise = add_noise(adaptive.l2_clip_norm, 0.5, 64, SecureKey.generate())
        >>> w, x = jnp.zeros(2), jnp.full((64, 2), 3.0)
        >>> clip, state = adaptive.init(), noise.init(None)
        >>> for _ in range(60):
        ...     released, state = noise.update(adaptive(clip, w, x), state)
        ...     mean, clip = adaptive.update(clip, released)
        >>> 3.0 < clip < 6.0                      # all norms are 4.24
        Array(True, dtype=bool)
    """
    refused = {"automatic", "groups", "verify", "l2_clip_norm"} & set(options)
    if refused or options.get("engine") == "per_layer":
        name = next(iter(sorted(refused)), "engine='per_layer'")
        raise ValueError(f"{name}: adaptive clipping follows one norm and takes no such option.")
    checks = (("quantile", quantile, 1.0), ("learning_rate", learning_rate, 10.0))
    for name, value, most in (*checks, ("count_weight", count_weight, 100.0)):
        is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not (is_number and 1e-3 <= value < most):
            raise ValueError(f"{name}={value!r}: allowed is a number from 0.001 to below {most:g}.")
    initial = check_clip_norm(initial_l2_clip_norm)
    return AdaptiveClippedGrad(
        clipped_grad(loss_fn, l2_clip_norm=initial, **options),
        float(quantile),
        float(learning_rate),
        float(count_weight),
    )
