"""What the tests ask of eight virtual devices, in a process of their own.

``XLA_FLAGS=--xla_force_host_platform_device_count=8 python eight_devices.py`` prints one JSON
object: of each check its name and what it found.
"""

import functools
import json
import re
import sys
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dpfa_jax import add_noise, clipped_grad, dp_aggregate, keys
from dpfa_jax.bench import hlo
from dpfa_jax.clipping.adaptive import adaptive_clipped_grad
from dpfa_jax.optim import dp_adamw, noise_std, privatizer_noise
from pallas_kernels import partition, prng
from pallas_kernels.weighted_sum import weighted_sum

CHECKS = {}
WIDTHS = {"table": (48, 64), "dense": {"kernel": (64, 96), "bias": (96,)}, "head": (96, 40)}
BATCH, TOKENS = 16, 6
# How FSDP splits each leaf: along rows, which need no exchange, and along columns, which do.
FSDP = {"table": P("data"), "dense": {"kernel": P(None, "data"), "bias": P()}, "head": P("data")}
ENGINES = ("vmap", "bookkeeping", "two_pass", "per_layer")


def check(function):
    CHECKS[function.__name__] = function
    return function


def is_shape(x):
    return isinstance(x, tuple)


@functools.cache
def problem():
    """Parameters, examples and padding, on the host."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda s: rng.standard_normal(s).astype(np.float32) / 8, WIDTHS, is_leaf=is_shape
    )
    tokens = rng.integers(0, 48, (BATCH, TOKENS), dtype=np.int32)
    padding = np.arange(BATCH) % 5 == 4
    return params, tokens, padding


def loss(params, tokens):
    x = jnp.tanh(params["table"][tokens] @ params["dense"]["kernel"] + params["dense"]["bias"])
    return -jnp.mean(jax.nn.log_softmax(x @ params["head"])[jnp.arange(TOKENS), tokens % 40])


def gradient(engine="bookkeeping", **options):
    return clipped_grad(loss, l2_clip_norm=0.5, engine=engine, **options)


def noise(**options):
    with keys.allow_reuse_for_tests():
        return add_noise(0.5, 1.0, 8.0, keys.reproducible_key(7), **options)


def mesh(devices, kind=AxisType.Auto, names=("data",), shape=None):
    shape = shape or (devices,)
    kinds = (kind,) * len(shape)
    return jax.make_mesh(shape, names, kinds, devices=jax.devices()[:devices])


def placed(tree, over, specs):
    def put(x, spec):
        return jax.device_put(x, NamedSharding(over, spec))

    return jax.tree.map(put, tree, specs)


def everywhere(tree):
    return jax.tree.map(lambda _: P(), tree)


def bits(tree):
    # What is rounded to zero may keep either sign.
    return [(np.asarray(x) + np.float32(0)).tobytes() for x in jax.tree.leaves(tree)]


def copies(tree, devices):
    return jax.tree.map(lambda x: jnp.stack([x] * devices), tree)


def far(a, b):
    """The largest difference of two trees."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.abs(np.asarray(x) - np.asarray(y)).max()) for x, y in pairs)


def zeros():
    return jax.tree.map(np.zeros_like, problem()[0])


@functools.cache
def alone(correlation=0.0):
    """The second release of a sum of zeros by one device: noise and nothing else."""
    tx = noise(correlation=correlation)
    return bits(jax.jit(functools.partial(released, tx=tx))(zeros()))


def released(total, tx):
    state = tx.init(total)._replace(step=jnp.uint32(1))
    return tx.update(total, state)[0]


