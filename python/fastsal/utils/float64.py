"""Float64 on devices that may lack it."""

from __future__ import annotations

import torch
from torch import Tensor

# Types of devices without float64 arithmetic.
WITHOUT_FLOAT64 = {"mps"}


def float64_device(device: torch.device | str) -> torch.device:
    """Return the device for float64 tensors: the same or, if it has no float64, the CPU."""
    device = torch.device(device)
    return torch.device("cpu") if device.type in WITHOUT_FLOAT64 else device


def in_float64(tensor: Tensor) -> Tensor:
    """Convert a tensor to float64, on its device or, if that has no float64, on the CPU."""
    # In two steps: `to(device, dtype)` may convert on the old device.
    return tensor.to(float64_device(tensor.device)).to(torch.float64)
