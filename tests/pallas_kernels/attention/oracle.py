"""Attention in float64 NumPy, forward and backward, from docs/privacy.md sections 1 and 2.

Everything is written out for full [B, N, T, S] arrays, the backward by hand. The noise
is an argument: standard normals g [B, T, N, H] and g' [B, T, N].
"""

import dataclasses

import numpy as np


@dataclasses.dataclass
class Result:
    out: np.ndarray  # [B, T, N, H]
    grads: tuple  # dq, dk, dv
    # How much of the data went through each branch, so that a test can insist on all.
    clamped: float = 0.0
    clipped: float = 0.0
    at_floor: float = 0.0


def visible(shape, *, is_causal=False, window=None, lengths=None, mask=None):
    """bool[B, N, T, S], one element at a time."""
    batch, _, num_rows, num_keys = shape
    allowed = np.ones(shape, bool)
    for t in range(num_rows):
        for s in range(num_keys):
            if is_causal and s > t:
                allowed[:, :, t, s] = False
            if window is not None and not t - window[0] <= s <= t + window[1]:
                allowed[:, :, t, s] = False
    if lengths is not None:
        for b in range(batch):
            allowed[b, :, :, int(lengths[b]) :] = False
    if mask is not None:
        allowed &= np.broadcast_to(np.asarray(mask), shape)
    return allowed


def attention(query, key, value, spec, *, allowed, dout, noise=None):
    """Output and gradients for the cotangent ``dout`` [B, T, N, H]."""
    q, dout = (np.asarray(x, np.float64).transpose(0, 2, 1, 3) for x in (query, dout))
    heads, kv_heads = q.shape[1], np.shape(key)[2]
    owner = np.arange(heads) // (heads // kv_heads)
    k, v = (np.asarray(x, np.float64).transpose(0, 2, 1, 3)[:, owner] for x in (key, value))
    if spec.mode == "exact":
        values, unclip, clipped = v, lambda d: d, 0.0
    else:
        values, unclip, clipped = _clip(v, spec.value_clip)
    logits = spec.scale * q @ k.swapaxes(-1, -2)
    if noise is not None:
        g, g_sum = (np.moveaxis(np.asarray(x, np.float64), 2, 1) for x in noise)

    if spec.mode == "record":
        free = allowed & (logits < spec.logit_bound)
        weights = np.exp(np.minimum(logits, spec.logit_bound) - spec.logit_bound) * allowed
        noisy_sum = weights.sum(-1) + spec.denominator_std * g_sum
        total = np.maximum(noisy_sum, spec.denominator_floor)[..., None]
        out = (weights @ values + spec.numerator_std * g) / total
        # The flash backward with lse = U + log(total) and o = the noisy output.
        probability = weights / total
        row_term = np.sum(dout * out, -1) * (noisy_sum > spec.denominator_floor)
        d_logits = probability * (dout @ values.swapaxes(-1, -2) - row_term[..., None]) * free
        clamped = float(np.sum(allowed & (logits >= spec.logit_bound)) / max(1, np.sum(allowed)))
        at_floor = float(np.mean(noisy_sum <= spec.denominator_floor))
    else:
        hidden = np.where(allowed, logits, -np.inf)
        top = hidden.max(-1, keepdims=True)
        weights = np.exp(hidden - np.where(np.isfinite(top), top, 0.0))
        total = weights.sum(-1, keepdims=True)
        probability = weights / np.where(total > 0, total, 1.0)
        clean = probability @ values
        # The backward of the clean output: noise is a constant that is added to it.
        row_term = np.sum(dout * clean, -1, keepdims=True)
        d_logits = probability * (dout @ values.swapaxes(-1, -2) - row_term)
        out = clean if spec.mode == "exact" else clean + spec.numerator_std * g
        clamped = at_floor = 0.0

    dq = spec.scale * d_logits @ k
    dk = spec.scale * d_logits.swapaxes(-1, -2) @ q
    dv = unclip(probability.swapaxes(-1, -2) @ dout)
    grads = (dq, *(_sum_groups(x, kv_heads) for x in (dk, dv)))
    grads = tuple(x.transpose(0, 2, 1, 3) for x in grads)
    return Result(out.transpose(0, 2, 1, 3), grads, clamped, clipped, at_floor)


def _clip(v, bound):
    norm = np.linalg.norm(v, axis=-1, keepdims=True)
    over = norm > bound
    direction = v / np.where(over, norm, 1.0)
    clipped = np.where(over, bound * direction, v)

    def pull(d):
        tangential = d - direction * np.sum(d * direction, -1, keepdims=True)
        return np.where(over, bound / np.where(over, norm, 1.0) * tangential, d)

    return clipped, pull, float(np.mean(over))


def _sum_groups(x, kv_heads):
    return x.reshape(x.shape[0], kv_heads, -1, *x.shape[2:]).sum(2)


def worst_row(got, expected):
    """The largest relative error of a row (last axis), rows of zeros compared absolutely."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected)
    size = np.linalg.norm(expected, axis=-1)
    error = np.linalg.norm(got - expected, axis=-1)
    return float(np.max(error / np.where(size > 0, size, 1.0)))


def relative(got, expected):
    """‖got − expected‖ / ‖expected‖ over the whole array; below norm 0.01 the error itself."""
    expected = np.asarray(expected)
    error = np.linalg.norm(np.asarray(got, np.float64) - expected)
    return float(error / max(np.linalg.norm(expected), 0.01))
