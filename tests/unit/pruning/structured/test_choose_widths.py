"""Widths that meet a budget."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastsal.pruning.structured.budget import Sizes, choose_widths, least_units
from fastsal.pruning.structured.find import Units
from fastsal.pruning.structured.groups import Group, Slice


def mlps(units, macs):
    """Return hidden layers `[units, 3]`, and the multiply-accumulates of one of their weights."""
    model = nn.ModuleList(nn.Linear(3, width) for width in units)
    groups = [
        Group(f"{i}", m, (f"{i}",), (), (Slice(f"{i}", "weight", 0, torch.arange(m)[:, None]),), (),
              "mlp")
        for i, m in enumerate(units)
    ]  # fmt: skip
    return model, Units(groups, {}, {f"{i}.weight": each for i, each in enumerate(macs)}, {})


@pytest.mark.parametrize("scope", ["global", "uniform"])
def test_the_most_that_can_be_removed(scope):
    """Sums of large numbers of operations are rounded."""
    for seed in range(40):
        draw = torch.Generator().manual_seed(seed)
        units = torch.randint(5, 60, (6,), generator=draw).tolist()
        macs = torch.randint(10**13, 10**15, (6,), generator=draw).tolist()
        model, found = mlps(units, macs)
        sizes = Sizes(model, found)
        costs = {group.name: torch.rand(group.units, generator=draw) for group in found.groups}
        least = {group.name: least_units(group, 0.1) for group in found.groups}
        most = 1 - sizes.total("macs", least) / sizes.total("macs")
        chosen = choose_widths(
            found.groups, costs, sizes, most * (1 - 1e-15),
            what="macs", scope=scope, floor=0.1, multiple=1,
        )  # fmt: skip
        assert chosen == least
