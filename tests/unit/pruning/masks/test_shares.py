"""A sparsity for each pattern of names."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastsal
from fastsal.errors import InvalidArgument, UnknownParameter
from fastsal.pruning.rounds import rising_goals

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("stem.weight", "block.attn.qkv.weight", "block.attn.proj.weight", "head.weight")


@pytest.fixture
def scores():
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.rand(5 + k, 8, generator=generator).double().float()
        for k, name in enumerate(NAMES)
    }


def smallest(scores, names, sparsity):
    """Masks of some parameters by one sort in float64."""
    flat = torch.cat([scores[name].double().flatten() for name in names])
    kept = torch.ones(len(flat), dtype=torch.bool)
    kept[flat.argsort(stable=True)[: round(sparsity * len(flat))]] = False
    parts = kept.split([scores[name].numel() for name in names])
    return {n: part.view(scores[n].shape) for n, part in zip(names, parts, strict=True)}


@pytest.mark.parametrize(
    ("sparsity", "groups"),
    [
        ({"*": 0.6}, [(NAMES, 0.6)]),
        ({"*.attn.*": 0.5, "*": 0.8}, [(NAMES[1:3], 0.5), ((NAMES[0], NAMES[3]), 0.8)]),
        # The key that is a name comes first, wherever it stands.
        ({"*": 0.8, "head.weight": 0.25}, [(NAMES[:3], 0.8), (NAMES[3:], 0.25)]),
        # What no key matches is kept.
        ({"*.attn.*": 0.5}, [(NAMES[1:3], 0.5), ((NAMES[0], NAMES[3]), 0.0)]),
        ({"stem.weight": 1, "block.*": 0}, [(NAMES[:1], 1.0), (NAMES[1:], 0.0)]),
    ],
)
def test_the_parameters_of_a_key_are_ranked_on_their_own(scores, sparsity, groups):
    masks = fastsal.rank(scores, sparsity)
    assert list(masks) == list(NAMES)
    for names, fraction in groups:
        for name, mask in smallest(scores, names, fraction).items():
            assert torch.equal(masks[name], mask), name
    assert masks.recipe["sparsity"] == sparsity
    assert set(masks.recipe["thresholds"]) == set(sparsity)


@pytest.mark.parametrize(
    "how",
    [
        {"scope": "layer"},
        {"scope": "erk"},
        {"floor": 0.2},
        {"pattern": "1x4"},
        {"costs": dict.fromkeys(NAMES, 2.0)},
    ],
)
def test_other_arguments_apply_to_the_parameters_of_a_key(scores, how):
    masks = fastsal.rank(scores, {"*.attn.*": 0.5, "*": 0.7}, **how)
    for names, fraction in ((NAMES[1:3], 0.5), ((NAMES[0], NAMES[3]), 0.7)):
        some = dict(how)
        if "costs" in how:
            some["costs"] = {name: how["costs"][name] for name in names}
        alone = fastsal.rank({name: scores[name] for name in names}, fraction, **some)
        for name in names:
            assert torch.equal(masks[name], alone[name]), name


@pytest.mark.parametrize(
    ("sparsity", "error", "message"),
    [
        ({}, InvalidArgument, "sparsity must be a number or have at least one pattern, got {}"),
        ({"*": 1.2}, InvalidArgument, r"sparsity\['\*'\] must be in \[0, 1\], got 1.2"),
        ({"*": "a"}, InvalidArgument, r"sparsity\['\*'\] must be a number, got 'a'"),
        ({3: 0.5}, InvalidArgument, "sparsity must have names or patterns as keys, got 3"),
        ({"haed.weight": 0.5}, UnknownParameter, "'haed.weight' matches no parameter.*head.weight"),
        ({"*": 0.5, "*.attn.*": 0.2}, InvalidArgument, r"'\*.attn.\*' must come before"),
    ],
)
def test_invalid_sparsities(scores, sparsity, error, message):
    with pytest.raises(error, match=message):
        fastsal.rank(scores, sparsity)


def test_a_pattern_that_fixes_the_sparsity_has_no_other(scores):
    with pytest.raises(InvalidArgument, match="sparsity must be None or 0.5 with pattern '2:4'"):
        fastsal.rank(scores, {"*": 0.5}, pattern="2:4")


def test_each_sparsity_rises():
    assert rising_goals({"a": 0.75, "b": 0.0}, 2) == [{"a": 0.5, "b": 0.0}, {"a": 0.75, "b": 0.0}]


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 4)
    )


@pytest.mark.parametrize(
    "how",
    [
        {"rounds": 2, "damping": 1e-3},
        {"damping": "auto"},
        {"curvature": "features", "damping": "auto", "rounds": 2},
        {"pattern": "1x2", "damping": 1e-3},
        {"budget": "macs", "damping": 1e-3},
    ],
    ids=str,
)
def test_prune(how, tmp_path):
    model = net()
    images = torch.randn(24, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    batches = [(x, torch.arange(8) % 4) for x in images.split(8)]
    sparsity = {"0.weight": 0.5, "*": 0.75}
    result = fastsal.prune(model, batches, sparsity, **how)
    kept, shapes = result.masks.kept, result.masks.shapes
    assert kept["0.weight"] == 108
    others = sum(torch.Size(shapes[n]).numel() for n in shapes if n != "0.weight")
    if "budget" not in how:
        assert abs(sum(kept.values()) - 108 - others / 4) <= 1  # half a group
    result.masks.verify(model)
    again = net()
    fastsal.prune(again, batches, sparsity, checkpoint=tmp_path / "state", **how)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    result.masks.save(tmp_path / "masks.safetensors")
    assert fastsal.Masks.load(tmp_path / "masks.safetensors").recipe["sparsity"] == sparsity


def test_a_wrong_pattern_is_told_before_the_work():
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UnknownParameter, match="'7.weight' matches no parameter"):
        fastsal.prune(model, [(torch.randn(2, 4, 8, 8), torch.zeros(2).long())], {"7.weight": 0.5})
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
