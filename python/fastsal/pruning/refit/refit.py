"""Refit the kept weights of a pruned model to the activations of the dense model.

Joint compensation is exact for a quadratic model of the loss; at high sparsity the loss is no
longer quadratic. Refitting trains the kept weights so that the outputs of blocks and the features
match those of the dense model. It needs images, no labels, and holds the mask. The target is that
of block-wise reconstruction (AdaRound, Nagel et al. 2020; SNOWS, Lucas and Mazumder, ICLR 2025),
summed over all blocks at once.

Axes: n images.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastsal.data.batches import Batches, Pair, as_batches
from fastsal.data.held_out import HELD_OUT_MOST, HeldOutSamples, Repeated, require_some
from fastsal.data.unpacking import BatchRule, ruled
from fastsal.errors import InvalidArgument, NonFiniteLoss
from fastsal.gradients.losses import check_autocast
from fastsal.models.classifier import classifier_of
from fastsal.models.evaluating import evaluating, plain_call, to_model
from fastsal.models.features import feature_outputs
from fastsal.models.outputs import output_tensor
from fastsal.models.wrappers import unwrapped
from fastsal.pruning.masks.masks import Masks
from fastsal.pruning.refit.draws import Draws
from fastsal.pruning.refit.settings import Refit
from fastsal.pruning.refit.windows import capturing, find_blocks, relative_error
from fastsal.pruning.shelf import all_or_nothing, copies, restore
from fastsal.utils.numbers import whole
from fastsal.utils.progress import Report, reporter

# Learning rates of Adam that `lr="auto"` tries, each for this fraction of the steps.
_RATES = (2e-3, 5e-4, 1e-4)
_TRIAL = 1 / 20
_FINAL = "(final)"  # key of the features or outputs among the windows


@dataclass(frozen=True)
class RefitResult:
    """The result of `refit`.

    Attributes:
        before: Held-out error before it: the mean over windows of the relative squared error.
        after: Held-out error of the weights that the model has now.
        kept_step: Step whose weights were kept; 0 for the weights from before.
        steps: Number of steps that were made.
        lr: Initial learning rate.
        windows: Names of the windows besides the features or outputs.
        history: One entry per measurement: `step`, mean training `error` since the previous one,
            and `held_out_error`.
        seconds: Wall-clock time.
    """

    before: float
    after: float
    kept_step: int
    steps: int
    lr: float
    windows: list[str]
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    def __repr__(self) -> str:
        return (
            f"RefitResult(held-out error {self.before:.4g} -> {self.after:.4g}, kept_step="
            f"{self.kept_step} of {self.steps}, lr={self.lr:g}, {len(self.windows)} windows, "
            f"{self.seconds:.1f} s)"
        )


def refit(
    model: nn.Module,
    dense: nn.Module,
    batches: Batches,
    masks: Masks,
    settings: str | Sequence[str] | Refit = "blocks",
    *,
    samples: int | None = None,
    held_out: Batches | None = None,
    batch: BatchRule | None = None,
    autocast: torch.dtype | None = None,
    progress: bool | Report = False,
    seed: int = 0,
) -> RefitResult:
    """Train the kept weights of a pruned model, in place, to match its dense original.

    Minimizes the mean over windows of `‖a(x) − b(x)‖² / ‖b(x)‖²`, where `a` and `b` are the
    outputs of a window in the pruned and in the dense model, by Adam with a cosine decay. Models
    run in evaluation mode. Pruned weights remain zero. The weights with the least error on
    held-out images are kept, possibly the initial ones. All parameters that the windows depend on
    are trained, biases and normalization included.

    Args:
        model: The pruned model.
        dense: The dense model, of the same architecture; not changed.
        batches: Images `[n, ...]`, or pairs `(images, anything)`; labels are ignored. Iterable
            several times, such as a list or a `DataLoader`.
        masks: Masks, True = kept; applied to the model first.
        settings: A `fastsal.Refit`, or its `windows` with all other settings at their defaults.
        samples: Number of images to use; None for all.
        held_out: Images that decide which weights are kept; None holds out one image in eight, at
            most 1,024.
        batch: Function from a batch of another form to `(images, anything)`; None accepts pairs,
            images and dicts with a usual name for the images.
        autocast: dtype of the passes under `torch.autocast`; None disables it.
        progress: True shows a progress bar; a function is called with the steps done and in total.
        seed: Seed of the order and of the augmentation of the images.

    Returns:
        Errors before and after, and the history.

    Raises:
        InvalidArgument: An argument is invalid, or `dense` has other parameters than `model`.
        MaskError: The masks do not fit the model.
        DataError: Batches are invalid, or too few images.
        NonFiniteLoss: The error became NaN or infinite at the first measurement.

        If an error is raised, the model has its original weights.
    """
    how, seed = Refit.of(settings), whole("seed", seed, 0)
    check_autocast(autocast)
    if not isinstance(masks, Masks):
        raise InvalidArgument(f"masks must be fastsal.Masks, got {type(masks).__name__}")
    model, dense = unwrapped(model), unwrapped(dense)
    _check_same(model, dense)
    batches, held_out = ruled(batches, batch), ruled(held_out, batch)
    for name, given in (("batches", batches), ("held_out", held_out)):
        if isinstance(given, Iterator):
            raise InvalidArgument(
                f"{name} must be iterable several times, such as a list or a DataLoader, got an "
                "iterator"
            )
    start = time.perf_counter()
    names = _windows(model, how)
    source, held = _images(batches, samples, held_out, seed)
    matching = Matching(model, dense, names, masks, autocast, held[0][0])
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with (
        all_or_nothing(tensors),
        _all_trained(model),
        evaluating(model),
        evaluating(dense),
        reporter(progress, "refitting", "steps") as report,
    ):
        masks.apply(model)
        run = _Run(matching, source, held, how, masks, seed)
        found = run(report)
    return RefitResult(**found, windows=names, seconds=time.perf_counter() - start)


class Matching:
    """Outputs of the windows of two models, and their distance.

    Args:
        model: The pruned model.
        dense: The dense model.
        names: Names of the windows.
        masks: Masks; if they prune the classifier, outputs are matched in place of features.
        autocast: dtype for `torch.autocast`, or None.
        images: `[n, ...]`, of which two run to find the classifier.
    """

    def __init__(
        self,
        model: nn.Module,
        dense: nn.Module,
        names: list[str],
        masks: Masks,
        autocast: torch.dtype | None,
        images: Tensor,
    ) -> None:
        self.model, self.dense = model, dense
        self._names, self._autocast = names, autocast
        head = {p for layer in classifier_of(model, images) for p in layer.parameters()}
        prunes_head = not head.isdisjoint(masks.parameters(model).values())
        self._call: Callable[[nn.Module, Tensor], Any] = (
            plain_call if prunes_head or not head else feature_outputs
        )

    def error(self, images: Tensor) -> Tensor:
        """Return the mean relative squared error of the windows, a scalar with a graph."""
        with torch.no_grad():
            wanted = self._outputs(self.dense, images)
        return relative_error(self._outputs(self.model, images), wanted)

    def held_out_error(self, batches: list[Pair]) -> float:
        """Return the error on held-out images, averaged over images; inf for NaN."""
        total = samples = 0.0
        with torch.no_grad():
            for images, _ in batches:
                total += float(self.error(images)) * len(images)
                samples += len(images)
        error = total / samples
        return error if math.isfinite(error) else math.inf

    def _outputs(self, model: nn.Module, images: Tensor) -> dict[str, Tensor]:
        first = next(model.parameters())
        moved = to_model(images, first)
        with (
            capturing(model, self._names) as caught,
            torch.autocast(
                first.device.type, dtype=self._autocast, enabled=self._autocast is not None
            ),
        ):
            final = self._call(model, moved)
        missing = [name for name in self._names if name not in caught]
        if missing:
            raise InvalidArgument(
                f"windows: {missing[0]!r} must be called by the model and return a tensor; it is "
                "not called, or returns none"
            )
        return {**caught, _FINAL: output_tensor(final)}


class _Run:
    """The steps of one refitting.

    Args:
        matching: The two models.
        source: Training images, iterable again.
        held: Held-out images.
        how: Checked settings.
        masks: Masks to hold.
        seed: Seed of all draws.
    """

    def __init__(
        self,
        matching: Matching,
        source: Repeated,
        held: list[Pair],
        how: Refit,
        masks: Masks,
        seed: int,
    ) -> None:
        self._matching, self._model = matching, matching.model
        self._source, self._held, self._how = source, held, how
        self._masks, self._seed = masks, seed
        self._parameters = dict(self._model.named_parameters())

    def __call__(self, report: Report) -> dict[str, Any]:
        """Refit; returns the attributes of a `RefitResult`."""
        how = self._how
        before = self._matching.held_out_error(self._held)
        if not math.isfinite(before):
            raise NonFiniteLoss(f"the error of the pruned model must be finite, got {before}")
        lr = how.lr if how.lr != "auto" else self._choose_rate()
        best, kept, misses = before, 0, 0
        best_weights = copies(self._parameters)
        history: list[dict[str, Any]] = []
        every = max(1, how.steps // how.checks)
        sums: list[float] = []
        done = 0
        for done, error in enumerate(self._steps(lr, how.steps), start=1):
            sums.append(error)
            report(done, how.steps)
            if done % every and done != how.steps:
                continue
            value = self._matching.held_out_error(self._held)
            history.append({"step": done, "error": sum(sums) / len(sums), "held_out_error": value})
            sums, misses = [], misses + 1
            if value < best:
                best, kept, misses = value, done, 0
                best_weights = copies(self._parameters)
            if misses >= how.patience:
                break
        restore(self._parameters, best_weights)
        return {
            "before": before,
            "after": best,
            "kept_step": kept,
            "steps": done,
            "lr": lr,
            "history": history,
        }

    def _choose_rate(self) -> float:
        """Return the rate with the least held-out error after a few steps."""
        start = copies(self._parameters)
        steps = max(1, round(self._how.steps * _TRIAL))
        tried = {}
        for lr in _RATES:
            for _ in self._steps(lr, steps):
                pass
            tried[lr] = self._matching.held_out_error(self._held)
            restore(self._parameters, start)
        return min(tried, key=lambda lr: (tried[lr], lr))

    def _steps(self, lr: float, steps: int) -> Iterator[float]:
        """Make steps with a cosine decay; yields the training error of each."""
        generator = torch.Generator().manual_seed(self._seed)
        draws = iter(Draws(self._source, self._how.batch_size, generator))
        optimizer = torch.optim.Adam(self._parameters.values(), lr=lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        augment = self._how.augmentation
        with self._masks.hold(self._model, optimizer):
            for _ in range(steps):
                images = next(draws)
                if augment is not None:
                    images = augment(images, generator)
                optimizer.zero_grad()
                with torch.enable_grad():
                    error = self._matching.error(images)
                value = float(error.detach())
                if math.isfinite(value):
                    torch.autograd.backward(error)
                    optimizer.step()
                schedule.step()
                yield value
        optimizer.zero_grad()


def _windows(model: nn.Module, how: Refit) -> list[str]:
    if how.windows == "whole":
        return []
    if how.windows == "blocks":
        return find_blocks(model)
    known = dict(model.named_modules())
    for name in how.windows:
        if name not in known:
            raise InvalidArgument(f"windows must be names of modules, got {name!r}")
    return list(how.windows)


def _images(
    batches: Batches, samples: int | None, held_out: Batches | None, seed: int
) -> tuple[Repeated, list[Pair]]:
    """Return training images, iterable again, and held-out images."""
    source = Repeated(lambda: as_batches(batches, samples, "ignored"))
    if held_out is not None:
        return source, list(as_batches(held_out, None, "ignored"))
    held = HeldOutSamples(source.__iter__, seed=seed, most=HELD_OUT_MOST)
    require_some(held)
    return held.others, list(held)


def _check_same(model: nn.Module, dense: nn.Module) -> None:
    if model is dense:
        raise InvalidArgument("dense must be another module than model, got the same one")
    shapes = [{n: tuple(p.shape) for n, p in m.named_parameters()} for m in (model, dense)]
    if shapes[0] != shapes[1]:
        names = [n for n in {**shapes[0], **shapes[1]} if shapes[0].get(n) != shapes[1].get(n)]
        raise InvalidArgument(
            f"dense must have the parameters of model, got another {names[0]!r}: "
            f"{shapes[1].get(names[0])}, not {shapes[0].get(names[0])}"
        )


@contextlib.contextmanager
def _all_trained(model: nn.Module) -> Iterator[None]:
    """Let gradients reach every parameter, then restore flags and gradients."""
    found = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    try:
        for p, _, _ in found:
            p.grad = None
            p.requires_grad_(p.is_floating_point())
        yield
    finally:
        for p, flag, gradient in found:
            p.requires_grad_(flag)
            p.grad = gradient
