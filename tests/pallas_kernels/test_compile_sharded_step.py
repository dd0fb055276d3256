"""A sharded training step, compiled by the real compiler for four TPU chips.

Nothing runs. What the programs hold and send is read from them.
"""

import functools
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dpfa_jax import SecureKey, add_noise, clipped_grad
from dpfa_jax.bench import decoder
from dpfa_jax.bench.hlo import collectives
from dpfa_jax.optim import dp_adamw
from dpfa_jax.parallel.mesh import fsdp_shardings, gathered, replicated

pytestmark = pytest.mark.aot

SHAPE = decoder.DecoderShape(
    "one layer", 8, 128, 256, 1, 4, vocabulary=512, dtype="bfloat16", attention="xla", remat=True
)


def chips(kind):
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    made = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    return Mesh(np.array(made), ("data",), axis_types=(kind,))


@functools.cache
def compiled_step(kind, place):
    mesh = chips(kind)
    rows = NamedSharding(mesh, P("data"))
    whole = (lambda x: gathered(x, mesh)) if place is fsdp_shardings else (lambda x: x)
    grad = clipped_grad(
        lambda params, tokens: decoder.loss(SHAPE, params, None, tokens, whole), l2_clip_norm=1.0
    )
    tx = optax.chain(add_noise(1.0, 1.0, 32.0, SecureKey.generate()), dp_adamw(1e-3, 0.03))

    def init():
        params = decoder.init(SHAPE, jax.random.key(0))["base"]
        return params, tx.init(params)

    def step(params, state, tokens):
        updates, state = tx.update(grad(params, tokens), state, params)
        return optax.apply_updates(params, updates), state

    shapes = jax.eval_shape(init)
    shardings = place(shapes, mesh)

    def like(s, sharding):
        return jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding)

    arguments = jax.tree.map(like, shapes, shardings)
    size = (SHAPE.batch * mesh.size, SHAPE.length + 1)
    tokens = jax.ShapeDtypeStruct(size, jnp.int32, sharding=rows)
    with jax.numpy_dtype_promotion("standard"):
        lowered = jax.jit(step, donate_argnums=(0, 1), out_shardings=shardings).lower(
            *arguments, tokens
        )
    return lowered.compile(), shapes[0]


def test_no_chip_holds_all_parameters():
    whole, params = compiled_step(AxisType.Auto, replicated)
    # XLA for TPUs splits noise by what types say.
    split, _ = compiled_step(AxisType.Explicit, fsdp_shardings)
    count = sum(x.size for x in jax.tree.leaves(params))
    # Parameters and two moments, float32.
    kept = [c.memory_analysis().argument_size_in_bytes for c in (whole, split)]
    assert kept[0] > 12 * count
    assert kept[1] < 1.1 * kept[0] / 4
    sent = {c.kind for c in collectives(split.as_text())}
    assert "all-gather" in sent
    # Of float32 arrays with two axes, none is a gradient or noise of a whole leaf after the
    # reduction: what reduces gives each chip its part.
    assert "reduce-scatter" in sent or "all-reduce-scatter" in split.as_text()


def test_data_parallel_sends_the_sum_once():
    whole, params = compiled_step(AxisType.Auto, replicated)
    count = sum(x.size for x in jax.tree.leaves(params))
    text = whole.as_text()
    sent = collectives(text)
    assert {c.kind for c in sent} == {"all-reduce"}
    # Once in each of the two programs (all examples finite, or not) of which one runs.
    assert sum(c.bytes for c in sent) <= 2 * 4 * count + 64
    assert not re.search(r"all-gather|all-to-all", text)
