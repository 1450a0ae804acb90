from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from fastsal.data.folders import load_images
from fastsal.data.image_set import ImageSet
from fastsal.errors import DataError, InvalidArgument
from fastsal.models.features import features
from fastsal.models.inputs import InputSpec, input_spec
from fastsal.models.loading import load_model
from fastsal.transfer.evaluation import accuracy, evaluate, measure, measure_tasks
from fastsal.transfer.heads import fit_heads
from fastsal.transfer.linear_head import Head
from fastsal.transfer.own import OwnHead
from fastsal.transfer.tasks import Task

pytestmark = pytest.mark.usefixtures("one_thread")

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
    assert result.loss == math.inf


@pytest.mark.parametrize(
    ("model", "labels", "message"),
    [
        (Fixed(), [0, 3], "labels must be in 0 .. 2 for outputs of 3 classes, got 3"),
        (Fixed(), [-1, 0], "labels must be in 0 .. 2 for outputs of 3 classes, got -1"),
        (nn.Identity(), [0, 1], r"logits \[n, classes\], got \[2, 3, 1, 1\] for 2 labels"),
    ],
)
def test_bad_labels_and_logits(model, labels, message):
    with pytest.raises(DataError, match=message):
        measure(model, [batch([[0.0, 0, 0], [0.0, 0, 0]], labels)])


def test_no_images():
    with pytest.raises(DataError, match="batches must hold at least one image"):
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
    with pytest.raises(InvalidArgument, match=r"one head per task, got none for \['colours'\]"):
        evaluate(model, task, {})
    with pytest.raises(
        InvalidArgument, match="must have 8 features for the head of task '.*', got 16"
    ):
        evaluate(load_model(f"{tiny_file}:wide"), task, heads)


class Counting(nn.Module):
    """Counts its forward passes; features are the mean colours, logits twice these."""

    def __init__(self):
        super().__init__()
        self.passes = {"features": 0, "logits": 0}

    def forward_features(self, x):
        self.passes["features"] += 1
        return x.mean(dim=(2, 3))

    def forward(self, x):
        self.passes["logits"] += 1
        return 2 * x.mean(dim=(2, 3))


@pytest.mark.parametrize("kind", ["ridge", "probe", "knn", "own"])
def test_measurements_of_tasks_by_hand(kind, tiny_file, tiny_npz):
    model = load_model(f"{tiny_file}:tiny")
    task = Task.split("colours", load_images(tiny_npz))
    head = fit_heads(model, task, kind=kind, k=3)["colours"]
    found = measure_tasks(model, task, {"colours": head}, batch_size=7)["colours"]
    images, labels = next(iter(task.test.batches(input_spec(model), 100)))
    with torch.no_grad():
        outputs = head(model(images) if kind == "own" else features(model, images))
    assert outputs.dtype == torch.float64
    assert found.accuracy == float((outputs.argmax(1) == labels).double().mean())
    loss = nn.functional.cross_entropy(head.scale * outputs, labels)
    assert found.loss == pytest.approx(float(loss), rel=1e-4)
    assert found.samples == len(labels) == 30
    assert evaluate(model, task, {"colours": head}) == {"colours": found.accuracy}


def test_tasks_of_the_same_images_share_the_passes(tiny_npz):
    model = Counting()
    images = load_images(tiny_npz)
    fit, test = images.split(0.5, 0.5)
    other_names = [
        ImageSet(part.x, 2 - part.y, ("x", "y", "z"), part.source, part.index)
        for part in (fit, test)
    ]
    tasks = [Task("a", fit, test), Task("b", fit, test), Task("turned", *other_names)]
    own = Task("own", fit, test)
    half = Task("half", fit, test.subset(range(15)))
    spec = InputSpec(3, None, (0.5,) * 3, (0.5,) * 3)
    heads = fit_heads(model, [*tasks, half], spec=spec, batch_size=10)
    heads.update(fit_heads(model, own, kind="own", spec=spec))
    alone = {t.name: measure_tasks(model, t, heads, batch_size=10)[t.name] for t in [*tasks, own]}
    model.passes = {"features": 0, "logits": 0}
    seen = []
    together = measure_tasks(
        model,
        [*tasks, own, half],
        heads,
        batch_size=10,
        report=lambda done, total: seen.append((done, total)),
    )
    assert model.passes == {"features": 3 + 2, "logits": 3}
    assert {name: together[name] for name in alone} == alone
    assert seen[-1] == (45, 45)
    assert together["a"].accuracy == together["turned"].accuracy == 1.0
    # The same places of the same source, other pixels: not the same images.
    dark = ImageSet(test.x // 9, test.y, test.classes, test.source, test.index)
    both = [tasks[0], Task("b", fit, dark)]
    assert measure_tasks(model, both, heads)["b"].loss != together["b"].loss


def test_own_head_of_some_classes_is_an_argmax_among_these():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (80, 1, 1, 10)).astype(np.uint8)
    images = ImageSet(x, np.arange(80) % 10).select_classes([7, 3, 5])
    task = Task.split("t", images)
    spec = InputSpec(10, None, (0.5,) * 10, (0.5,) * 10)
    head = fit_heads(Ten(), task, kind="own", spec=spec)["t"]
    assert head.columns == (7, 3, 5)
    pixels = task.test.x[:, 0, 0][:, [7, 3, 5]]
    expected = float((pixels.argmax(1) == task.test.y).mean())
    assert evaluate(Ten(), task, {"t": head})["t"] == expected
    whole = float((task.test.x[:, 0, 0].argmax(1) == np.array([7, 3, 5])[task.test.y]).mean())
    assert whole < expected  # the argmax among all ten is wrong more often