@check
def same_noise():
    """Of every way to use devices, whether the noise is bit for bit that of one device."""
    same = {}
    for devices in (1, 2, 4, 8):
        auto, typed = mesh(devices), mesh(devices, AxisType.Explicit)
        plain = jax.jit(functools.partial(released, tx=noise()))
        ways = [("jit", auto)] + [("jit, explicit axes", typed)] * (devices == 8)
        for name, over in ways:
            for layout, specs in (("fsdp", FSDP), ("whole", everywhere(FSDP))):
                if layout == "whole" and (devices < 8 or over is typed):
                    continue
                out = plain(placed(zeros(), over, specs))
                assert all(
                    x.sharding.is_equivalent_to(NamedSharding(over, s), x.ndim)
                    for x, s in zip(jax.tree.leaves(out), jax.tree.leaves(specs), strict=True)
                )
                same[f"{name}, {layout}, {devices}"] = bits(out) == alone()
        if devices == 8:
            correlated = jax.jit(functools.partial(released, tx=noise(correlation=0.5)))
            same["correlated"] = bits(correlated(placed(zeros(), auto, FSDP))) == alone(0.5)
        if devices == 2:  # outside jit, on arrays that are split
            out = released(placed(zeros(), auto, FSDP), noise())
            same[f"no jit, fsdp, {devices}"] = bits(out) == alone()
        whole = everywhere(FSDP)
        for checks in (True, False):
            stated = None if checks else ()
            for layout, specs in (("whole", whole), ("fsdp", FSDP)):
                if devices < 8 and (layout == "whole" or not checks):
                    continue
                given = {"specs": specs} if layout == "fsdp" else {}
                tx = noise(axis_name=stated, **given)
                mapped = jax.shard_map(
                    functools.partial(released, tx=tx),
                    mesh=auto,
                    in_specs=(specs,),
                    out_specs=specs,
                    check_vma=checks,
                )
                name = f"shard_map, check_vma={checks}, {layout}, {devices}"
                same[name] = bits(jax.jit(mapped)(zeros())) == alone()
        stacked = copies(zeros(), devices)
        tx = noise(axis_name="data")
        mapped = jax.pmap(
            functools.partial(released, tx=tx), "data", devices=jax.devices()[:devices]
        )
        out = mapped(stacked)
        same[f"pmap, {devices}"] = all(
            bits(jax.tree.map(lambda x, d=d: x[d], out)) == alone() for d in range(devices)
        )
    return same


@check
def any_split():
    """Random splits of random shapes, over one, two and three axes, uneven ones included."""
    shapes = [(16, 24), (1024, 40), (7,), (), (8, 40), (3, 3, 8, 16), (4096,), (1, 16, 50)]
    nonces = [(0, 0, i) for i in range(len(shapes))]
    words = jnp.arange(8, dtype=jnp.uint32)
    alone = [
        np.asarray(x).reshape(s)
        for x, s in zip(
            prng.normal_streams(
                words, [(int(np.prod(s)), n) for s, n in zip(shapes, nonces, strict=True)]
            ),
            shapes,
            strict=True,
        )
    ]
    rng = np.random.default_rng(0)
    wrong = []
    for shape, names in (((8,), "a"), ((4, 2), "ab"), ((2, 2, 2), "abc")):
        over = mesh(8, names=tuple(names), shape=shape)
        for _ in range(2):
            specs = []
            for s in shapes:
                free = list(rng.permutation(list(names)))
                spec = [None] * len(s)
                for d in rng.permutation(len(s)):
                    count = int(rng.integers(0, len(free) + 1))
                    spec[d], free = tuple(map(str, free[:count])) or None, free[count:]
                specs.append(P(*spec))

            def made(words, specs=specs, over=over):
                like = [jnp.zeros(s) for s in shapes]
                out = prng.normals_like(words, like, nonces)
                # Inside jit a split may be uneven.
                return [
                    jax.lax.with_sharding_constraint(x, NamedSharding(over, s))
                    for x, s in zip(out, specs, strict=True)
                ]

            out = jax.jit(made, out_shardings=NamedSharding(over, P()))(words)
            wrong += [
                f"{s} {spec}"
                for s, spec, x, y in zip(shapes, specs, alone, out, strict=True)
                if x.tobytes() != np.asarray(y).tobytes()
            ]
    return wrong


@check
def same_sum():
    """Of every engine and way, how far the clipped sum is from that of one device."""
    params, tokens, padding = problem()
    found = {}
    for engine in ENGINES:
        grad = gradient(engine)
        expected = grad(params, tokens, is_padding_example=padding)
        scale = max(float(np.abs(x).max()) for x in jax.tree.leaves(expected))
        kinds = (AxisType.Auto, AxisType.Explicit) if engine != "two_pass" else (AxisType.Auto,)
        for kind in kinds:
            over = mesh(8, kind)
            rows = NamedSharding(over, P("data"))
            for micro in (None, 8) if engine == "bookkeeping" else (None,):
                split = gradient(engine, microbatch_size=micro, batch_sharding=rows)
                layout = everywhere(FSDP)
                out = jax.jit(split.__call__)(
                    placed(params, over, layout),
                    jax.device_put(tokens, rows),
                    is_padding_example=jax.device_put(padding, rows),
                )
                found[f"jit, {kind}, {engine}, microbatches of {micro}"] = (
                    far(expected, out) / scale
                )
        over = mesh(8)
        for checks in (True, False) if engine == "bookkeeping" else (True,):
            for micro in (None, 1) if engine == "bookkeeping" else (None,):
                local = gradient(engine, microbatch_size=micro)

                def summed(params, tokens, padding, local=local):
                    mine = local(params, tokens, is_padding_example=padding)
                    return jax.lax.psum(mine, "data")

                out = jax.jit(
                    jax.shard_map(
                        summed,
                        mesh=over,
                        in_specs=(P(), P("data"), P("data")),
                        out_specs=P(),
                        check_vma=checks,
                    )
                )(params, tokens, padding)
                name = f"shard_map, check_vma={checks}, {engine}, microbatches of {micro}"
                found[name] = far(expected, out) / scale
    return found


