"""Signs that labels are not the outputs of a model."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import fastsal
from fastsal.data.image_set import ImageSet
from fastsal.data.numbering import LossSign, check_numbering, numbering_doubt
from fastsal.errors import DataError
from fastsal.models.inputs import InputSpec

SPEC = InputSpec(3, (4, 4), (0.5,) * 3, (0.5,) * 3)
IDS = ["n01440764", "n02102040", "n03000684"]


def image_set(names, numbering="sorted", **options):
    y = np.repeat(np.arange(len(names)), 2)
    x = np.random.default_rng(0).integers(0, 256, (len(y), 4, 4, 3), dtype=np.uint8)
    return ImageSet(x, y, tuple(names), numbering=numbering, **options)


def classifier(outputs=10):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, outputs)).eval()


@pytest.mark.parametrize(
    ("names", "numbering", "outputs", "words"),
    [
        (["cat", "dog", "frog", "ship"], "sorted", 10, "4 classes .* the model has 10 outputs"),
        (["cat", "dog"], "natural", 10, "2 classes .* the model has 10 outputs"),
        (["cat", "dog"], "selection", 10, "2 classes .* the model has 10 outputs"),
        (IDS, "sorted", 1000, r"WordNet ids, .* of imagenet-1k, .*--class-map\): imagenet"),
        (IDS, "data", 1000, "WordNet ids"),
        (IDS, "sorted", 37, "3 classes .* the model has 37 outputs"),
        (["train", "val"], "sorted", 10, "folders train, val of .* parts of a data set"),
        (["Test", "train"], "sorted", None, "folders Test, train of .* parts of a data set"),
        (["c1", "c10", "c2"], "sorted", 3, r"c1, c10, c2; .*natural"),
        (["3", "5", "8"], "sorted", 3, "the folder '3' of .* has the label 0"),
        (["c1", "c10", "c2"], "sorted", None, "natural"),
    ],
)
def test_doubts(names, numbering, outputs, words):
    import re

    found = numbering_doubt(image_set(names, numbering), outputs)
    assert found is not None
    assert re.search(words, found), found


@pytest.mark.parametrize(
    ("names", "numbering", "outputs"),
    [
        (["cat", "dog", "frog"], "sorted", 3),
        (["cat", "dog", "frog"], "data", 10),
        (["cat", "dog", "frog"], "sorted", None),
        (["bus", "train"], "sorted", 2),  # a class of CIFAR-100
        (["0", "1", "2"], "sorted", 3),
        (IDS, "sorted", 3),
        (["c10", "c2"], "selection", 2),
        (["c2", "c10"], "natural", 2),
    ],
)
def test_no_doubts(names, numbering, outputs):
    assert numbering_doubt(image_set(names, numbering), outputs) is None


def test_a_map_ends_the_doubt():
    few = image_set(["cat", "dog"])
    assert numbering_doubt(few.map_classes({"cat": 3, "dog": 5}), 10) is None
    ids = image_set(IDS)
    assert numbering_doubt(ids.map_classes("imagenet"), 1000) is None
    # The order of the 1,000 is not that of the larger sets.
    assert "imagenet-22k" in (numbering_doubt(ids.map_classes("imagenet"), 21841) or "")
    with pytest.raises(DataError, match="indices of 0 to 3 for .* 4 outputs, got 5 for 'dog'"):
        check_numbering(few.map_classes({"cat": 3, "dog": 5}), 4)


def test_the_whole_of_imagenet_in_order_is_right():
    from timm.data import ImageNetInfo

    ids = ImageNetInfo().label_names()
    assert numbering_doubt(image_set(ids), 1000) is None
    swapped = [ids[1], ids[0], *ids[2:]]
    assert "WordNet" in (numbering_doubt(image_set(swapped, "selection"), 1000) or "")


def test_an_image_set_is_noted_once():
    images = image_set(["cat", "dog"])
    with pytest.warns(UserWarning, match="the model has 10 outputs"):
        check_numbering(images, 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_numbering(images, 10)
    with pytest.warns(UserWarning, match="the model has 7 outputs"):
        check_numbering(images, 7)


@pytest.mark.parametrize("function", ["collect", "prune", "finetune", "limit"])
def test_every_function_that_uses_labels_notes_it(function):
    model, batches = classifier(), image_set(["cat", "dog"]).batches(SPEC)
    calls = {
        "collect": lambda: fastsal.collect(model, batches),
        "prune": lambda: fastsal.prune(model, batches, 0.5, damping=1e-3),
        "finetune": lambda: fastsal.finetune(
            model,
            batches,
            fastsal.Masks({"1.weight": torch.ones(10, 48, dtype=torch.bool)}),
            epochs=1,
            lr=0.01,
            train_head=True,
        ),
        "limit": lambda: fastsal.prune(
            model, batches, criterion="magnitude", compensate=False, max_accuracy_drop=0.5
        ),
    }
    with pytest.warns(UserWarning, match="the model has 10 outputs"):
        calls[function]()


def test_functions_that_use_no_labels_do_not():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 10)).eval()
    batches = image_set(["cat", "dog"]).batches(SPEC)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastsal.collect(model, batches, curvature="features")
        fastsal.prune(model, batches, 0.5, criterion="magnitude", compensate=False)


def test_a_loss_worse_than_guessing():
    rng = np.random.default_rng(0)
    sign = LossSign()
    for _ in range(4):
        sign.add(rng.normal(23, 5, 16).tolist(), 10)
    assert "mean loss of 23." in (sign.doubt() or "")
    assert "guessing (2.3 nats for 10 outputs)" in (sign.doubt() or "")
    for losses, outputs in (
        (rng.normal(2.6, 0.3, 64), 10),  # an untrained model
        ([23.0], 10),  # one image
        ([0.0] * 30 + [120.0] * 2, 10),  # a few outliers: 7.5 ± 5 nats
        (rng.normal(5.0, 1.0, 64), 1000),
        (rng.normal(23, 5, 16), 1),
        ([], 10),
    ):
        other = LossSign()
        other.add(list(losses), outputs)
        assert other.doubt() is None, (losses, outputs)


def test_the_sign_of_the_loss_in_the_passes():
    """Labels of a tensor have no names; the loss at them tells."""
    model = classifier()
    model[1].weight.data.zero_()
    model[1].bias.data.copy_(torch.tensor([0.0, 0.0, 30.0, *[0.0] * 7]))
    x = torch.randn(12, 3, 4, 4)
    right, wrong = torch.full((12,), 2), torch.arange(12) % 2
    for call in (
        lambda y: fastsal.collect(model, [(x, y)]),
        lambda y: fastsal.collect(model, iter([(x[:6], y[:6]), (x[6:], y[6:])]), micro_batch=4),
        lambda y: fastsal.prune(model, [(x, y)], 0.0, rounds=2, damping=1.0),
    ):
        with pytest.warns(UserWarning, match=r"mean loss of 30.0 nats is worse than guessing"):
            call(wrong)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            call(right)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastsal.collect(model, [(x, wrong)], curvature="sampled")
        fastsal.collect(model, [(x, wrong)], loss=lambda out, y: out.square().mean(1) + y)


def test_later_rounds_do_not_count():
    """At the weights of later rounds, a loss worse than guessing is that of pruning."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 48, bias=False), nn.Linear(48, 10)).eval()
    x = torch.randn(64, 3, 4, 4) * 30
    with torch.no_grad():
        y = model(x).argmax(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastsal.prune(
            model, [(x, y)], 0.9, criterion="random", compensate=False, damping=1.0, rounds=3
        )
        fastsal.prune(model, [(x, y)], 0.9, criterion="taylor", compensate=False, rounds=3)


def test_guessing_is_the_log_of_the_number_of_outputs():
    sign = LossSign()
    sign.add([math.log(10) + 1.01] * 8, 10)
    assert sign.doubt() is not None
    sign = LossSign()
    sign.add([math.log(10) + 0.99] * 8, 10)
    assert sign.doubt() is None
