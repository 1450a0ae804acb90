"""The machine, the library versions and the memory that a result depends on.

Nothing here imports PyTorch at import time: `fastsal --version` reads this module.
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_CONTROL_GROUP = Path("/sys/fs/cgroup")
_LIBRARIES = ("torch", "timm", "numpy", "safetensors")


def fastsal_version() -> str:
    """Return the version of the installed package; in a bare source tree, that of its core."""
    try:
        return version("fastsal")
    except PackageNotFoundError:
        import fastsal

        return str(fastsal.__version__)


def versions() -> dict[str, str]:
    """Return the versions of fastsal, of Python and of the libraries that affect the results."""
    libraries = {name: version(name) for name in _LIBRARIES}
    return {"fastsal": fastsal_version(), **libraries, "python": platform.python_version()}


def machine() -> dict[str, Any]:
    """Return the processor, threads of PyTorch, memory in bytes (None if unknown) and system."""
    return {
        "processor": processor(),
        "threads": torch_threads(),
        "memory_bytes": total_memory(),
        "system": platform.platform(),
    }


def processor() -> str:
    """Return the name of the processor, with family and model where the system tells them.

    Clouds give processors of several generations one name.
    """
    facts: dict[str, str] = {}
    with contextlib.suppress(OSError):
        first, _, _ = Path("/proc/cpuinfo").read_text().partition("\n\n")
        for line in first.splitlines():
            key, _, value = line.partition(":")
            facts[key.strip()] = value.strip()
    name = facts.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in facts and "model" in facts:
        name += f" (family {facts['cpu family']}, model {facts['model']})"
    return name


def torch_threads() -> int:
    """Return the number of threads that PyTorch uses for one operation."""
    import torch

    return torch.get_num_threads()


def total_memory() -> int | None:
    """Return the physical memory of the machine in bytes, or None if unknown."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return None


def available_memory() -> int | None:
    """Return the memory in bytes that this process can still use, or None if unknown.

    That of the machine, or of a container if its limit is lower.
    """
    try:
        text = Path("/proc/meminfo").read_text()
        found = int(text.split("MemAvailable:")[1].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        total = total_memory()
        return None if total is None else total // 2
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):
            most = int((_CONTROL_GROUP / limit).read_text())
            found = min(found, max(0, most - int((_CONTROL_GROUP / used).read_text())))
    return found


def peak_memory() -> int | None:
    """Return the peak resident memory of this process in bytes, or None if unknown."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
