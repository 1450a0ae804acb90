"""Recalibrated moments are those of the images; they stay only where they help."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastsal
from fastsal.errors import InvalidArgument
from fastsal.pruning.recalibration import recalibrate, recalibrate_if_better


def make():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)
    )


@pytest.fixture
def data():
    torch.manual_seed(1)
    return torch.randn(96, 3, 6, 6), torch.randint(0, 4, (96,))


def test_moments_are_those_of_the_images(data):
    model = make().train()
    model[2].eval()
    x, y = data
    model[1].momentum = 0.3
    assert recalibrate(model, [(x, y)]) == 1
    out = model[0](x).detach()
    torch.testing.assert_close(model[1].running_mean, out.mean((0, 2, 3)))
    torch.testing.assert_close(model[1].running_var, out.var((0, 2, 3)))
    assert [m.training for m in model] == [True, True, False, True, True]
    assert model[1].momentum == 0.3


@pytest.mark.parametrize("losses", [(1.0, 0.5), (0.5, 1.0), (1.0, float("nan"))])
def test_it_stays_only_where_the_loss_is_lower(data, losses):
    model = make()
    before = {k: v.clone() for k, v in model.named_buffers()}
    values = iter(losses)
    found = recalibrate_if_better(model, [data], lambda: next(values))
    assert found.kept is (losses == (1.0, 0.5))
    changed = any(not torch.equal(v, before[k]) for k, v in model.named_buffers())
    assert changed is found.kept


def test_models_without_such_layers(data):
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 4))
    assert recalibrate(model, [data]) == 0
    assert recalibrate_if_better(model, [data], lambda: 0.0) is None


def test_prune_reports_it(data):
    model = make()
    result = fastsal.prune(model, [data], 0.8, damping=1e-3, recalibrate=True)
    found = result.history[-1].recalibration
    assert found.kept is (found.after < found.before)
    result.masks.verify(model)
    # Random labels under untrained moments: something must have been measured.
    assert found.after != found.before


def test_bad_arguments(data):
    model = make()
    with pytest.raises(InvalidArgument, match="recalibrate"):
        fastsal.prune(model, [data], 0.5, criterion="magnitude", compensate=False, recalibrate=True)
    with pytest.raises(InvalidArgument, match="iterator"):
        fastsal.prune(model, iter([data]), 0.5, recalibrate=True)
