"""Conditions of a benchmark: build of the core, processor, threads and versions."""

from __future__ import annotations

import os
import platform
from typing import Any

import numpy as np
import torch

import fastsal._core as _core
from fastsal.errors import InvalidArgument
from fastsal.utils.machine import processor


def refuse_debug_build() -> None:
    """Raise InvalidArgument unless the core was compiled with optimization."""
    _, _, is_release = _core.build_info()
    if not is_release:
        raise InvalidArgument(
            "the core is a debug build, whose times are meaningless; build it with "
            "`maturin develop --release`"
        )


def describe() -> dict[str, Any]:
    """Return processor, threads, versions and the cost of fresh memory."""
    from fastsal.cli.bench.timing import fresh_memory_cost

    version, isa, _ = _core.build_info()
    return {
        "fastsal": version,
        "instructions": isa,
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": _core.num_threads(),
        "torch": torch.__version__,
        "torch threads": torch.get_num_threads(),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "first touch of fresh memory, s/GiB": round(fresh_memory_cost(), 2),
    }
