"""Latencies of parts of a model, with a clock that counts weights in place of seconds."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

import fastsal
from fastsal.pruning.structured.budget import Sizes
from fastsal.pruning.structured.find import find
from fastsal.pruning.structured.groups import cut
from fastsal.pruning.structured.latency import (
    FRACTIONS,
    Segment,
    _medians,
    _not_rising,
    measure_segments,
)

pytestmark = pytest.mark.usefixtures("one_thread")


class Counter:
    """A clock that each linear layer and convolution advances by the number of its weights.

    So it soon is later than any number of seconds, and the least number of turns is made.
    """

    def __init__(self, model):
        self.now = 0.0
        self._layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        for layer in self._layers:
            layer.register_forward_hook(self._advance)

    def _advance(self, layer, _args, _out):
        self.now += layer.weight.numel()

    def __call__(self):
        return self.now


def weights(model):
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d)))


def vit():
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=32, depth=3, num_heads=4,
        num_classes=5, mlp_ratio=3,
    )  # fmt: skip
    return model.eval()


def resnet():
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=5).eval()


@pytest.mark.parametrize(
    ("build", "structure"), [(vit, "mlp"), (vit, "heads"), (resnet, "channels")]
)
def test_totals_are_those_of_the_cut_model(build, structure):
    model = build()
    images = torch.randn(2, 3, 16, 16) if build is vit else torch.randn(2, 3, 32, 32)
    units = find(model, images, structure)
    segments = measure_segments(model, units.groups, images, Counter(model))
    sizes = Sizes(model, units, segments)
    assert sizes.total("latency") == weights(model)
    for fraction in FRACTIONS[1:3]:
        kept = {g.name: round(fraction * g.units) for g in units.groups}
        smaller = copy.deepcopy(model)
        cut(smaller, [(g, torch.arange(kept[g.name])) for g in units.groups])
        assert sizes.total("latency", kept) == pytest.approx(weights(smaller))
    # One group alone, between the fractions; segments of several groups are approximate there.
    group = units.groups[-1]
    kept = {group.name: max(1, round(0.6 * group.units))}
    smaller = copy.deepcopy(model)
    cut(smaller, [(group, torch.arange(kept[group.name]))])
    saved = weights(model) - weights(smaller)
    assert sizes.total("latency") - sizes.total("latency", kept) == pytest.approx(saved, rel=0.35)
    assert sizes.saving("latency", {group.name: group.units}, group.name, kept[group.name]) == (
        pytest.approx(sizes.total("latency") - sizes.total("latency", kept))
    )


def test_the_model_is_unchanged():
    model, images = vit(), torch.randn(2, 3, 16, 16)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    wanted = model(images)
    measure_segments(model, find(model, images, "mlp").groups, images)
    assert torch.equal(model(images), wanted)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_noise_is_evened_out():
    noisy = [{("a",): 2.0, (): 1.0}, {("a",): 4.0, (): 2.0}, {("a",): 2.0, (): 1.0}]
    assert _medians(noisy) == {("a",): 2.0, (): 1.0}  # the second run is slow as a whole
    assert _not_rising([5, 4, 4, 2]) == (5, 4, 4, 2)
    assert _not_rising([5, 2, 4, 1]) == (5, 3, 3, 1)
    assert _not_rising([1, 2, 6]) == (3, 3, 3)


def test_interpolation():
    segment = Segment(("a", "b"), (10.0, 8.0, 6.0, 4.0, 4.0))
    assert segment.value({}) == 10
    assert segment.value({"a": 0.25}) == 6  # the geometric mean of 1/4 and 1
    assert segment.value({"a": 0.375, "b": 0.375}) == pytest.approx(5)
    assert segment.value({"a": 0.01, "b": 0.01}) == 4
    assert Segment((), (3.0,) * 5).value({"a": 0.5}) == 3


def test_a_budget_of_latency(monkeypatch):
    model, images = vit(), torch.randn(32, 3, 16, 16)
    counted = Counter(model)
    monkeypatch.setattr(
        "fastsal.pruning.structured.prune_structure.measure_segments",
        lambda *given: measure_segments(*given, counted),
    )
    result = fastsal.prune_structure(
        model, [images], 0.25, budget="latency", latency_batch=48, multiple=1
    )
    assert result.before.latency == 32 * 192 + 3 * (4 * 32**2 + 2 * 32 * 96) + 32 * 5
    assert result.after.latency == pytest.approx(weights(model))
    assert 0.25 <= 1 - weights(model) / result.before.latency < 0.27
    assert result.as_dict()["after"]["latency"] == result.after.latency
    with pytest.raises(fastsal.errors.InvalidArgument, match="sparsity must be at most"):
        fastsal.prune_structure(model, [images], 0.9, budget="latency")
    with pytest.raises(fastsal.errors.InvalidArgument, match="latency_batch must be"):
        fastsal.prune_structure(model, [images], 0.2, budget="latency", latency_batch=0)
