"""Inputs and surroundings of a pass: images that a model modifies, types, labels and autocast."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastsal
from fastsal.errors import InvalidArgument, UnsupportedLayer
from fastsal.gradients.precision import full_float32
from fastsal.models.evaluating import first_layer_parameter, outputs

from .oracle import loop

pytestmark = pytest.mark.usefixtures("one_thread")


class InPlace(nn.Module):
    """Scales its input in place, as a normalization of images may do.

    Args:
        how: "rule", or why there is none.
    """

    def __init__(self, how="rule"):
        super().__init__()
        self.how = how
        self.norm = nn.BatchNorm2d(3, track_running_stats=how != "mixed")
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

    def forward(self, x):
        x = x.mul_(2)
        if self.how == "looped":
            x = x * (1 + 0 * float(x.sum()))  # which torch.func refuses
        if self.how == "mixed":
            x = self.norm(x)
        if self.how == "checkpointed":
            x = checkpoint(self.conv, x, use_reentrant=False)
        elif self.how == "rule":
            x = self.conv(x)
        else:
            x = F.conv2d(x, self.conv.weight * 1, self.conv.bias)
        return self.fc(x.relu().mean((2, 3)))


class TwoTypes(nn.Module):
    """A classifier of another type than the backbone, after a parameter of a third one."""

    def __init__(self, body, head):
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float16))
        self.conv, self.fc = nn.Conv2d(3, 4, 3).to(body), nn.Linear(4, 3).to(head)

    def forward(self, x):
        return self.fc(self.conv(x).mean((2, 3)).to(self.fc.weight.dtype))


def data(n=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, 6, 6, generator=generator, dtype=dtype), torch.arange(n) % 3


def seeded(kind, *args):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return kind(*args)


@pytest.mark.parametrize("micro_batch", [None, 1])
@pytest.mark.parametrize("how", ["rule", "function", "looped", "checkpointed"])
def test_images_that_a_model_modifies_in_place(how, micro_batch):
    model = seeded(InPlace, how).double().eval()
    images, labels = data()
    given = images.clone()
    found = fastsal.per_sample_gradients(
        model, images, labels, parameters="*.weight", micro_batch=micro_batch
    )
    assert torch.equal(images, given)
    expected = loop(model, images.clone(), labels, found)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12)


def test_samples_that_depend_on_each_other_after_a_change_in_place():
    model = seeded(InPlace, "mixed").double()
    with pytest.raises(UnsupportedLayer, match="depends on the other samples"):
        fastsal.per_sample_gradients(model, *data(), parameters="fc.weight")


def test_images_are_read_again_after_a_change_in_place():
    model, (images, _) = seeded(InPlace), data(dtype=torch.float32)
    given = images.clone()
    assert torch.equal(outputs(model, images), outputs(model, images))
    assert fastsal.weight_macs(model, images)["conv.weight"] == 16
    fastsal.prune(model, [(images, None)], 0.5, damping="0.1x", curvature="features")
    assert torch.equal(images, given)


@pytest.mark.parametrize(
    ("body", "head"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)]
)
def test_images_have_the_type_of_the_first_layer(body, head):
    model, (images, labels) = seeded(TwoTypes, body, head), data()
    assert first_layer_parameter(model) is model.conv.weight
    assert outputs(model, images).shape == (5, 3)
    found = fastsal.per_sample_gradients(model, images, labels, parameters="fc.weight")
    every = fastsal.per_sample_gradients(model, images, labels)
    assert torch.equal(found["fc.weight"], every["fc.weight"])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8])
def test_labels_of_any_type_of_integers(dtype):
    model, (images, labels) = seeded(InPlace), data()
    expected = fastsal.per_sample_gradients(model, images, labels)
    found = fastsal.per_sample_gradients(model, images, labels.to(dtype))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_autocast_of_the_caller_is_disabled():
    model, (images, labels) = seeded(InPlace), data()
    expected = fastsal.per_sample_gradients(model, images, labels)
    plain, x = outputs(model, images), torch.ones(4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = fastsal.per_sample_gradients(model, images, labels)
        assert torch.equal(outputs(model, images), plain)
        with full_float32():
            assert (x @ x).dtype == torch.float32
        assert torch.is_autocast_enabled("cpu")
        asked = fastsal.per_sample_gradients(model, images, labels, autocast=torch.bfloat16)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not all(torch.equal(asked[name], expected[name]) for name in expected)


def test_features_exclude_the_classifier():
    model, (images, _) = seeded(InPlace), data()
    assert list(fastsal.per_sample_gradients(model, images, None, curvature="features")) == [
        "conv.weight"
    ]


def test_a_seed_that_is_too_large():
    with pytest.raises(InvalidArgument, match=r"seed must be in .*, got 1180591620717411303424"):
        fastsal.per_sample_gradients(seeded(InPlace), *data(), seed=2**70)
