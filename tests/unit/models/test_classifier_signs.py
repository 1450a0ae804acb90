"""Models without a classifier, and with a random one, are noted where logits are used."""

from __future__ import annotations

import functools
import warnings

import pytest
import timm
import torch
from torch import nn

import fastsal
from fastsal.errors import InvalidArgument
from fastsal.models.classifier_signs import fresh_classifier, lacks_classifier
from fastsal.models.loading import load_model
from fastsal.transfer.evaluation import measure

X = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % 2
WIDTH = timm.create_model("test_resnet").num_features
NONE = "has no classifier, so that its outputs are features"


class Custom(nn.Module):
    """A convolutional net that does not say how many classes it has."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head  # defined first
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x))).mean(dim=(2, 3)))


def headless():
    return timm.create_model("test_resnet", num_classes=0).eval()


@pytest.fixture
def pretrained(monkeypatch, tmp_path):
    """`weights="pretrained"` reads a file: a checkpoint of 1,000 classes."""
    path = tmp_path / "weights.pth"
    torch.save(timm.create_model("test_resnet").state_dict(), path)
    create = functools.partial(timm.create_model, pretrained_cfg_overlay={"file": str(path)})
    monkeypatch.setattr(timm, "create_model", create)


@pytest.fixture
def _no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def with_another_head(num_classes, head):
    model = timm.create_model("test_resnet", num_classes=num_classes)
    model.fc = head  # num_classes is as before
    return model


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (headless(), True),
        (timm.create_model("test_resnet", num_classes=3), False),
        (timm.create_model("test_vit", img_size=32, num_classes=0), True),
        (timm.create_model("test_vit", img_size=32), False),
        (Custom(nn.Identity()), True),
        (Custom(nn.Linear(8, 3)), False),
        (nn.Sequential(headless(), nn.Linear(WIDTH, 3)), False),
        (nn.Sequential(nn.Identity(), headless()), True),
        (with_another_head(0, nn.Linear(WIDTH, 3)), False),
        (with_another_head(1000, nn.Identity()), True),
        (nn.Flatten(), False),
        (nn.Sequential(nn.Conv2d(3, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), False),
    ],
)
def test_outputs_that_are_features(model, expected):
    model.train()
    before = torch.get_rng_state()
    assert lacks_classifier(model, X) is expected
    assert model.training
    assert torch.equal(before, torch.get_rng_state())
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("curvature", ["empirical", "sampled"])
def test_statistics_of_a_headless_model(curvature):
    for model in (headless(), Custom(nn.Identity())):
        with pytest.warns(UserWarning, match=NONE + ".*curvature='features'"):
            fastsal.collect(model, [(X, Y)], curvature=curvature, parameters="*conv*.weight")
        with pytest.warns(UserWarning, match=NONE + ".*--curvature features"):
            fastsal.prune(
                model, [(X, Y)], 0.5, curvature=curvature, damping=1.0, parameters="*conv*.weight"
            )


@pytest.mark.usefixtures("_no_warning")
def test_no_note_where_no_logits_are_used():
    model = headless()
    fastsal.collect(model, [(X, Y)], curvature="features", parameters="layer1.*conv*.weight")
    fastsal.collect(
        model, [(X, Y)], loss=lambda out, _: out.square().sum(1), parameters="layer1.*conv*.weight"
    )
    fastsal.prune(model, None, 0.5, criterion="magnitude", compensate=False)


def test_accuracy_limits_and_training_of_a_headless_model():
    model = headless()
    masks = fastsal.prune(model, None, 0.0, criterion="magnitude", compensate=False).masks
    with pytest.warns(UserWarning, match=NONE + ".*fit_heads"):
        measure(model, [(X, Y)])
    with pytest.warns(UserWarning, match=NONE + ".*fit_heads"):
        fastsal.prune(
            model,
            [(X, Y)],
            criterion="magnitude",
            compensate=False,
            max_accuracy_drop=0.5,
            parameters="layer1.*conv*.weight",
        )
    with pytest.warns(UserWarning, match=NONE + ".*pass loss="):
        fastsal.finetune(model, [(X, Y)], masks, epochs=1, lr=1e-3)


@pytest.mark.usefixtures("pretrained")
def test_a_random_classifier_beside_pretrained_weights():
    model = load_model("test_resnet", weights="pretrained", num_classes=37)
    why = "the pretrained weights have 1000 classes, not 37"
    assert fresh_classifier(model) == why
    with pytest.warns(UserWarning, match=f"{why}.*--curvature features"):
        fastsal.collect(model, [(X, Y)], parameters="layer1.*conv*.weight")
    with pytest.warns(UserWarning, match=f"{why}.*fit_heads"):
        measure(model, [(X, Y)])
    masks = fastsal.prune(model, None, 0.0, criterion="magnitude", compensate=False).masks
    with pytest.warns(UserWarning, match=f"{why}.*--train-head"):
        fastsal.finetune(model, [(X, Y)], masks, epochs=1, lr=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastsal.collect(model, [(X, Y)], curvature="features", parameters="layer1.*conv*.weight")
        fastsal.finetune(model, [(X, Y)], masks, epochs=1, lr=1e-3, train_head=True)
        assert fresh_classifier(model) is None  # it was trained
        fastsal.collect(model, [(X, Y)], parameters="layer1.*conv*.weight")


@pytest.mark.usefixtures("pretrained", "_no_warning")
def test_a_classifier_of_the_checkpoint_is_not_random():
    for options in ({}, {"num_classes": 1000}, {"in_chans": 1, "num_classes": 1000}):
        assert fresh_classifier(load_model("test_resnet", weights="pretrained", **options)) is None
    assert fresh_classifier(load_model("test_resnet", num_classes=37)) is None


@pytest.mark.usefixtures("pretrained")
def test_the_own_head_of_a_random_classifier():
    x = (X.permute(0, 2, 3, 1).clamp(0, 1) * 255).byte().numpy()
    task = fastsal.Task.split("t", fastsal.ImageSet(x, Y.numpy()))
    model = load_model("test_resnet", weights="pretrained", num_classes=2)
    with pytest.warns(UserWarning, match="1000 classes, not 2"):
        fastsal.fit_heads(model, task, kind="own")


def test_own_heads_refuse_a_headless_model():
    x = (X.permute(0, 2, 3, 1).clamp(0, 1) * 255).byte().numpy()
    task = fastsal.Task.split("t", fastsal.ImageSet(x, Y.numpy()))
    with pytest.raises(InvalidArgument, match="must have a classifier"):
        fastsal.fit_heads(headless(), task, kind="own")