def train_step(grad, tx):
    def step(params, state, tokens, padding):
        total = grad(params, tokens, is_padding_example=padding)
        updates, state = tx.update(total, state, params)
        return optax.apply_updates(params, updates), state

    return step


def optimiser(**options):
    return optax.chain(noise(**options), dp_adamw(0.01, noise_std(0.5, 1.0, 8.0)))


def trained(step, params, state, tokens, padding):
    for _ in range(3):
        params, state = step(params, state, tokens, padding)
    return params


@check
def same_training():
    """Three steps with Adam: how far the parameters are from those of one device."""
    params, tokens, padding = problem()
    tx = optimiser()
    step = train_step(gradient(), tx)
    expected = trained(jax.jit(step), params, tx.init(params), tokens, padding)
    found = {}
    for devices in (8,):
        over = mesh(devices)
        rows = NamedSharding(over, P("data"))
        data = jax.device_put((tokens, padding), rows)
        for layout, specs in (("dp", everywhere(FSDP)), ("fsdp", FSDP)):
            split = placed(params, over, specs)
            state = jax.jit(tx.init)(split)
            out = trained(jax.jit(step), split, state, *data)
            found[f"jit, {layout}, {devices}"] = far(expected, out)
        mapped_tx = optimiser(axis_name="data")
        mapped = train_step(gradient(), mapped_tx)
        sharded = jax.jit(
            jax.shard_map(
                mapped, mesh=over, in_specs=(P(), P(), P("data"), P("data")), out_specs=P()
            )
        )
        out = trained(sharded, params, mapped_tx.init(params), tokens, padding)
        found[f"shard_map, {devices}"] = far(expected, out)
        start = copies((params, mapped_tx.init(params)), devices)
        pieces = [x.reshape(devices, -1, *x.shape[1:]) for x in (tokens, padding)]
        run = jax.pmap(mapped, "data", devices=jax.devices()[:devices])
        out = trained(run, *start, *pieces)
        found[f"pmap, {devices}"] = max(
            far(expected, jax.tree.map(lambda x, d=d: x[d], out)) for d in range(devices)
        )
    return found


def collectives(compiled):
    """``[[kind, elements], ...]`` of the program of one device, each instruction once."""
    return [[sent.kind, sent.elements] for sent in hlo.collectives(compiled.as_text())]


@check
def programs():
    """What the compiled step of one of eight devices says and holds."""
    params, tokens, padding = problem()
    found = {}
    sizes = [x.size for x in jax.tree.leaves(params)]
    over = mesh(8)
    rows = NamedSharding(over, P("data"))
    data = jax.device_put((tokens, padding), rows)
    for layout, specs in (("dp", everywhere(FSDP)), ("fsdp", FSDP)):
        split = placed(params, over, specs)
        for part, tx in (("step", optimiser()), ("noise", noise())):
            state = jax.jit(tx.init)(split)
            if part == "step":
                lowered = jax.jit(train_step(gradient(), tx)).lower(split, state, *data)
            else:
                lowered = jax.jit(tx.update).lower(split, state)
            compiled = lowered.compile()
            memory = compiled.memory_analysis()
            held = [
                int(np.prod([int(n) for n in s.split(",")]))
                for s in re.findall(r"f32\[([0-9,]+)\]", compiled.as_text())
            ]
            found[f"{part}, {layout}"] = {
                "collectives": collectives(compiled),
                "argument_bytes": memory.argument_size_in_bytes,
                "temp_bytes": memory.temp_size_in_bytes,
                "largest": max(held),
            }
    return {"leaves": sizes, "programs": found}


def refusal(function, *arguments):
    try:
        function(*arguments)
    except ValueError as error:
        return str(error)
    return None


def white(*, stddev, prng_key, dtype):
    """A privatizer of independent noise."""

    def update(updates, state, params=None):
        del params
        leaves, tree = jax.tree.flatten(updates)
        noise = [
            stddev * jax.random.normal(jax.random.fold_in(prng_key, n), x.shape, dtype)
            for n, x in enumerate(leaves)
        ]
        return tree.unflatten([x + g for x, g in zip(leaves, noise, strict=True)]), state

    return optax.GradientTransformation(lambda params: (), update)


