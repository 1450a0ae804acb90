from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fastsal.data import load_images
from fastsal.errors import DataError, InvalidArgument
from fastsal.models import InputSpec, input_spec, load_model
from fastsal.transfer.evaluation import accuracy, evaluate, measure
from fastsal.transfer.heads import Head, fit_heads
from fastsal.transfer.tasks import Task

SPEC = InputSpec(3, None, (0.5,) * 3, (0.5,) * 3)


class Fixed(nn.Module):
    """Puts out the first pixels as logits."""

    def __init__(self, k=3):
        super().__init__()
        self.k = k

    def forward(self, x):
        return x.flatten(1)[:, : self.k]


def batch(logits, labels):
    return torch.tensor(logits)[:, :, None, None], torch.tensor(labels)


def test_accuracy_and_loss_by_hand():
    batches = [batch([[2.0, 0, 0], [0, 1, 0]], [0, 2]), batch([[0.0, 0, 3]], [2])]
    logits = torch.tensor([[2.0, 0, 0], [0, 1, 0], [0, 0, 3]])
    result = measure(Fixed(), batches)
    assert result.accuracy == accuracy(Fixed(), batches) == pytest.approx(2 / 3)
    expected = nn.functional.cross_entropy(logits, torch.tensor([0, 2, 2]))
    assert result.loss == pytest.approx(float(expected), rel=1e-6)
    assert result.samples == 3


def test_logits_that_are_not_finite_are_wrong():
    result = measure(Fixed(), [batch([[math.nan, 0, 0], [5.0, 0, 0]], [0, 0])])
    assert result.accuracy == 0.5
    assert math.isnan(result.loss)


@pytest.mark.parametrize(
    ("model", "labels", "message"),
    [
        (Fixed(), [0, 3], "labels: 3 is out of range; the model has 3 classes"),
        (Fixed(), [-1, 0], "labels: -1 is out of range"),
        (nn.Identity(), [0, 1], r"gave \[2, 3, 1, 1\]"),
    ],
)
def test_bad_labels_and_logits(model, labels, message):
    with pytest.raises(DataError, match=message):
        measure(model, [batch([[0.0, 0, 0], [0.0, 0, 0]], labels)])


def test_no_images():
    with pytest.raises(DataError, match="no images"):
        measure(Fixed(), [])


def test_progress_is_reported(tiny_file, tiny_npz):
    model = load_model(f"{tiny_file}:tiny")
    seen = []
    batches = load_images(tiny_npz).batches(input_spec(model), 25)
    measure(model, batches, report=lambda done, total: seen.append((done, total)))
    assert seen == [(25, 60), (50, 60), (60, 60)]


def test_evaluate_uses_the_frozen_head(tiny_file, tiny_npz):
    model = load_model(f"{tiny_file}:tiny")
    task = Task.split("colours", load_images(tiny_npz))
    heads = fit_heads(model, task)
    assert evaluate(model, task, heads) == {"colours": 1.0}
    flipped = Head("colours", -heads["colours"].weight, -heads["colours"].bias, (), 0.0, SPEC)
    assert evaluate(model, task, {"colours": flipped})["colours"] < 0.5
    with torch.no_grad():
        model.conv.weight.zero_()
    assert evaluate(model, task, heads)["colours"] == pytest.approx(1 / 3, abs=0.05)


def test_evaluate_checks_its_heads(tiny_file, tiny_npz):
    model = load_model(f"{tiny_file}:tiny")
    task = Task.split("colours", load_images(tiny_npz))
    heads = fit_heads(model, task)
    with pytest.raises(InvalidArgument, match=r"heads: none for \['colours'\]"):
        evaluate(model, task, {})
    with pytest.raises(InvalidArgument, match="takes 8 features; the model gives 16"):
        evaluate(load_model(f"{tiny_file}:wide"), task, heads)


def test_dense_accuracy_of_the_published_resnet20(resnet20_spec, shared_data):
    model = load_model(resnet20_spec, weights=shared_data / "resnet20_cifar10.safetensors")
    images = load_images(shared_data / "cifar10_test.npz")
    first = images.batches(input_spec(model), 100, samples=1000, shuffle_seed=0)
    assert accuracy(model, first) == pytest.approx(0.916, abs=0.02)
