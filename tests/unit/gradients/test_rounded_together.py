"""Samples that a kernel rounds together are apart; samples that depend on each other are not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastsal
from fastsal.errors import UnsupportedLayer


class Leaking(nn.Module):
    """Adds a share of the other samples, as a Fourier transform of two signals at once does."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
        self.share = share

    def forward(self, x):
        x = torch.tanh(self.first(x))
        return self.head(x + self.share * x.roll(1, 0))


def test_a_leak_of_less_than_a_rounding():
    torch.manual_seed(0)
    model = Leaking(1e-18).double()
    x, y = torch.randn(4, 6, dtype=torch.float64), torch.arange(4) % 3
    found = fastsal.per_sample_gradients(model, x, y)
    for i in range(4):
        loss = F.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        (gradient,) = torch.autograd.grad(loss, [model.first.weight])
        torch.testing.assert_close(found["first.weight"][i], gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("share", [1e-9, 1e-3, 0.5])
def test_a_dependence_is_still_refused(share):
    model = Leaking(share).double()
    x, y = torch.randn(4, 6, dtype=torch.float64), torch.arange(4) % 3
    with pytest.raises(UnsupportedLayer, match="depends on the other samples"):
        fastsal.per_sample_gradients(model, x, y)
