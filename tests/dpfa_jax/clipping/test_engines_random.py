"""Random layouts and random small networks: book-keeping against single gradients."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dpfa_jax import clipped_grad
from dpfa_jax.clipping import plan

BATCH = 3


def singles(loss, params, batch):
    grad = jax.jit(jax.grad(loss))
    rows = [grad(params, *(x[i] for x in batch)) for i in range(BATCH)]
    return [[np.asarray(g, np.float64) for g in jax.tree.leaves(row)] for row in rows]


def check(loss, params, batch):
    """Every leaf that can be is in the Gram form; about half of the examples are clipped."""
    rows = singles(loss, params, batch)
    norms = [math.sqrt(sum(np.sum(g**2) for g in row)) for row in rows]
    clip = min(max(float(np.median(norms)) * 1.001, 1e-6), 1e6)
    before = plan._PREFERENCE
    plan._PREFERENCE = math.inf
    try:
        grad = clipped_grad(
            loss,
            l2_clip_norm=clip,
            engine="bookkeeping",
            batch_argnums=range(1, 1 + len(batch)),
        )
        forms = [p.form for p in grad.explain(params, *batch).leaves]
        total = jax.tree.leaves(jax.jit(grad)(params, *batch))
    finally:
        plan._PREFERENCE = before
    factors = [min(1.0, clip / n) if n > 0 else 1.0 for n in norms]
    wanted = [
        sum(f * row[i] for f, row in zip(factors, rows, strict=True)) for i in range(len(rows[0]))
    ]
    largest = max(1e-6, *(np.abs(x).max(initial=0.0) for x in wanted))
    for x, y in zip(total, wanted, strict=True):
        np.testing.assert_allclose(np.asarray(x), y, rtol=0, atol=3e-5 * largest)
    return forms


sizes = st.lists(st.integers(1, 3), max_size=2)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(sizes, sizes, sizes, sizes, st.booleans(), st.randoms(use_true_random=False))
def test_any_contraction_layout(batch_dims, contracted, x_free, w_free, w_first, random):
    """Batched, contracted and free axes of both operands in any order, either one first."""

    def operand(free):
        names = [("b", i) for i in range(len(batch_dims))]
        names += [("c", i) for i in range(len(contracted))]
        names += [("f", i) for i in range(len(free))]
        random.shuffle(names)
        size = {"b": batch_dims, "c": contracted, "f": free}
        shape = [size[kind][i] for kind, i in names]
        places = {
            kind: [names.index((kind, i)) for i in range(len(size[kind]))] for kind in ("b", "c")
        }
        return shape, places

    (w_shape, w_at), (x_shape, x_at) = operand(w_free), operand(x_free)
    rng = np.random.default_rng(random.randrange(2**32))
    w = jnp.asarray(rng.normal(size=w_shape), jnp.float32)
    x = jnp.asarray(rng.normal(size=(BATCH, *x_shape)), jnp.float32)
    first, second = (w_at, x_at) if w_first else (x_at, w_at)
    numbers = ((first["c"], second["c"]), (first["b"], second["b"]))

    def loss(w, x):
        y = jax.lax.dot_general(*((w, x) if w_first else (x, w)), numbers)
        return jnp.sum(jnp.sin(y + 0.3))

    assert check(loss, w, (x,)) == ["gram"]


LAYERS = (
    "dense",
    "shared",
    "transposed",
    "scan",
    "remat",
    "embed",
    "heads",
    "step",
    "bias",
    "conv",
)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(LAYERS), min_size=1, max_size=5), st.integers(0, 2**31))
def test_random_networks(layers, seed):
    """Stacks of layers that share one matrix, one table and one stack of matrices."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape) / 2, jnp.float32)

    params = {"w": normal(4, 4), "table": normal(5, 4), "stack": normal(2, 4, 4)}
    params |= {f"own{i}": normal(4, 4) for i in range(len(layers))}
    params |= {"bias": normal(4), "heads": normal(4, 2, 2), "kernel": normal(2, 4, 4)}
    x = normal(BATCH, 3, 4) * jnp.asarray([0.1, 1.0, 3.0])[:, None, None]
    ids = jnp.asarray(rng.integers(0, 5, (BATCH, 3)), jnp.int32)

    def loss(p, x, ids):
        def layer(kind, i, h):
            match kind:
                case "dense":
                    return h @ p[f"own{i}"]
                case "shared":
                    return h @ p["w"]
                case "transposed":
                    return h @ p["w"].T
                case "scan":
                    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, p["stack"])[0]
                case "remat":
                    return jax.checkpoint(lambda h: jnp.tanh(h @ p["w"]) @ p[f"own{i}"])(h)
                case "embed":
                    return h + p["table"][ids]
                case "heads":
                    return jnp.einsum("td,dnh->tnh", h, p["heads"]).reshape(h.shape)
                case "step":
                    return jax.lax.scan(lambda c, r: (jnp.tanh(c @ p["w"] + r),) * 2, h[0], h)[1]
                case "bias":
                    return h * p["bias"] + p["bias"]
                case "conv":
                    return jax.lax.conv_general_dilated(
                        h[None], p["kernel"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
                    )[0]
            raise AssertionError(kind)

        for i, kind in enumerate(layers):
            x = jnp.tanh(layer(kind, i, x))
        return jnp.sum(jnp.square(x @ p["table"].T))

    forms = check(loss, params, (x, ids))
    names = [path[0].key for path, _ in jax.tree.leaves_with_path(params)]
    materialised = {n for n, f in zip(names, forms, strict=True) if f == "materialised"}
    assert materialised <= {"bias"}