class Ten(nn.Module):
    """Ten channels, which are its logits."""

    num_classes = 10

    def forward(self, x):
        return x.flatten(1)


NAMES = ("cat", "dog", "owl")


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        ([*"abcd", "owl", "cat", *"ef", "dog", "g"], (5, 8, 4)),
        ({"cat": 9, "dog": 0, "owl": 1, "cow": 2}, (9, 0, 1)),
    ],
)
def test_columns_by_name(columns, found):
    task = named_task()
    head = fit_heads(Ten(), task, kind="own", columns=columns, spec=SPEC)["t"]
    assert head.columns == found
    logits = torch.arange(10.0)[None]
    assert head(logits)[0].tolist() == list(found)


def named_task(names=NAMES):
    x = np.zeros((6, 1, 1, 3), np.uint8)
    return Task.split("t", ImageSet(x, np.arange(6) % 3, names))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (None, "columns must be given: task 't' has 3 classes and the model 10 logits; pass"),
        (["cat", "dog"], "columns must have a logit for class 'owl' of task 't', got cat, dog"),
        ({"cat": 0, "dog": 1, "owl": 1}, r"must be distinct and in \[0, 9\], got \[0, 1, 1\]"),
        ({"cat": 0, "dog": 1, "owl": 10}, r"must be distinct and in \[0, 9\], got \[0, 1, 10\]"),
        ("cat", "columns must be class names or a mapping, got 'cat'"),
        (["cat", "dog", "owl", "cat"], "columns must have distinct class names"),
    ],
)
def test_bad_columns(columns, message):
    with pytest.raises(InvalidArgument, match=message):
        fit_heads(Ten(), named_task(), kind="own", columns=columns, spec=SPEC)


def test_own_head_of_a_model_whose_classes_cannot_be_counted():
    task = named_task()
    head = fit_heads(Fixed(3), task, kind="own", spec=SPEC)["t"]
    assert head.columns is None
    assert evaluate(Fixed(3), task, {"t": head})["t"] == pytest.approx(1 / 3)
    with pytest.raises(InvalidArgument, match="task 't' has 3 classes and the model 2 logits"):
        evaluate(Fixed(2), task, {"t": head})
    far = OwnHead("t", NAMES, SPEC, (0, 1, 7))
    with pytest.raises(
        InvalidArgument, match=r"must be in \[0, 2\] for a model with 3 logits, got 7"
    ):
        evaluate(Fixed(3), task, {"t": far})
    with pytest.raises(DataError, match=r"must be logits \[n, classes\], got \[3, 3, 1, 1\]"):
        evaluate(nn.Identity(), task, {"t": head})


@pytest.mark.parametrize("kind", ["ridge", "knn", "probe", "own"])
def test_nothing_pruned_measures_as_the_dense_model(kind, tiny_file, tiny_npz):
    import fastsal

    model = load_model(f"{tiny_file}:tiny")
    images = load_images(tiny_npz)
    task = Task.cut("colours", images)
    heads = fit_heads(model, task, kind=kind, k=3)
    dense = measure_tasks(model, task, heads)
    pruned = copy.deepcopy(model)
    batches = task.prune.batches(input_spec(model))
    fastsal.prune(pruned, batches, sparsity=0.0, criterion="magnitude", compensate=False)
    assert measure_tasks(pruned, task, heads) == dense
    fastsal.prune(pruned, batches, sparsity=1.0, criterion="magnitude", compensate=False)
    blind = measure_tasks(pruned, task, heads)["colours"]
    assert blind != dense["colours"]
    assert math.isfinite(blind.loss)


def test_features_that_are_not_finite_are_wrong(tiny_file, tiny_npz):
    model = load_model(f"{tiny_file}:tiny")
    task = Task.split("t", load_images(tiny_npz))
    heads = {kind: fit_heads(model, task, kind=kind, k=3)["t"] for kind in ("ridge", "knn", "own")}
    with torch.no_grad():
        model.conv.weight.fill_(torch.nan)
    for head in heads.values():
        found = measure_tasks(model, task, {"t": head})["t"]
        assert found == (0.0, math.inf, 30)


def test_dense_accuracy_of_the_published_resnet20(resnet20_spec, shared_data):
    model = load_model(resnet20_spec, weights=shared_data / "resnet20_cifar10.safetensors")
    images = load_images(shared_data / "cifar10_test.npz")
    first = images.batches(input_spec(model), 100, samples=1000, shuffle_seed=0)
    assert accuracy(model, first) == pytest.approx(0.916, abs=0.02)
