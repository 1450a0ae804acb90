"""The user's loss is called where the model is, in every path."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastsal

IMAGES = [(torch.randn(16, 3, 2, 2), torch.arange(16) % 3) for _ in range(3)]


@pytest.mark.parametrize("way", ["limit", "auto", "fixed"])
def test_a_loss_sees_no_tensor_that_was_moved(monkeypatch, way):
    """Neither outputs nor labels are moved to the CPU first: it may hold weights of classes."""
    cpu = torch.Tensor.cpu
    moved = []

    def watched(tensor):
        moved.append(found := cpu(tensor).clone())
        return found

    monkeypatch.setattr(torch.Tensor, "cpu", watched)
    seen = []

    def loss(outputs, labels):
        seen.append(outputs)
        assert not any(outputs is found or labels is found for found in moved)
        return nn.functional.cross_entropy(outputs, labels, reduction="none")

    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    how = {
        "limit": {"max_accuracy_drop": 0.5, "damping": 0.1},
        "auto": {"sparsity": 0.5, "damping": "auto"},
        "fixed": {"sparsity": 0.5, "damping": 0.1},
    }[way]
    fastsal.prune(model, IMAGES, loss=loss, **how)
    assert seen
