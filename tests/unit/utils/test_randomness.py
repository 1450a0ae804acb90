"""Random numbers of the CPU and of a device."""

from __future__ import annotations

import pytest
import torch

from fastsal.utils.randomness import get_random_state, seed_random_numbers, set_random_state

CPU = torch.device("cpu")


def test_the_state_of_the_cpu_is_restored():
    before = get_random_state(CPU)
    first = torch.rand(3)
    seed_random_numbers(7, CPU)
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(7)))
    set_random_state(before, CPU)
    assert torch.equal(torch.rand(3), first)


def test_that_of_apple_s_gpu_too(monkeypatch):
    """As far as a machine without one can tell."""
    held = {"state": torch.tensor([1])}
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: held["state"])
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda state: held.update(state=state))
    monkeypatch.setattr(torch.mps, "manual_seed", lambda n: held.update(state=torch.tensor([n])))
    device = torch.device("mps")
    before = get_random_state(device)
    seed_random_numbers(7, device)
    assert held["state"].tolist() == [7]
    set_random_state(before, device)
    assert held["state"].tolist() == [1]


@pytest.mark.gpu
def test_those_of_a_gpu():
    device = torch.device("cuda", 0)
    before = get_random_state(device)
    first = torch.rand(3, device=device)
    seed_random_numbers(7, device)
    assert not torch.equal(torch.rand(3, device=device), first)
    set_random_state(before, device)
    assert torch.equal(torch.rand(3, device=device), first)
