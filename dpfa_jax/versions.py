"""Versions of what figures were made with."""

import importlib.metadata
import platform
from collections.abc import Iterable

# What kernels and their peers are measured with.
MEASURED = ("dpfa_jax", "jax", "jaxlib", "numpy", "tokamax", "torch", "nvidia-cudnn-cu13")


def package_versions(packages: Iterable[str] = MEASURED) -> dict[str, str | None]:
    """Python's version and the packages'; None for one that is not installed.

    Example:
        >>> sorted(package_versions(["jax", "no-such-package"]))
        ['jax', 'no-such-package', 'python']
    """
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions
