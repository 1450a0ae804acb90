"""Devices by name: the CPU, GPUs of CUDA and ROCm, and that of Apple.

Nothing here imports PyTorch at import time: the command line checks names before anything is run.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from fastsal.errors import InvalidArgument

if TYPE_CHECKING:
    import torch

DEVICE_KINDS = "auto, cpu, cuda, cuda:N or mps"
_NAME = re.compile(r"auto|cpu|mps|cuda(:\d+)?", re.ASCII)


def is_device_name(name: object) -> bool:
    """Whether a value has the form of a device name; the device need not exist."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def available_devices() -> list[str]:
    """Return the names of the devices of this machine, `"cpu"` first."""
    import torch

    found = ["cpu"]
    if torch.cuda.is_available():
        found += [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append("mps")
    return found


def resolve_device(device: str | torch.device) -> torch.device:
    """Return the device of a name; a GPU of CUDA has its number.

    Args:
        device: `"auto"` (CUDA if there is a GPU, else MPS, else the CPU), `"cpu"`, `"cuda"` (the
            current GPU), `"cuda:N"`, `"mps"`, or a `torch.device`.

    Raises:
        InvalidArgument: The name has another form, or this machine has no such device.
    """
    import torch

    name = str(device)
    if not is_device_name(name):
        raise InvalidArgument(f"device must be {DEVICE_KINDS}, got {name!r}")
    known = available_devices()
    if name == "auto":
        kinds = [place.partition(":")[0] for place in known]
        name = next(kind for kind in ("cuda", "mps", "cpu") if kind in kinds)
    if name == "cuda" and "cuda:0" in known:
        return torch.device("cuda", torch.cuda.current_device())
    if name not in known:
        raise InvalidArgument(
            f"device must be one of this machine, got {name!r}; it has {', '.join(known)}"
        )
    return torch.device(name)


def device_facts(device: torch.device) -> dict[str, object]:
    """Return the name of a device and, with CUDA, the model of the GPU and its memory in bytes."""
    import torch

    facts: dict[str, object] = {"device": str(device)}
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["gpu_memory_bytes"] = torch.cuda.get_device_properties(device).total_memory
    return facts
