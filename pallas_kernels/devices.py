"""Which back ends of kernels the default device can run."""

import jax

# Best first, with the platform each one runs on.
PLATFORMS: dict[str, str] = {"mosaic_gpu": "gpu", "triton": "gpu", "mosaic_tpu": "tpu"}


def wrong_device(name: str) -> str | None:
    """Why the kernels ``name`` cannot run on this process's default device; None if they can.

    Example:
        >>> jax.default_backend(), wrong_device("mosaic_tpu")
        ('cpu', "needs a TPU, the default backend is 'cpu'")
    """
    platform = jax.default_backend()
    if platform != PLATFORMS[name]:
        return f"needs a {PLATFORMS[name].upper()}, the default backend is {platform!r}"
    device = jax.devices()[0]
    if platform == "gpu":
        capability = str(getattr(device, "compute_capability", "0.0"))
        major = int(capability.split(".")[0])
        if name == "mosaic_gpu" and major != 9:
            return f"needs a Hopper GPU (compute capability 9.0), this is {capability}"
        if name == "triton" and major < 8:
            return f"needs compute capability 8.0 or more, this is {capability}"
    return None


def multiprocessors() -> int:
    """Of the GPU here; of an H100 where there is none (kernels that are only compiled)."""
    try:
        return int(jax.devices("gpu")[0].core_count)
    except RuntimeError:
        return 132
