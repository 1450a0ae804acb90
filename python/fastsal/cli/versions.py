"""The versions that a result depends on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version


def fastsal_version() -> str:
    """Return the version of the installed package; in a bare source tree, that of its core."""
    try:
        return version("fastsal")
    except PackageNotFoundError:
        import fastsal

        return str(fastsal.__version__)


def versions() -> dict[str, str]:
    """Return the versions of fastsal, Python, and the libraries that shape the numbers."""
    found = {"fastsal": fastsal_version(), "python": platform.python_version()}
    for name in ("torch", "timm", "numpy", "safetensors"):
        found[name] = version(name)
    found["platform"] = platform.platform()
    return found