@check
def refused():
    """What each wrong use says."""
    params, tokens, padding = problem()
    over = mesh(8)

    def step(tx, before=lambda x: x, key=lambda s: s):
        def run(params, tokens, padding):
            total = before(gradient()(params, tokens, is_padding_example=padding))
            return tx.update(total, key(tx.init(params)))[0]

        return run

    def mapped(function, checks=True):
        return jax.jit(
            jax.shard_map(
                function,
                mesh=over,
                in_specs=(P(), P("data"), P("data")),
                out_specs=P(),
                check_vma=checks,
            )
        )

    def own_key(state):
        return state._replace(key=jax.random.fold_in(state.key, jax.lax.axis_index("data")))

    def total(x):
        return jax.lax.psum(x, "data")

    pieces = [x.reshape(8, -1, *x.shape[1:]) for x in (tokens, padding)]
    in_pmap = jax.pmap(step(noise()), "data", in_axes=(None, 0, 0))
    args = (params, tokens, padding)
    tx = dp_aggregate(0.5, 1.0, 8.0, keys.reproducible_key(9))

    def aggregate(params, tokens, padding):
        del padding
        own = jax.tree.map(lambda x: jax.lax.pcast(x, ("data",), to="varying"), params)
        grads = jax.vmap(jax.grad(loss), in_axes=(None, 0))(own, tokens)
        return tx.update(grads, tx.init(params))[0]

    other = privatizer_noise(white, 0.5, 1.0, 8.0, keys.reproducible_key(10))

    def privatized(params, tokens, padding):
        total = gradient()(params, tokens, is_padding_example=padding)
        return other.update(total, other.init(params))[0]

    return {
        "one device's sum": refusal(mapped(step(noise())), *args),
        "one device's sum, dp_aggregate": refusal(mapped(aggregate), *args),
        "types off": refusal(mapped(step(noise()), checks=False), *args),
        "pmap": refusal(in_pmap, params, *pieces),
        "added up twice": refusal(mapped(step(noise(axis_name="data"), before=total)), *args),
        "a key a device": refusal(mapped(step(noise(), total, own_key)), *args),
        "no such axis": refusal(jax.jit(step(noise(axis_name="data"))), *args),
        "specs under jit": refusal(jax.jit(step(noise(specs=FSDP))), *args),
        "specs of another tree": refusal(mapped(step(noise(specs=[P()]), total)), *args),
        "specs of a whole sum": refusal(mapped(step(noise(specs=FSDP), total)), *args),
        "specs and a sum along one axis": refusal(
            mapped(step(noise(specs=FSDP, axis_name="data")), checks=False), *args
        ),
        "one device's sum, privatizer": refusal(mapped(privatized), *args),
        "one device's sum, privatizer, types off": refusal(mapped(privatized, checks=False), *args),
        "mixed axes": refusal(
            jax.jit(step(noise())),
            *placed(
                (params, tokens, padding),
                jax.make_mesh((4, 2), ("data", "x"), (AxisType.Explicit, AxisType.Auto)),
                (everywhere(params), P("data"), P("data")),
            ),
        ),
    }


@check
def variances():
    """z-scores of the released noise's variance, and of a planted bug's."""
    count, devices = 100_000, 8
    over = mesh(devices)

    def score(values):
        # The mean of n squares of standard normals has the standard deviation √(2/n).
        expected = (0.5 * (1 + 2**-10) / 8.0) ** 2
        ratio = float(np.mean(np.square(np.asarray(values, np.float64)))) / expected
        return (ratio - 1) / np.sqrt(2 / count)

    def mapped(function):
        return jax.jit(
            jax.shard_map(function, mesh=over, in_specs=P("data"), out_specs=P(), check_vma=False)
        )

    def once(parts):
        tx = noise(axis_name="data")
        return tx.update(parts[0], tx.init(None))[0]

    def every_device(parts):
        # The bug: each device takes its own sum for the whole one.
        tx = noise(axis_name=())
        return jax.lax.psum(tx.update(parts[0], tx.init(None))[0], "data")

    def own_keys(parts):
        tx = noise(axis_name=())
        state = tx.init(None)
        key = jax.random.fold_in(state.key, jax.lax.axis_index("data"))
        words = keys.purpose_words(key, state.step, keys.GRADIENT)
        g = prng.normal_stream(words, count)
        return jax.lax.psum(parts[0] + 0.5 * g, "data") / 8.0

    parts = np.zeros((devices, count), np.float32)
    tx = noise()
    split = jax.device_put(parts[0], NamedSharding(over, P("data")))
    return {
        "jit": score(jax.jit(tx.update)(split, tx.init(None))[0]),
        "shard_map": score(mapped(once)(parts)),
        "planted: every device": score(mapped(every_device)(parts)),
        "planted: every device, keys of their own": score(mapped(own_keys)(parts)),
    }


