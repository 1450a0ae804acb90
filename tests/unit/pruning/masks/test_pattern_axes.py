"""Groups of a pattern lie along the input axis that the layer has, wherever that is."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import fastsal
from fastsal.errors import InvalidArgument, MaskError
from fastsal.fisher.parts import Part, row_unit
from fastsal.models.input_axis import Axes
from fastsal.pruning.masks.masks import Masks

from ...models.test_input_axis import InOut


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3)
        self.up = nn.ConvTranspose2d(8, 6, 3, groups=2)
        self.last = nn.ConvTranspose2d(6, 4, 1)
        self.own = InOut(0)
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        x = torch.relu(self.up(torch.relu(self.down(x)))).mean((2, 3))
        return self.fc(self.last(x[:, :, None, None]).flatten(1) + self.own(x))


NAMES = ["down.weight", "up.weight", "last.weight", "own.weight"]


def data():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(24, 3, 6, 6, generator=generator), torch.arange(24) % 5)]


def net():
    torch.manual_seed(0)
    return Net()


def by_input(name, values):
    """`[outputs and kernel, inputs]` of each group of a convolution, one after the other."""
    if name == "down.weight":
        return values.movedim(1, -1).reshape(-1, 3)
    if name == "up.weight":
        return torch.cat([v.flatten(1).T for v in values.chunk(2)])
    return values.flatten(1).T


def n_of_m(rows, n, m):
    """The obvious choice: the n largest of every m in a row."""
    kept = torch.zeros_like(rows, dtype=torch.bool)
    for row, out in zip(rows, kept, strict=True):
        for start in range(0, len(row), m):
            some = row[start : start + m]
            best = some.sort(descending=True, stable=True).indices[: math.ceil(len(some) * n / m)]
            out[start + best] = True
    return kept


def test_scores_are_ranked_along_the_input_axis():
    model = net()
    scores = fastsal.score(model, None, criterion="magnitude", parameters=NAMES)
    masks = fastsal.rank(scores, pattern="2:4")
    for name in NAMES:
        expected = n_of_m(by_input(name, scores[name]), 2, 4)
        assert torch.equal(by_input(name, masks[name]), expected), name
    plain = {name: values.clone() for name, values in scores.items()}
    assert fastsal.rank(plain, pattern="2:4", model=model) == masks
    assert masks.recipe["input_axes"] == {
        "up.weight": [2, 4, 27], "last.weight": [1, 6, 4], "own.weight": [1, 6, 4]
    }  # fmt: skip


@pytest.mark.parametrize("criterion", ["magnitude", "obs-greedy"])
@pytest.mark.parametrize("pattern", ["2:4", "1x2"])
def test_prune_keeps_patterns_along_the_input_axis(criterion, pattern):
    model = net()
    how = {"sparsity": 0.5} if pattern == "1x2" else {}
    result = fastsal.prune(
        model, data(), pattern=pattern, criterion=criterion, parameters=NAMES, damping=1e-3, **how
    )
    for name in NAMES:
        kept = by_input(name, result.masks[name])
        groups = kept.split(int(pattern[-1]), dim=1)
        if pattern == "2:4":
            assert all(int(g.sum(1).max()) <= math.ceil(g.shape[1] / 2) for g in groups), name
        else:
            assert all(bool((g.all(1) | ~g.any(1)).all()) for g in groups), name
    result.masks.verify(model)


def test_joint_choice_equals_that_of_the_same_layer_stored_the_other_way():
    torch.manual_seed(1)
    weight, rows = torch.randn(8, 6), torch.randn(40, 8, 6) + torch.randn(40, 1, 6)
    # One block for each parameter, so that the order of weights does not matter.
    masks = {}
    for name, layer, turned in (("t", InOut(0), False), ("n", nn.Linear(8, 6), True)):
        model = nn.Sequential(layer)
        w, g = (weight.T, rows.mT) if turned else (weight, rows)
        layer.weight = nn.Parameter(w.contiguous())
        fisher = fastsal.BlockFisher({"0.weight": tuple(w.shape)}, block_size=None)
        fisher.update({"0.weight": g.contiguous()})
        found = fastsal.rank_pattern(model, fisher, "2:4", damping=1e-2)
        masks[name] = found["0.weight"].T if turned else found["0.weight"]
    assert torch.equal(masks["t"], masks["n"])


def test_no_part_cuts_a_group():
    axes = {"t": Axes(2, 4, 27), "c": Axes(6, 3, 9)}
    unit = row_unit({"t": (8, 3, 3, 3), "c": (6, 3, 3, 3)}, 36, axes)
    assert unit(Part("t", 0, 216, 216)) == 108
    assert unit(Part("c", 0, 162, 162)) == 108


def test_verify_counts_along_the_recorded_axis(tmp_path):
    model = net()
    masks = fastsal.rank(
        fastsal.score(model, None, criterion="magnitude", parameters=NAMES), pattern="2:4"
    )
    masks.save(tmp_path / "masks.safetensors")
    masks = Masks.load(tmp_path / "masks.safetensors")
    masks.apply(model)
    masks.verify(model)
    wrong = {**masks, "up.weight": torch.ones_like(masks["up.weight"])}
    with pytest.raises(
        MaskError, match=r"^masks: 54 groups of 'up.weight' break the pattern '2:4'"
    ):
        Masks(wrong, masks.recipe).verify(model)


def test_unknown_layers_are_refused_before_anything_is_computed():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), InOut())
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    batches = [(torch.randn(8, 3, 2, 2), torch.arange(8) % 4)]
    for call in (
        lambda: fastsal.prune(model, batches, pattern="2:4", parameters=["1.weight", "2.weight"]),
        lambda: fastsal.rank(
            fastsal.score(model, None, criterion="magnitude", parameters="2.weight"), pattern="2:4"
        ),
    ):
        with pytest.raises(InvalidArgument, match="the input axis of '2.weight' is unknown"):
            call()
    assert all(torch.equal(p, start[name]) for name, p in model.named_parameters())
