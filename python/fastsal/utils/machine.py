"""What a study ran on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from typing import Any

import torch

import fastsal
from fastsal.cli.bench.machine import processor


def threads() -> int:
    """Threads that PyTorch computes with."""
    return torch.get_num_threads()


def versions_of() -> dict[str, Any]:
    """Return `versions` of what shapes the numbers, and the `machine`."""
    versions = {
        "fastsal": str(fastsal.__version__),
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
