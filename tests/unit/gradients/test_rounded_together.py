"""Samples that a kernel rounds together are apart; samples that depend on each other are not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastsal
from fastsal.errors import UnsupportedLayer
from fastsal.gradients import GradientEngine, select_parameters


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


class Rounding(torch.autograd.Function):
    """Passes gradients on with new errors each time, as kernels of a GPU in TF32 may."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (1 + 0.02 * torch.randn_like(gradient))


class Rounded(nn.Module):
    """Rounds gradients; `share` of the first sample's features is added to the others, and only so.

    The first loss then depends on no other sample, but the other losses on the first one.
    """

    def __init__(self, share: float = 0.0) -> None:
        super().__init__()
        self.conv, self.first, self.head = nn.Conv2d(1, 4, 3), nn.Linear(16, 6), nn.Linear(6, 3)
        self.share = share

    def forward(self, x):
        x = Rounding.apply(torch.tanh(self.conv(x)).flatten(1))
        x = Rounding.apply(torch.tanh(self.first(x)))
        return self.head(x + self.share * torch.cat([torch.zeros_like(x[:1]), x[:-1]]))


def test_kernels_that_round_differently_each_time():
    torch.manual_seed(0)
    model = Rounded().eval()
    weights = select_parameters(model)
    with GradientEngine(model, weights) as engine:
        engine.run(torch.randn(4, 1, 4, 4), torch.arange(4) % 3, lambda name, rows: None)
        assert set(engine.operations) == set(weights)


@pytest.mark.parametrize("share", [0.01, 0.5])
def test_a_dependence_on_earlier_samples_alone_is_refused_all_the_same(share):
    torch.manual_seed(0)
    with pytest.raises(UnsupportedLayer, match="depends on the other samples"):
        fastsal.per_sample_gradients(
            Rounded(share).eval(), torch.randn(4, 1, 4, 4), torch.arange(4) % 3
        )
