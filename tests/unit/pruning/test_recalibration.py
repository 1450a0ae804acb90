"""Recalibrated moments are those of the images; they stay only where they help."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import fastsal
from fastsal.errors import DataError, InvalidArgument
from fastsal.pruning import rounds
from fastsal.pruning.recalibration import (
    loss_if_recalibrated,
    recalibrate,
    recalibrate_if_better,
)


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


class Twice(nn.Module):
    """A normalization that is called at two sizes in one forward pass, once by keyword."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3, momentum=None)
        self.untracked = nn.BatchNorm2d(3, track_running_stats=False)

    def forward(self, x):
        return self.untracked(self.norm(x)).mean((2, 3)) + self.norm(input=x[..., ::2] + 1).mean(
            (2, 3)
        )


def test_a_batch_counts_by_its_images(data):
    """Means are those of all values, for any cut into batches; variances of a batch alike."""
    x, _ = data
    model = Twice().double()
    batches = [(part.double(), None) for part in (x[:60], x[60:90], x[90:92], x[92:])]
    assert recalibrate(model, batches) == 1
    calls = [y for part, _ in batches for y in (part, part[..., ::2] + 1)]
    values = [y.transpose(0, 1).flatten(1) for y in calls]
    weights = [y.shape[1] / sum(z.shape[1] for z in values) for y in values]
    mean = torch.cat(values, 1).mean(1)
    torch.testing.assert_close(model.norm.running_mean, mean)
    variance = sum(w * y.var(1) for w, y in zip(weights, values, strict=True))
    torch.testing.assert_close(model.norm.running_var, variance)
    assert model.norm.momentum is None
    assert not model.norm._forward_pre_hooks


@pytest.mark.parametrize("losses", [(1.0, 0.5), (0.5, 1.0), (1.0, float("nan"))])
def test_it_stays_only_where_the_loss_is_lower(data, losses):
    model = make()
    before = {k: v.clone() for k, v in model.named_buffers()}
    values = iter(losses)
    found = recalibrate_if_better(model, [data], lambda: next(values))
    assert found.kept is (losses == (1.0, 0.5))
    changed = any(not torch.equal(v, before[k]) for k, v in model.named_buffers())
    assert changed is found.kept


@pytest.mark.parametrize("losses", [(1.0, 0.5), (0.5, 1.0), (1.0, math.nan), (math.nan, 2.0)])
def test_the_lower_loss_counts_and_the_model_is_unchanged(data, losses):
    model = make()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    values = iter(losses)
    found = loss_if_recalibrated(model, [data], lambda: next(values))
    assert found == min(value for value in losses if not math.isnan(value))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_damping_is_judged_as_the_model_will_be(data):
    """Of λ with and without moments that fit, the one that is better after recalibration wins."""
    images = data[0] + 3  # without some weights, means of channels are others
    model = make()
    recalibrate(model, [(images, None)])
    how = {"curvature": "features", "compensate": False, "parameters": ["0.weight"]}
    batches = [(images, None)]
    told = fastsal.prune(copy.deepcopy(model), batches, 0.5, **how).history[0]
    plain = fastsal.prune(copy.deepcopy(model), batches, 0.5, **how, recalibrate=False).history[0]
    assert plain.recalibration is None
    recalibrated, others = dict(told.damping_evidence), dict(plain.damping_evidence)
    both = recalibrated.keys() & others.keys()
    assert len(both) >= 3
    assert all(recalibrated[damping] <= others[damping] for damping in both)
    assert any(recalibrated[damping] < others[damping] for damping in both)


@pytest.mark.parametrize(
    ("options", "is_on"),
    [
        ({"curvature": "features"}, True),
        ({"curvature": "features", "damping": 1e-3}, False),
        ({"curvature": "empirical"}, False),
        ({"curvature": "features", "recalibrate": False}, False),
    ],
)
def test_it_is_on_by_default_where_features_are_held_out(data, options, is_on):
    result = fastsal.prune(make(), [data], 0.5, **options)
    assert (result.history[-1].recalibration is not None) is is_on


def test_images_that_come_once_are_not_recalibrated_on_by_default(data):
    result = fastsal.prune(make(), iter([data]), 0.5, curvature="features")
    assert result.history[-1].recalibration is None


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


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("no memory")])
def test_an_interrupted_recalibration_leaves_the_moments(data, error):
    model = make()
    recalibrate(model, [data])
    before = {k: v.clone() for k, v in model.named_buffers()}

    def failing():
        yield data[0] + 1, None
        raise error

    with pytest.raises(type(error) if isinstance(error, Exception) else error):
        recalibrate(model, failing())
    assert all(v.equal(before[k]) for k, v in model.named_buffers())
    assert model[1].momentum == 0.1


def test_no_images_leave_the_moments(data):
    model = make()
    recalibrate(model, [data])
    before = {k: v.clone() for k, v in model.named_buffers()}
    with pytest.raises(DataError, match="batches must contain at least one image"):
        recalibrate(model, [])
    assert all(v.equal(before[k]) for k, v in model.named_buffers())


def test_a_loss_that_fails_leaves_the_moments(data):
    model = make()
    before = {k: v.clone() for k, v in model.named_buffers()}
    losses = iter([1.0])
    with pytest.raises(StopIteration):
        recalibrate_if_better(model, [data], lambda: next(losses))
    assert all(v.equal(before[k]) for k, v in model.named_buffers())


def test_prune_that_is_interrupted_after_it_leaves_the_model(data, monkeypatch):
    model = make()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    tried = []

    def interrupted(model, batches, _):
        values = iter((1.0, 0.5))
        assert recalibrate_if_better(model, batches, lambda: next(values)).kept
        tried.append(any(not v.equal(before[k]) for k, v in model.named_buffers()))
        raise KeyboardInterrupt

    monkeypatch.setattr(rounds, "recalibrate_if_better", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fastsal.prune(model, [data], 0.8, damping=1e-3, recalibrate=True)
    assert tried == [True]
    assert all(v.equal(before[k]) for k, v in model.state_dict().items())
