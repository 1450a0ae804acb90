"""The classifier is the layer that produces the output, whatever the order of definition."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import fastsal
from fastsal.errors import InvalidArgument, UnsupportedLayer
from fastsal.finetuning.freezing import trained_parameters
from fastsal.models.classifier import class_count, classifier_of, find_head, using_head
from fastsal.models.features import features
from fastsal.pruning.masks.masks import Masks
from fastsal.transfer import Task, fit_heads


class HeadFirst(nn.Module):
    """The head is defined before the backbone, whose last layer is a Linear too."""

    def __init__(self, classes=3):
        super().__init__()
        self.head = nn.Linear(7, classes)
        self.conv = nn.Conv2d(3, 5, 3)
        self.norm = nn.BatchNorm2d(5)
        self.embed = nn.Linear(5, 7)

    def backbone(self, x):
        return torch.relu(self.embed(torch.relu(self.norm(self.conv(x))).mean((2, 3))))

    def forward(self, x):
        return self.head(self.backbone(x))


class Made(nn.Module):
    """A function of layers, of which the last one that is defined is unused."""

    def __init__(self, function, **layers):
        super().__init__()
        for name, layer in {**layers, "unused": nn.Linear(2, 9)}.items():
            setattr(self, name, layer)
        self.function = function

    def forward(self, x):
        return self.function(self, x)


class Wrapper(nn.Module):
    """A backbone of timm without a classifier, and a head that is defined first."""

    def __init__(self):
        super().__init__()
        backbone = timm.create_model("test_resnet", num_classes=0)
        self.classify = nn.Linear(backbone.num_features, 4)
        self.backbone = backbone

    def forward(self, x):
        return self.classify(self.backbone(x))


def images(n=4, size=8):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))


def fc():
    return nn.Linear(6, 4)


def pooled(x):
    return x.mean((2, 3))


CASES = {
    "softmax": (
        lambda m, x: F.log_softmax(m.fc(pooled(x)) / 3, 1),
        {"fc": nn.Linear(3, 4)},
        ["fc"],
    ),
    "two heads": (
        lambda m, x: (m.a(pooled(x)) + m.b(pooled(x.square()))) / 2,
        {"a": nn.Linear(3, 4), "b": nn.Linear(3, 4)},
        ["a", "b"],
    ),
    "in a dict": (
        lambda m, x: {"hidden": m.body(pooled(x)), "logits": m.fc(m.body(pooled(x)))},
        {"fc": fc(), "body": nn.Linear(3, 6)},
        ["fc"],
    ),
    "convolution of size 1": (
        lambda m, x: torch.relu(m.last(m.body(x))).mean((2, 3)),
        {"last": nn.Conv2d(6, 4, 1), "body": nn.Conv2d(3, 6, 3)},
        ["last"],
    ),
    "cosine": (
        lambda m, x: 9 * F.linear(F.normalize(m.body(pooled(x))), F.normalize(m.fc.weight)),
        {"fc": fc(), "body": nn.Linear(3, 6)},
        ["fc"],
    ),
    "parametrized": (
        lambda m, x: m.fc(m.body(pooled(x))),
        {"fc": weight_norm(fc()), "body": nn.Linear(3, 6)},
        ["fc"],
    ),
    "tokens first": (
        lambda m, x: m.fc(m.body(x.flatten(2).mT))[:, 0],
        {"fc": fc(), "body": nn.Linear(3, 6)},
        ["fc"],
    ),
    # Backbones.
    "normalized": (
        lambda m, x: m.norm(m.fc(pooled(x))),
        {"norm": nn.LayerNorm(4), "fc": nn.Linear(3, 4)},
        [],
    ),
    "residual": (
        lambda m, x: pooled(x) + m.fc(pooled(x)),
        {"fc": nn.Linear(3, 3)},
        [],
    ),
    "residual of layers": (
        lambda m, x: m.a(pooled(x)) + m.b(m.a(pooled(x))),
        {"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)},
        [],
    ),
    "large kernel": (lambda m, x: m.conv(x).mean((2, 3)), {"conv": nn.Conv2d(3, 4, 3)}, []),
}


@pytest.mark.parametrize("case", CASES)
def test_the_layer_that_produces_the_output(case):
    function, layers, expected = CASES[case]
    model = Made(function, **layers)
    modes, flags = model.training, [p.requires_grad for p in model.parameters()]
    state = torch.get_rng_state()
    with torch.no_grad():
        assert classifier_of(model, images()) == [getattr(model, name) for name in expected]
    assert model.training is modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(torch.get_rng_state(), state)


def test_a_head_that_is_defined_first_is_frozen():
    model = HeadFirst()
    assert find_head(model, images()) == [model.head]
    assert class_count(model, images()) == 3
    trained = trained_parameters(model, images=images())
    assert list(trained) == ["conv.weight", "conv.bias", "embed.weight", "embed.bias"]
    start = copy.deepcopy(model.state_dict())
    data = [(images(), torch.arange(4) % 3)]
    masks = Masks({"conv.weight": torch.ones(5, 3, 3, 3)})
    fastsal.finetune(model, data, masks, epochs=1, lr=0.1)
    changed = {
        name for name, value in model.state_dict().items() if not torch.equal(value, start[name])
    }
    assert changed == set(trained)  # fmt: skip


def test_head_overrides():
    model = HeadFirst()
    masks = Masks({"conv.weight": torch.ones(5, 3, 3, 3)})
    start = model.embed.weight.detach().clone()
    data = [(images(), torch.arange(4) % 3)]
    fastsal.finetune(model, data, masks, epochs=1, lr=0.1, head="embed")
    assert torch.equal(model.embed.weight, start)
    with pytest.raises(
        InvalidArgument, match="head must name a layer of the model, got 'haed'.*head"
    ):
        fastsal.finetune(model, data, masks, epochs=1, lr=0.1, head="haed")
    with using_head(model, ["embed"]):
        assert find_head(model, images()) == [model.embed]
    assert find_head(model, images()) == [model.head]


def test_features_are_the_input_of_the_head():
    model = HeadFirst().eval()
    torch.testing.assert_close(features(model, images()), model.backbone(images()))
    before = torch.relu(model.norm(model.conv(images()))).mean((2, 3))
    torch.testing.assert_close(features(model, images(), head="embed"), before)
    task = Task("t", fit=[(images(), torch.arange(4) % 2)], test=[(images(), torch.arange(4) % 2)])
    assert fit_heads(model, task)["t"].features == 7
    heads = fit_heads(model, task, head="embed")
    assert heads["t"].features == 5
    assert 0 <= fastsal.evaluate(model, task, heads, head="embed")["t"] <= 1


def test_curvature_of_features_reaches_all_layers_before_the_head():
    model = HeadFirst()
    fisher = fastsal.collect(model, [(images(), None)], curvature="features")
    assert fisher.names == ["conv.weight", "embed.weight"]
    rows = fastsal.per_sample_gradients(
        model, images(), None, curvature="features", parameters=["conv.weight", "embed.weight"]
    )
    assert all(float(row.abs().sum()) > 0 for row in rows.values())
    fisher = fastsal.collect(model, [(images(), None)], curvature="features", head="embed")
    assert fisher.names == ["conv.weight"]
    result = fastsal.prune(
        model, [(images(32), None)], 0.5, curvature="features", head="embed", damping=1e-3
    )
    assert list(result.masks) == ["conv.weight"]


def test_a_wrapper_of_a_backbone_of_timm():
    model = Wrapper()
    assert find_head(model) == [model.classify]
    assert class_count(model, images(2, 64)) == 4


def test_a_head_that_a_derived_class_adds():
    base = type(timm.create_model("test_resnet", num_classes=5))

    class Derived(base):
        def forward(self, x):
            return self.extra(super().forward(x))

    model = timm.create_model("test_resnet", num_classes=5)
    model.__class__ = Derived
    model.extra = nn.Linear(5, 2)
    assert find_head(model, images(2, 64)) == [model.extra]
    assert class_count(model, images(2, 64)) == 2


def test_a_model_whose_head_is_not_one_layer_is_refused():
    function, layers, _ = CASES["residual"]
    model = Made(function, **layers)
    with pytest.raises(InvalidArgument, match="^head must name the classifier of Made"):
        find_head(model, images())
    with pytest.raises(
        UnsupportedLayer, match="neither forward_features nor a Linear layer that alone"
    ):
        features(model, images())
