"""What a study is: models, tasks, sources and criteria, and the grid that they span."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fastsal.utils.choices import Curvature

HEADS = ("ridge", "knn", "probe", "own")
CORRUPTIONS = ("gaussian-noise", "blur", "jpeg", "brightness", "contrast")
MOST_SAMPLES = 1024  # images of statistics where none are asked for
SAVES = ("none", "masks", "models")

Named = TypeVar("Named", "ModelSettings", "TaskSettings", "SourceSettings", "CriterionSettings")


@dataclass(frozen=True)
class ModelSettings:
    """A model: `[[models]]`.

    Attributes:
        name: in tables and figures.
        model: a timm name, or `file.py:function`, the file beside the study's.
        weights: a file below `root`, or `"pretrained"`; None for what the function gives.
        num_classes: as for `load_model`; so is `in_chans`.
        in_chans: channels of the images.
        size: of the images, in pixels; None asks the model.
        parameters: names or patterns of the weights to prune; None takes those of Linear and
            ConvNd but for the classifier's.
    """

    name: str
    model: str
    weights: str | None = None
    num_classes: int | None = None
    in_chans: int | None = None
    size: int | None = None
    parameters: tuple[str, ...] | None = None


@dataclass(frozen=True)
class TaskSettings:
    """A task: `[[tasks]]`.

    Attributes:
        name: in tables and figures.
        data: images, as `fastsal.data.opening.open_images` takes them; a path is below `root`.
        test: images of their own to test on; None cuts them from `data`.
        classes: names or numbers of the classes to keep; None keeps all.
        head: one of `HEADS`; None takes the study's.
        images: at most so many of `data`, class by class; None takes all.
        test_images: the same for the test part.
    """

    name: str
    data: str
    test: str | None = None
    classes: tuple[str | int, ...] | None = None
    head: str | None = None
    images: int | None = None
    test_images: int | None = None


@dataclass(frozen=True)
class SourceSettings:
    """What pruning sees: `[[sources]]`.

    Attributes:
        name: in tables and figures.
        tasks: `{task: weight}`: statistics add, so a mixture is their weighted sum.
        samples: images of the statistics, over all its tasks; None takes what there is, at most
            `MOST_SAMPLES`.
        labels: `"true"`, `"sampled"` or `"features"`, as for `collect`. With the last two the
            images count as unlabelled: fine-tuning learns what the dense model says of them.
        corruption: done to its images, see `fastsal.corrupt`; None leaves them.
        severity: of it, 1 to 5.
        imbalance: images of the rarest class over those of the most frequent; 1 leaves them.
        decay: with several tasks: they came one after another, and statistics count this much less
            with each that follows; None for all at once.
    """

    name: str
    tasks: Mapping[str, float]
    samples: int | None = None
    curvature: Curvature = "empirical"
    corruption: str | None = None
    severity: int = 3
    imbalance: float = 1.0
    decay: float | None = None


@dataclass(frozen=True)
class CriterionSettings:
    """How to prune: `[[criteria]]`.

    Attributes:
        name: in tables and figures.
        criterion: one of `fastsal.CRITERIA`.
        compensate: whether kept weights move.
        damping: λ, a multiple of the mean diagonal of F such as `"0.1x"`, or `"auto"`.
        labels: of the statistics, `"true"`, `"sampled"` or `"features"`; None takes the source's.
            Fine-tuning does not depend on it.
        rounds: None takes the study's.
        scope: as for `rank`; so are `floor` and `pattern`.
        floor: least kept share of a parameter.
        pattern: with a pattern such as `"2:4"` the sparsity is what it gives at least.
    """

    name: str
    criterion: str
    compensate: bool = True
    damping: float | str = "auto"
    curvature: Curvature | None = None
    rounds: tuple[int, ...] | None = None
    scope: str = "global"
    floor: float = 0.0
    pattern: str | None = None


@dataclass(frozen=True)
class FinetuneSettings:
    """Training after pruning: `[finetune]`. As for `fastsal.finetune`.

    Attributes:
        epochs: passes over the images.
        lr: rate to begin with.
        optimizer: as timm calls it.
        momentum: where it has one.
        weight_decay: of weights with two axes or more.
        schedule: of the rate.
        images: at most so many; None takes the whole part.
        held_out: the share of them that the best epoch is chosen by; 0 takes the last epoch.
        patience: epochs without a lower held-out loss; None never stops early.
    """

    epochs: int
    lr: float
    optimizer: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: str = "cosine"
    images: int | None = None
    held_out: float = 0.0
    patience: int | None = None


@dataclass(frozen=True)
class SplitSettings:
    """Shares of every class: `[split]`. Without images of its own to test on, a task gives `test`.

    Attributes:
        prune: share of the images for statistics.
        fit: for heads.
        tune: for fine-tuning.
        test: for the test.
        seed: of the cut.
    """

    prune: float = 0.3
    fit: float = 0.3
    tune: float = 0.4
    test: float = 0.25
    seed: int = 0


@dataclass(frozen=True)
class LandscapeSettings:
    """Losses along lines, and overlaps of Fishers: `[landscape]`.

    Attributes:
        points: of a line, its ends among them.
        sparsities: those of the study whose cells are looked at; None takes all.
        seeds: the same for seeds; None takes the first.
        images: test images of a task that are measured at each point.
        eigenvectors: of a block whose span is compared.
        samples: images of a task's statistics.
    """

    points: int = 9
    sparsities: tuple[float, ...] | None = None
    seeds: tuple[int, ...] | None = None
    images: int = 500
    eigenvectors: int = 4
    samples: int = 256

    def covers(self, sparsity: float, seed: int, seeds: tuple[int, ...]) -> bool:
        """Whether a cell is looked at."""
        return (self.sparsities is None or sparsity in self.sparsities) and seed in (
            self.seeds or seeds[:1]
        )


@dataclass(frozen=True)
class Study:
    """A study: what the tables of its file say, checked.

    Attributes:
        name: of the study.
        models: `[[models]]`.
        tasks: `[[tasks]]`.
        sources: `[[sources]]`.
        criteria: `[[criteria]]`.
        sparsities: of the grid.
        seeds: of the grid; a seed draws the images of the statistics and the order of training.
        rounds: of the grid.
        block_size: weights of a Fisher block.
        batch_size: images of a pass.
        head: one of `HEADS`.
        ridge: of ridge heads, as for `fit_heads`.
        save: what is kept of every cell, one of `SAVES`.
        split: `[split]`.
        finetune: `[finetune]`; None measures zero-shot only.
        landscape: `[landscape]`; None leaves it out.
        root: the folder that data and weights are below.
        folder: the folder that models' files are below.
    """

    name: str
    models: tuple[ModelSettings, ...]
    tasks: tuple[TaskSettings, ...]
    sources: tuple[SourceSettings, ...]
    criteria: tuple[CriterionSettings, ...]
    sparsities: tuple[float, ...]
    seeds: tuple[int, ...] = (0,)
    rounds: tuple[int, ...] = (1,)
    block_size: int = 64
    batch_size: int = 64
    head: str = "ridge"
    ridge: float = 0.1
    save: str = "none"
    split: SplitSettings = field(default_factory=SplitSettings)
    finetune: FinetuneSettings | None = None
    landscape: LandscapeSettings | None = None
    root: Path = Path()
    folder: Path = Path()

    def settings(self) -> dict[str, Any]:
        """Return plain values, without folders: the same on every machine."""
        found = dataclasses.asdict(self)
        del found["root"], found["folder"]
        plain: dict[str, Any] = _plain(found)
        return plain


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value