@check
def adaptive():
    """The adaptive clip norm's count and gradient, beside those of one device."""
    params, tokens, padding = problem()
    grad = adaptive_clipped_grad(loss, initial_l2_clip_norm=0.5)

    def run(clip, params, tokens, padding):
        return grad(clip, params, tokens, is_padding_example=padding)

    expected = jax.jit(run)(grad.init(), params, tokens, padding)
    out = jax.jit(
        jax.shard_map(
            lambda *args: jax.lax.psum(run(*args), "data"),
            mesh=mesh(8),
            in_specs=(P(), P(), P("data"), P("data")),
            out_specs=P(),
        )
    )(grad.init(), params, tokens, padding)
    return far(expected, out)


@check
def weighted_sums():
    """Of each split of the rows over a mesh of 4 x 2: how far off, and the collectives."""
    rng = np.random.default_rng(0)
    rows, weights = rng.standard_normal((16, 24, 8)), rng.uniform(size=16)
    rows[3], weights[3] = np.nan, 0.0
    wanted = np.einsum("b,b...->...", weights, np.nan_to_num(rows))

    def call(rows, weights):
        return weighted_sum(rows, weights, implementation="triton", interpret=True)

    found = {}
    for kind in (AxisType.Auto, AxisType.Explicit):
        over = mesh(8, kind, ("a", "b"), (4, 2))
        for spec in (P("a"), P(None, "a"), P("a", "b"), P(("a", "b"))):
            given = placed((np.float32(rows), np.float32(weights)), over, (spec, P(spec[0])))
            compiled = jax.jit(call).lower(*given).compile()
            got = np.asarray(compiled(*given), np.float64)
            far = np.abs(got - wanted).max()
            found[f"{kind.name}, {tuple(spec)}"] = [far, collectives(compiled)]
    return found


@check
def slices():
    """How far off kernels are that take a slice of what is split: a count the mesh does not divide.

    The partitioner fills the last parts up with what was cut off.
    """
    rng = np.random.default_rng(0)
    rows, weights = rng.standard_normal((16, 24)), rng.uniform(size=16)
    given = placed((np.float32(rows), np.float32(weights)), mesh(8), (P("data"), P("data")))

    def total(rows, weights):
        return weighted_sum(rows, weights, implementation="triton", interpret=True)

    def in_parts(rows, weights):
        # As microbatches of 12 are made of 16: the last is filled up.
        parts = [
            jnp.concatenate([x, jnp.repeat(x[:1], 8, axis=0)]).reshape(2, 12, *x.shape[1:])
            for x in (rows, weights.at[0].set(0.0))
        ]
        return jnp.sum(jax.lax.map(lambda p: total(*p), tuple(parts)), axis=0)

    norms = partition.split_by_batch(lambda x: jnp.sum(jnp.square(x), axis=1))
    cases = {
        "weighted sum": (lambda x, w: total(x[:13], w[:13]), weights[:13] @ rows[:13]),
        "weighted sum, columns": (
            lambda x, w: total(jax.lax.with_sharding_constraint(x.T, P("data"))[:, :13].T, w[:13]),
            weights[:13] @ rows[:13],
        ),
        "weighted sum in parts": (in_parts, weights[1:] @ rows[1:]),
        "norms": (lambda x, w: norms(x[:13]), np.square(rows[:13]).sum(1)),
        "norms in parts": (
            lambda x, w: jax.lax.map(norms, jnp.concatenate([x, x[:8]]).reshape(2, 12, 24)),
            np.square(np.concatenate([rows, rows[:8]])).sum(1).reshape(2, 12),
        ),
    }
    with jax.set_mesh(mesh(8)):
        return {
            name: float(np.abs(np.asarray(jax.jit(run)(*given), np.float64) - want).max())
            for name, (run, want) in cases.items()
        }


def main():
    found = {}
    for name in sys.argv[1:] or CHECKS:
        try:
            found[name] = CHECKS[name]()
        except Exception:
            found[name] = {"error": traceback.format_exc()}
    print(json.dumps(found))


if __name__ == "__main__":
    with jax.numpy_dtype_promotion("strict"):
        main()
