"""Compiling for NVIDIA GPUs and TPUs that are not there.

XLA's CUDA compiler needs no card, only a description of one. ptxas really runs: what does
not fit into registers or shared memory fails here. So does libtpu's own compiler.
"""

import dataclasses
import functools
import os
import re
import warnings

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh

# What the compiler asks a card: NVIDIA's data sheets and deviceQuery.
_CARDS = {
    "a100": {
        "name": "NVIDIA A100-SXM4-80GB",
        "capability": "major: 8 minor: 0 feature_extension: NONE",
        "shared_memory_per_core": 167936,
        "shared_memory_per_block_optin": 166912,
        "core_count": 108,
        "fpus_per_core": 64,
        "memory_bandwidth": 2039040000000,
        "l2_cache_size": 41943040,
        "clock_rate_ghz": 1.41,
        "device_memory_size": 85100068864,
    },
    # The little shared memory of all cards of capability 8.6 and 8.9.
    "rtx4090": {
        "name": "NVIDIA GeForce RTX 4090",
        "capability": "major: 8 minor: 9 feature_extension: NONE",
        "shared_memory_per_core": 102400,
        "shared_memory_per_block_optin": 101376,
        "core_count": 128,
        "fpus_per_core": 128,
        "memory_bandwidth": 1008000000000,
        "l2_cache_size": 75497472,
        "clock_rate_ghz": 2.52,
        "device_memory_size": 25757220864,
    },
    "h100": {
        "name": "NVIDIA H100 80GB HBM3",
        "capability": "major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES",
        "shared_memory_per_core": 233472,
        "shared_memory_per_block_optin": 232448,
        "core_count": 132,
        "fpus_per_core": 128,
        "memory_bandwidth": 3352320000000,
        "l2_cache_size": 52428800,
        "clock_rate_ghz": 1.98,
        "device_memory_size": 84942979072,
    },
}
# The same for all.
_COMMON = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "threads_per_core_limit": 2048,
    "shared_memory_per_block": 49152,
    "registers_per_core_limit": 65536,
    "registers_per_block_limit": 65536,
    "block_dim_limit_x": 2147483647,
    "block_dim_limit_y": 65535,
    "block_dim_limit_z": 65535,
    "thread_dim_limit_x": 1024,
    "thread_dim_limit_y": 1024,
    "thread_dim_limit_z": 64,
}


@dataclasses.dataclass(frozen=True)
class Report:
    """What ptxas says of the kernels that it assembles, in their order.

    ``registers`` are those that a thread starts with, ``spilled`` the most bytes that a
    thread stores for want of registers, ``warnings`` its remarks on lost speed, such as that
    matrix products wait for each other.
    """

    registers: tuple[int, ...]
    spilled: int
    warnings: tuple[str, ...]


# Matrix products that wait for each other (C7510 to C7514), register requests that are not
# granted. Other remarks, such as C7519 on a fence that ptxas adds, are no harm.
_LOST_SPEED = re.compile(r"\(C751[0-4]\)|Performance Loss|serialized|ignored")


def read_report(text):
    """The Report in what the compiler prints with MOSAIC_GPU_DUMP_PTXAS=1."""
    return Report(
        registers=tuple(int(n) for n in re.findall(r"Used (\d+) registers", text)),
        spilled=max(int(n) for n in re.findall(r"(\d+) bytes spill stores", text)),
        warnings=tuple(line for line in text.splitlines() if _LOST_SPEED.search(line)),
    )


def compile_for(card, fn, *shapes, allow_spills=True):
    """``fn`` compiled for ``card`` ('a100', 'h100', 'rtx4090') and arguments of these shapes.

    Each argument is a tree of ``jax.ShapeDtypeStruct``. Unless ``allow_spills``, a Triton
    kernel that runs out of registers is an error.
    """
    options = {"xla_gpu_fail_ptx_compilation_on_register_spilling": not allow_spills}
    device = _topology(card).devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    arguments = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes
    )
    kind = AbstractDevice(device_kind=_CARDS[card]["name"], num_cores=None, platform="gpu")
    mesh = AbstractMesh((), (), abstract_device=kind)
    with jax.sharding.use_abstract_mesh(mesh), warnings.catch_warnings():
        # Known: Mosaic GPU, which replaces it, does not compile for older cards.
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated")
        # JAX's cache keeps such programs but cannot read them back without the card.
        warnings.filterwarnings("ignore", "Error reading persistent compilation cache")
        traced = jax.jit(fn).trace(*arguments)
        return traced.lower(lowering_platforms=("cuda",)).compile(options)


@functools.cache
def _topology(card):
    card = dict(_CARDS[card])
    name, capability = card.pop("name"), card.pop("capability")
    figures = "\n".join(f"  {field}: {figure}" for field, figure in (_COMMON | card).items())
    text = f"""gpu_device_info {{
{figures}
  cuda_compute_capability {{ {capability} }}
  name: "{name}"
}}
platform_name: "CUDA"
device_description_str: "{name}"
"""
    return topologies.get_topology_desc(platform="cuda", target_config=text, topology="1x1x1")


@functools.cache
def tpu(chip):
    """A TPU of the topology ``chip``, such as 'v5e:2x2', to compile for."""
    # One process at a time may hold a chip, and libtpu guards that with a lock. There is
    # no chip here.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    return topologies.get_topology_desc(platform="tpu", topology_name=chip).devices[0]
