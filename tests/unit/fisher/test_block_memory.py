"""Blocks that exceed the memory are refused before the passes, in the plan too."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastsal
from fastsal.errors import InvalidArgument
from fastsal.fisher import block_memory

GIB = 2**30


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine of 16 GiB."""
    monkeypatch.setattr(block_memory, "total_memory", lambda: 16 * GIB)


class Wide(nn.Module):
    """A model with a layer of 1.6 million weights, which counts its passes."""

    def __init__(self):
        super().__init__()
        self.wide, self.head = nn.Linear(1600, 1000), nn.Linear(1000, 3)
        self.passes = 0

    def forward(self, x):
        self.passes += 1
        return self.head(self.wide(x.flatten(1)).relu())


IMAGES = [(torch.zeros(6, 1600), torch.arange(6) % 3)]
SIZE = (
    r"a block of 1,600,000 weights of 'wide.weight' takes 23.3 TiB, but this machine has 16.0 GiB"
)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"criterion": "magnitude"},
        {"criterion": "block-fisher", "compensate": True, "damping": 0.1},
        {"pattern": "2:4", "compensate": False, "criterion": "block-fisher"},
        {"max_loss_increase": 0.5},
    ],
)
def test_prune_refuses_before_the_passes(how):
    model = Wide()
    sparsity = None if "pattern" in how or "max_loss_increase" in how else 0.5
    with pytest.raises(InvalidArgument, match=SIZE):
        fastsal.prune(model, IMAGES, sparsity, block_size=None, **how)
    # A limit is tried on one image, to see whether it has a meaning for the outputs.
    assert model.passes == ("max_loss_increase" in how)


def test_the_message_names_the_cure():
    with pytest.raises(
        InvalidArgument, match=r"^block_size must be smaller: .*; use block_size=64"
    ):
        fastsal.prune(Wide(), IMAGES, 0.5, block_size=None)


def test_the_plan_refuses_too():
    with pytest.raises(InvalidArgument, match=SIZE):
        fastsal.plan_memory(Wide(), IMAGES, block_size=None)
    with torch.device("meta"):
        model = Wide()
    with pytest.raises(InvalidArgument, match=SIZE):
        fastsal.plan_memory(model, IMAGES, block_size=None, calibrate=False)


def test_a_budget_counts_as_the_memory():
    """It was kept by the gradients alone, and exceeded when they were folded into blocks."""
    model = nn.Sequential(nn.Linear(1600, 16), nn.ReLU(), nn.Linear(16, 3))
    how = {"block_size": None, "memory_budget": "1GiB"}
    with pytest.raises(
        InvalidArgument, match=r"'0.weight' takes 6.1 GiB, but memory_budget is 1.0"
    ):
        fastsal.prune(model, IMAGES, 0.5, **how)


def test_few_gradients_need_no_blocks():
    """Of which the diagonal of the inverse is computed as it is."""
    model = Wide()
    fisher = fastsal.collect(model, IMAGES, block_size=None, samples=6)
    scores = fastsal.score(model, fisher, "block-fisher", 0.1)
    assert set(scores) == {"wide.weight", "head.weight"}


@pytest.mark.parametrize("use", ["obs-greedy", "compensate", "blocks"])
def test_blocks_of_given_statistics(use):
    model = Wide()
    fisher = fastsal.collect(model, IMAGES, block_size=None, samples=6)
    masks = {"wide.weight": torch.ones(1000, 1600, dtype=torch.bool)}
    calls = {
        "obs-greedy": lambda: fastsal.score(model, fisher, "obs-greedy", 0.1),
        "compensate": lambda: fastsal.compensate(model, fisher, masks, 0.1),
        "blocks": lambda: fisher.blocks("wide.weight"),
    }
    with pytest.raises(InvalidArgument, match="block_size must be smaller"):
        calls[use]()


def test_many_samples_are_folded_in_the_collection():
    model = nn.Linear(500, 400)
    images = [(torch.zeros(4, 500), torch.zeros(4).long())]
    with pytest.raises(InvalidArgument, match=r"of 200,000 weights of 'weight' takes 74.5 GiB"):
        fastsal.collect(model, images, block_size=None, samples=100_001)
