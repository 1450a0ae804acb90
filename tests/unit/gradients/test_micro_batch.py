"""The number of samples of a pass."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastsal.gradients import choose_micro_batch


def parameter(size, device="cpu", dtype=torch.float32):
    return SimpleNamespace(numel=lambda: size, device=torch.device(device), dtype=dtype, itemsize=4)


@pytest.mark.parametrize(
    ("weights", "dtype", "size"),
    [
        (10, torch.float32, 64),
        (2**20, torch.float32, 32),
        (2**20 + 1, torch.float32, 16),
        (2**20, torch.bfloat16, 32),  # its rows are float32
        (2**20, torch.float64, 16),
        (2**30, torch.float32, 1),
    ],
)
def test_rows_of_the_largest_parameter_fit(weights, dtype, size):
    given = {"small": nn.Parameter(torch.ones(2)), "large": parameter(weights, dtype=dtype)}
    assert choose_micro_batch(given) == size


@pytest.mark.parametrize(("gib", "size"), [(8, 8), (24, 16), (139, 64)])
def test_a_gpu_has_more_samples_the_more_memory_it_has(monkeypatch, gib, size):
    """Of ViT-B, whose largest weight has 2.4 M entries."""
    found = SimpleNamespace(total_memory=gib * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    assert choose_micro_batch({"w": parameter(768 * 3072, "cuda:0")}) == size
