"""One private training step on all devices, three ways: jit, shard_map and pmap.

    python examples/multi_device.py
    XLA_FLAGS=--xla_force_host_platform_device_count=8 python examples/multi_device.py

All three train the same model with the same batches and the same noise. Under ``jit`` nothing
but the arrays' shardings says that there are several devices; inside ``shard_map`` and ``pmap``
each device has the clipped sum of its own examples, and ``add_noise(axis_name=...)`` adds these
up before it adds the noise, once.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import dpfa_jax
from dpfa_jax import keys
from dpfa_jax.parallel.mesh import fsdp_shardings, make_mesh
from dpfa_jax.sampling import deal, padded_batch_size

N, Q, STEPS, CLIP, Z = 4096, 1 / 32, 20, 1.0, 1.0


def loss(params, x, y):
    """Of one example; it never sees a batch, or a device."""
    hidden = jnp.tanh(x @ params["in"])
    return (hidden @ params["out"] - y) ** 2


def main() -> None:
    """Trains three times and compares."""
    devices = len(jax.devices())
    mesh = make_mesh({"data": devices})
    rng = np.random.default_rng(0)
    x = rng.standard_normal((N, 16)).astype(np.float32)
    y = np.tanh(x[:, 0] - x[:, 1]).astype(np.float32)
    start = {
        "in": jnp.asarray(rng.standard_normal((16, 64)).astype(np.float32) / 4),
        "out": jnp.asarray(rng.standard_normal(64).astype(np.float32) / 8),
    }
    size = padded_batch_size(N, Q, multiple_of=devices)
    # Reproducible keys, so that the three ways can be compared. A real run draws its keys:
    # dpfa_jax.SecureKey.generate(), which in several processes is the first one's.
    with keys.allow_reuse_for_tests():
        sampler = dpfa_jax.PoissonSampler(N, Q, size, keys.reproducible_key(1))
        noisy = {
            name: dpfa_jax.add_noise(CLIP, Z, N * Q, keys.reproducible_key(2), axis_name=axis)
            for name, axis in (("jit", None), ("shard_map", "data"), ("pmap", "data"))
        }
    batches = [deal(sampler.sample(i), devices) for i in range(STEPS)]
    grad = dpfa_jax.clipped_grad(loss, l2_clip_norm=CLIP, batch_argnums=(1, 2))

    def make_step(name):
        tx = optax.chain(noisy[name], optax.sgd(0.5))

        def step(params, state, x, y, padding):
            total = grad(params, x, y, is_padding_example=padding)
            updates, state = tx.update(total, state, params)
            return optax.apply_updates(params, updates), state

        return tx, step

    # jit: the batch split by rows, parameters (and with them gradients and noise) fully sharded.
    tx, step = make_step("jit")
    rows = NamedSharding(mesh, P("data"))
    params = jax.device_put(start, fsdp_shardings(start, mesh))
    state = tx.init(params)
    run = jax.jit(step)
    for batch in batches:
        arrays = (x[batch.indices], y[batch.indices], batch.is_padding_example)
        params, state = run(params, state, *jax.device_put(arrays, rows))
    results = {"jit, fully sharded": params}

    # shard_map: each device calls the step on its rows.
    tx, step = make_step("shard_map")
    whole, split = P(), P("data")
    run = jax.jit(
        jax.shard_map(
            step, mesh=mesh, in_specs=(whole, whole, split, split, split), out_specs=whole
        )
    )
    params, state = start, tx.init(start)
    for batch in batches:
        arrays = (x[batch.indices], y[batch.indices], batch.is_padding_example)
        params, state = run(params, state, *arrays)
    results["shard_map"] = params

    # pmap: likewise, with the devices as a leading axis.
    tx, step = make_step("pmap")
    run = jax.pmap(step, "data", in_axes=(None, None, 0, 0, 0), out_axes=None)
    params, state = start, tx.init(start)
    for batch in batches:
        arrays = (x[batch.indices], y[batch.indices], batch.is_padding_example)
        params, state = run(params, state, *(a.reshape(devices, -1, *a.shape[1:]) for a in arrays))
    results["pmap"] = params

    first = results["jit, fully sharded"]
    for name, params in results.items():
        error = jax.jit(jax.vmap(loss, (None, 0, 0)))(params, x, y).mean()
        far = max(float(jnp.abs(first[k] - params[k]).max()) for k in first)
        print(f"{name:20} on {devices} devices: loss {error:.4f}, farthest parameter {far:.1e}")


if __name__ == "__main__":
    main()
