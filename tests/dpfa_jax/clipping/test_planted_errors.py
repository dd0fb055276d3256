"""Errors planted in the engines on purpose: each one is seen."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clipping_models import MODELS

from dpfa_jax import clipped_grad
from dpfa_jax.clipping import api, engines, plan, replay, sites
from dpfa_jax.clipping.tree import Clip


@pytest.fixture(autouse=True)
def gram(monkeypatch):
    """The models are so small that the cost rule would materialise most leaves."""
    monkeypatch.setattr(plan, "_PREFERENCE", np.inf)


def call(name, engine="bookkeeping", verify=True, **options):
    loss, params, batch = MODELS[name]()
    numbers = range(1, 1 + len(batch))
    grad = clipped_grad(loss, l2_clip_norm=0.1, engine=engine, batch_argnums=numbers, verify=verify)
    return jax.tree.leaves(grad(params, *batch, **options))


def drop_cross_terms(monkeypatch):
    """‖Σ g‖² taken for Σ ‖g‖²: a tied embedding counts up to √2 too little."""
    monkeypatch.setattr(engines, "layouts", lambda sites: [[s] for s in sites])


def drop_half_of_the_cross_terms(monkeypatch):
    right = sites.squared_norms

    def once(blocks, own, product):
        alone = sum(right([b]) for b in blocks)
        return alone + (right(blocks) - alone) / 2

    monkeypatch.setattr(engines, "squared_norms", once)


def leave_materialised_leaves_out_of_the_norm(monkeypatch):
    monkeypatch.setattr(engines, "squared_norm", lambda g: jnp.zeros(len(g), jnp.float32))


def skip_a_leaf(monkeypatch):
    """A leaf that is believed to be unused."""

    def wrong(*args):
        found = plan.make_plan(*args)
        return dataclasses.replace(found, leaves=(plan.LeafPlan("unused", ""), *found.leaves[1:]))

    monkeypatch.setattr(api, "make_plan", wrong)


def ignore_which_rows_count(monkeypatch):
    monkeypatch.setattr(
        replay, "_operand", lambda site, x: jnp.clip(x[site.operand][..., 0], 0, 4)
        if site.kind == "gather" else x[site.operand],
    )  # fmt: skip


def forget_a_transposition(monkeypatch):
    monkeypatch.setattr(sites, "to_leaf", lambda g, steps, scans: g.reshape(g.shape[::-1]).T)


def count_steps_of_a_scan_as_layers(monkeypatch):
    """Σ over steps of ‖g‖² for a matrix that all steps share."""
    right = sites.squared_norms

    def apart(blocks, own, product):
        split = [
            tuple(f._replace(rows=jnp.swapaxes(f.rows, 1, 2)) for f in pair) for pair in blocks
        ]
        return right(split if all(b[0].rows.shape[1] == 1 for b in blocks) else blocks)

    monkeypatch.setattr(engines, "squared_norms", apart)


@pytest.mark.parametrize(
    ("plant", "name"),
    [
        (drop_cross_terms, "tied_decoder"),
        (drop_cross_terms, "shared_weights"),
        (drop_half_of_the_cross_terms, "shared_weights"),
        (leave_materialised_leaves_out_of_the_norm, "mlp"),
        (skip_a_leaf, "mlp"),
        (ignore_which_rows_count, "out_of_range_rows"),
        (forget_a_transposition, "routed_experts"),
        (count_steps_of_a_scan_as_layers, "rnn"),
    ],
)
def test_verify_sees(plant, name, monkeypatch):
    call(name)
    plant(monkeypatch)
    with pytest.raises(ValueError, match=r"verify: the gradient of example \d"):
        call(name)


def largest_difference(a, b):
    return max(np.abs(x - y).max() for x, y in zip(a, b, strict=True)) / max(
        np.abs(y).max() for y in b
    )


def test_norms_in_bfloat16_are_seen(monkeypatch):
    right = sites.squared_norms
    reference = call("shared_weights", "vmap", verify=False)
    assert largest_difference(call("shared_weights", verify=False), reference) < 2e-5
    monkeypatch.setattr(
        engines,
        "squared_norms",
        lambda b, own, product: right(b).astype(jnp.bfloat16).astype(jnp.float32),
    )
    assert largest_difference(call("shared_weights", verify=False), reference) > 1e-4


def test_padding_that_counts_is_seen(monkeypatch):
    padding = jnp.asarray([False, True, False, False, True])
    reference = call("mlp", "vmap", verify=False, is_padding_example=padding)
    assert largest_difference(call("mlp", is_padding_example=padding), reference) < 2e-5
    right = Clip.factors
    monkeypatch.setattr(Clip, "factors", lambda self, squares, _: right(self, squares, None))
    found = call("mlp", verify=False, is_padding_example=padding)
    assert largest_difference(found, reference) > 0.1


def test_a_bad_example_that_is_multiplied_away_is_seen(monkeypatch):
    loss, params, (x, y) = MODELS["mlp"]()
    grad = clipped_grad(loss, l2_clip_norm=0.1, engine="bookkeeping", batch_argnums=(1, 2))
    bad = x.at[2, 0].set(jnp.nan)
    assert all(np.isfinite(v).all() for v in jax.tree.leaves(grad(params, bad, y)))
    monkeypatch.setattr(engines, "_without", lambda blocks, keep: blocks)
    assert not all(np.isfinite(v).all() for v in jax.tree.leaves(grad(params, bad, y)))


# --- the cost rule, beside measured time -----------------------------------------------


@pytest.mark.parametrize(("rows", "width"), [(2, 512), (384, 8)])
def test_the_cost_rule_picks_the_faster_form(rows, width, monkeypatch):
    """Shapes where the forms differ several times over; the best of five runs each."""

    def loss(w, x):
        return jnp.sum(jnp.square(x @ w))

    w, x = jnp.ones((width, width)), jnp.ones((32, rows, width))
    grad = clipped_grad(loss, l2_clip_norm=1.0, engine="bookkeeping")
    monkeypatch.setattr(plan, "_PREFERENCE", 1.0)
    picked = grad.explain(w, x).leaves[0].form
    times = {}
    for form, preference in (("gram", np.inf), ("materialised", 0.0)):
        monkeypatch.setattr(plan, "_PREFERENCE", preference)
        monkeypatch.setattr(plan, "_MEMORY_SHARE", np.inf)
        run = jax.jit(lambda w, x: grad(w, x))
        run(w, x).block_until_ready()
        taken = []
        for _ in range(5):
            begin = time.perf_counter()
            run(w, x).block_until_ready()
            taken.append(time.perf_counter() - begin)
        times[form] = min(taken)
    assert picked == min(times, key=times.get), times
