"""`prune(budget="macs")`: the sparsity is a fraction of the multiply-accumulates."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastsal
from fastsal.errors import InvalidArgument

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, stride=4, padding=1),
            nn.Flatten(),
            nn.Linear(32, 10),
        ).eval()


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(48, 3, 8, 8, generator=generator)
    return [(x, torch.arange(len(x)) % 10) for x in images.split(16)]


MACS = {"0.weight": 64, "2.weight": 4, "4.weight": 1}


def share(masks):
    sizes = {name: mask.numel() for name, mask in masks.items()}
    total = sum(MACS[name] * size for name, size in sizes.items())
    return 1 - sum(MACS[name] * masks.kept[name] for name in sizes) / total


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("criterion", ["obs-greedy", "diag-fisher"])
def test_budget_is_met(model, data, criterion, rounds):
    options = {"criterion": criterion, "rounds": rounds, "damping": 1e-3}
    done = fastsal.prune(model, data, 0.6, budget="macs", **options)
    assert share(done.masks) == pytest.approx(0.6, abs=0.5 * 64 / 16_448)
    assert done.masks.recipe["budget"] == "macs"
    assert done.masks.recipe["costs"] == MACS
    done.masks.verify(model)


def test_is_the_rank_of_scores_with_costs(model, data):
    other = copy.deepcopy(model)
    fisher = fastsal.collect(other, data)
    scores = fastsal.score(other, fisher, "block-fisher", 1e-3)
    masks = fastsal.rank(scores, 0.5, costs=fastsal.weight_macs(other, data[0][0]))
    options = {"criterion": "block-fisher", "damping": 1e-3}
    assert fastsal.prune(model, data, 0.5, budget="macs", **options).masks == masks


def test_without_images():
    small = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, stride=2)).eval()
    done = fastsal.prune(small, None, 0.5, criterion="magnitude", compensate=False, budget="macs")
    assert 0 < done.masks.kept["1.weight"] < 144


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "flops"}, "budget must be 'weights' or 'macs', got 'flops'"),
        (
            {"budget": "macs", "scope": "erk"},
            "scope must be 'global' with budget='macs', got 'erk'",
        ),
        ({"budget": "macs", "pattern": "1x4"}, "pattern must be None with budget='macs'"),
        ({"budget": "macs", "floor": 0.9}, "sparsity must be at most 0.09752 of the costs"),
        (
            {"budget": "macs", "sparsity": None, "max_accuracy_drop": 0.1},
            "max_loss_increase and max_accuracy_drop exclude budget",
        ),
    ],
)
def test_invalid_arguments(model, data, options, message):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InvalidArgument, match=message):
        fastsal.prune(model, data, **{"sparsity": 0.5, **options})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
