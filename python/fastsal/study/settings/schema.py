"""Settings of a study: models, tasks, sources, criteria and the grid that they span."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastsal.utils.choices import (
    Autocast,
    CorruptionKind,
    CropMode,
    Curvature,
    HeadKind,
    Interpolation,
    RefitWindows,
    Saved,
    Schedule,
    Scope,
)
from fastsal.utils.paths import user_path

MOST_SAMPLES = 1024  # images for statistics where `samples` is not given


@dataclass(frozen=True)
class ModelSettings:
    """Settings of a model, `[[models]]`.

    Attributes:
        name: Name in tables and figures.
        model: A timm name, or `file.py:function` with a path relative to the study file.
        weights: A weights file or the folder of a run, relative to `root`, or `"pretrained"`; None
            uses the weights that the function returns.
        weights_key: Key of the state dict in the weights file, as for `fastsal.load_model`.
        num_classes: Number of classes, as for `fastsal.load_model`, 0 for no classifier; None uses
            the model's.
        in_chans: Number of image channels, as for `fastsal.load_model`; None uses the model's.
        size: Height and width of the images, in pixels; None uses the model's.
        crop_pct: Input size divided by the size that images are resized to before the crop, as for
            `fastsal.input_spec`; None uses the model's for image files.
        crop_mode: How images of another shape are cropped, one of `CROP_MODES`; None uses the
            model's.
        interpolation: Interpolation for resizing, one of `INTERPOLATIONS`; None uses the model's.
        parameters: Names or patterns of the weights to prune; None selects the weights of Linear
            and ConvNd layers except the classifier.
    """

    name: str
    model: str
    weights: str | None = None
    weights_key: str | None = None
    num_classes: int | None = None
    in_chans: int | None = None
    size: int | None = None
    crop_pct: float | None = None
    crop_mode: CropMode | None = None
    interpolation: Interpolation | None = None
    parameters: tuple[str, ...] | None = None


@dataclass(frozen=True)
class TaskSettings:
    """Settings of a task, `[[tasks]]`.

    Attributes:
        name: Name in tables and figures.
        data: Images, as for `fastsal.data.opening.open_images`; a path is relative to `root`.
        test: Separate test images; None draws a test split from `data`.
        classes: Names or indices of the classes to use; None uses all.
        head: Kind of head, one of `HEAD_KINDS`; None uses the study's.
        class_map: For the head "own": which output of the model each class belongs to:
            `"imagenet"`, `"natural"`, a file relative to `root`, or `{name: index}`, as for
            `fastsal.load_images`. Other heads number classes themselves.
        images: Largest number of images to use of `data`, balanced over classes; None uses all.
        test_images: Largest number of test images, balanced over classes; None uses all.
    """

    name: str
    data: str
    test: str | None = None
    classes: tuple[str | int, ...] | None = None
    head: HeadKind | None = None
    images: int | None = None
    test_images: int | None = None
    class_map: str | Mapping[str, int] | None = None


@dataclass(frozen=True)
class SourceSettings:
    """Settings of a source, the images that pruning sees, `[[sources]]`.

    Attributes:
        name: Name in tables and figures.
        tasks: `{task: weight}`; the statistics of a mixture are the weighted sum over its tasks.
        samples: Number of images for the statistics, over all tasks of the source; None uses all
            images, at most `MOST_SAMPLES`.
        curvature: Kind of statistics, one of `CURVATURES`, as for `fastsal.collect`. With
            `"sampled"` and `"features"` the images are treated as unlabeled: fine-tuning learns
            the predictions of the dense model.
        corruption: CorruptionKind of the images, one of `CORRUPTION_KINDS`; None for none.
        severity: Severity of the corruption, 1 to 5.
        imbalance: Number of images of the rarest class divided by that of the most frequent class,
            in (0, 1]; 1 keeps the images balanced.
        decay: For several tasks that arrive in sequence: factor in (0, 1] on the accumulated
            statistics before each further task; None sums all tasks at once.
    """

    name: str
    tasks: Mapping[str, float]
    samples: int | None = None
    curvature: Curvature = "empirical"
    corruption: CorruptionKind | None = None
    severity: int = 3
    imbalance: float = 1.0
    decay: float | None = None


@dataclass(frozen=True)
class RefitSettings:
    """Settings of refitting after pruning, `refit` in `[[criteria]]`, as for `fastsal.refit`.

    Attributes:
        windows: Outputs that are matched: `"blocks"` or `"whole"`.
        steps: Number of steps; None reads every image twice.
        batch_size: Images of a step.
        lr: Learning rate; None is relative to the weights of each tensor.
        between_rounds: Whether the model is refitted after each round, and not only the last.
    """

    windows: RefitWindows = "blocks"
    steps: int | None = None
    batch_size: int = 32
    lr: float | None = None
    between_rounds: bool = False


@dataclass(frozen=True)
class CriterionSettings:
    """Settings of a pruning criterion, `[[criteria]]`.

    Attributes:
        name: Name in tables and figures.
        criterion: One of `fastsal.CRITERIA`, built in or registered.
        compensate: Whether kept weights are updated to compensate for pruned ones.
        damping: λ, a multiple of the mean diagonal of F such as `"0.1x"`, or `"auto"` to select it
            on held-out images.
        curvature: Kind of statistics, one of `CURVATURES`; None uses the source's. It does not
            affect fine-tuning.
        rounds: Numbers of pruning rounds; None uses the study's.
        scope: Scope of the ranking, one of `SCOPES`, as for `fastsal.rank`.
        floor: Smallest kept fraction of any parameter, 0 to 1.
        pattern: Sparsity pattern such as `"2:4"`, as for `fastsal.rank`; the pattern then sets a
            lower bound on the sparsity.
        reconstruct: Whether the kept weights of each layer are solved for after each round.
        refit: How the pruned model is refitted to the dense one; None does not refit.
    """

    name: str
    criterion: str
    compensate: bool = True
    damping: float | str = "auto"
    curvature: Curvature | None = None
    rounds: tuple[int, ...] | None = None
    scope: Scope = "global"
    floor: float = 0.0
    pattern: str | None = None
    reconstruct: bool = False
    refit: RefitSettings | None = None


@dataclass(frozen=True)
class FinetuneSettings:
    """Settings of fine-tuning after pruning, `[finetune]`, as for `fastsal.finetune`.

    Attributes:
        epochs: Number of passes over the images.
        lr: Initial learning rate.
        optimizer: Name of a timm optimizer.
        momentum: Momentum, for optimizers that have one.
        weight_decay: Weight decay of parameters with two or more axes.
        schedule: Learning rate schedule, one of `SCHEDULES`.
        images: Largest number of training images; None uses the whole tune split.
        held_out: Fraction of the images held out to select the best epoch, in [0, 1); 0 uses the
            last epoch.
        patience: Number of epochs without a lower held-out loss before training stops; None never
            stops early.
    """

    epochs: int
    lr: float
    optimizer: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: Schedule = "cosine"
    images: int | None = None
    held_out: float = 0.0
    patience: int | None = None


@dataclass(frozen=True)
class SplitSettings:
    """Share of every class in each split of a task, `[split]`; see `fastsal.transfer.Shares`.

    Attributes:
        prune: Share for the statistics of pruning, of the images that are not test images.
        fit: Share for fitting heads.
        tune: Share for fine-tuning. `prune + fit + tune` is 1.
        test: Share of all images for testing, for tasks without separate test images.
        seed: Seed of the draw.
    """

    prune: float = 0.3
    fit: float = 0.3
    tune: float = 0.4
    test: float = 0.25
    seed: int = 0


@dataclass(frozen=True)
class DiagnosticsSettings:
    """Settings of loss lines and Fisher overlaps, `[diagnostics]`.

    Attributes:
        points: Number of points on a line, including both ends.
        sparsities: Sparsities of the cells to examine; None uses all of the study.
        seeds: Seeds of the cells to examine; None uses the first of the study.
        images: Largest number of test images per task, measured at each point.
        eigenvectors: Number of eigenvectors per Fisher block whose span is compared.
        samples: Largest number of images per task for its statistics.
    """

    points: int = 9
    sparsities: tuple[float, ...] | None = None
    seeds: tuple[int, ...] | None = None
    images: int = 500
    eigenvectors: int = 4
    samples: int = 256

    def covers(self, sparsity: float, seed: int, seeds: tuple[int, ...]) -> bool:
        """Whether a cell is examined.

        Args:
            sparsity: Sparsity of the cell.
            seed: Seed of the cell.
            seeds: All seeds of the study.
        """
        return (self.sparsities is None or sparsity in self.sparsities) and seed in (
            self.seeds or seeds[:1]
        )


@dataclass(frozen=True, repr=False)
class Study:
    """Validated settings of a study.

    Attributes:
        name: Name of the study.
        models: `[[models]]`.
        tasks: `[[tasks]]`.
        sources: `[[sources]]`.
        criteria: `[[criteria]]`.
        sparsities: Sparsities of the grid, 0 to 1.
        seeds: Seeds of the grid; a seed determines the images of the statistics and the order of
            training.
        rounds: Numbers of pruning rounds of the grid.
        block_size: Number of weights per Fisher block.
        batch_size: Images per batch.
        head: Kind of head for tasks that do not set one, one of `HEAD_KINDS`.
        ridge: Penalty of ridge heads, as for `fastsal.fit_heads`.
        save: What to save for each cell, one of `SAVED`.
        device: Device that models run on, as for `fastsal.load_model`. It is recorded with the
            results, and not one of the settings that they belong to.
        autocast: Floating-point type of mixed-precision passes in statistics and fine-tuning, one
            of `AUTOCAST_TYPES`; None uses the model's own type.
        split: `[split]`.
        finetune: `[finetune]`; None measures zero-shot accuracy only.
        diagnostics: `[diagnostics]`; None skips them.
        root: Folder that paths of data and weights are relative to.
        folder: Folder that paths of model files are relative to.
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
    head: HeadKind = "ridge"
    ridge: float = 0.1
    save: Saved = "none"
    device: str = "auto"
    autocast: Autocast | None = None
    split: SplitSettings = field(default_factory=SplitSettings)
    finetune: FinetuneSettings | None = None
    diagnostics: DiagnosticsSettings | None = None
    root: Path = Path()
    folder: Path = Path()

    def __post_init__(self) -> None:
        for name in ("root", "folder"):  # a path may be given as a string
            object.__setattr__(self, name, user_path(getattr(self, name)))

    def __repr__(self) -> str:
        sizes = ", ".join(
            f"{name}={len(getattr(self, name))}"
            for name in ("models", "tasks", "sources", "criteria", "sparsities", "seeds", "rounds")
        )
        return f"Study({self.name!r}, {sizes})"

    def settings(self) -> dict[str, Any]:
        """Return the settings as plain values without folders, so that machines agree on them."""
        found = dataclasses.asdict(self)
        del found["root"], found["folder"], found["device"]
        plain: dict[str, Any] = _plain(found)
        if plain["autocast"] is None:  # the same settings as before there was mixed precision
            del plain["autocast"]
        # The same settings as before there were these.
        later = {"tasks": ("class_map",), "models": ("crop_pct", "crop_mode", "interpolation")}
        for key, names in later.items():
            for table in plain[key]:
                for name in names:
                    if table[name] is None:
                        del table[name]
        return plain


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value
