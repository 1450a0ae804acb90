"""The global random numbers of PyTorch: those of the CPU and those of one device."""

from __future__ import annotations

import torch
from torch import Tensor

State = tuple[Tensor, Tensor | None]  # of the CPU, and of the device if it has its own


def get_random_state(device: torch.device) -> State:
    """Return the state of the random numbers of the CPU and of a device."""
    own = None
    if device.type == "cuda":
        own = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        own = torch.mps.get_rng_state()
    return torch.get_rng_state(), own


def set_random_state(state: State, device: torch.device) -> None:
    """Restore a state that `get_random_state` returned."""
    torch.set_rng_state(state[0])
    if state[1] is None:
        return
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)
    else:
        torch.mps.set_rng_state(state[1])


def seed_random_numbers(seed: int, device: torch.device) -> None:
    """Seed the random numbers of the CPU and of a device, and of no other device."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)
