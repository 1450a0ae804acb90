"""The machine and the versions that a result depends on."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


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


def threads() -> int:
    """Return the number of threads that PyTorch computes with."""
    import torch  # late: `fastsal --version` reads this module and must start fast

    return torch.get_num_threads()


def versions_of() -> dict[str, Any]:
    """Return `versions` of what shapes the numbers, and the `machine`."""
    import torch

    versions = {
        "fastsal": fastsal_version(),
        "torch": torch.__version__,
        **{name: version(name) for name in ("timm", "numpy")},
        "python": platform.python_version(),
    }
    machine = {
        "processor": processor(),
        "threads": threads(),
        "memory_bytes": _memory(),
        "system": platform.platform(),
    }
    return {"versions": versions, "machine": machine}


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return None


def peak_memory() -> int | None:
    """Return the most memory that this process has held, in bytes; None where not known."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def processor() -> str:
    """Return the name of the processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
