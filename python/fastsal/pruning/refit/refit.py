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
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import nn

from fastsal.data.batches import Batches, Pair
from fastsal.data.content import SeenImages
from fastsal.data.held_out import Repeated
from fastsal.data.unpacking import BatchRule, ruled
from fastsal.errors import InvalidArgument
from fastsal.gradients.losses import check_autocast
from fastsal.models.digest import structure_digest
from fastsal.models.evaluating import evaluating
from fastsal.models.wrappers import unwrapped
from fastsal.pruning.images_apart import images_apart
from fastsal.pruning.masks.masks import Masks
from fastsal.pruning.refit.fitting import Fitting
from fastsal.pruning.refit.matching import Matching
from fastsal.pruning.refit.settings import Refit
from fastsal.pruning.refit.windows import find_blocks
from fastsal.pruning.refit_result import RefitResult
from fastsal.pruning.same_model import check_same
from fastsal.pruning.shelf import all_or_nothing
from fastsal.pruning.training_checkpoint import TrainingCheckpoint
from fastsal.utils.interrupts import uninterrupted
from fastsal.utils.numbers import SEEDS, whole
from fastsal.utils.progress import Report, reporter

_BUFFER = 2**28  # bytes of images that wait for their turn, without a budget


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
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool | Report = False,
    seed: int = 0,
) -> RefitResult:
    """Train the kept weights of a pruned model, in place, to match its dense original.

    Minimizes the mean over windows of `E‖a(x) − b(x)‖² / E‖b(x)‖²`, where `a` and `b` are the
    outputs of a window in the pruned and in the dense model, plus the same of the features with
    their variance as the denominator, halved, by Adam with a cosine decay; denominators are means
    over held-out images. Models run in evaluation mode. Pruned weights remain
    zero. The weights with the least error on held-out images are kept, possibly the initial ones.
    All parameters that the windows depend on are trained, biases and normalization included.

    Args:
        model: The pruned model.
        dense: The dense model, of the same architecture; not changed. It may have units that were
            removed from `model`, by `fastsal.prune_structure` or by another library.
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
        checkpoint: File for the state after each measurement of the held-out error (`checks` of
            `Refit`); rerun the same call to resume from it. It is removed in the end.
        progress: True shows a progress bar; a function is called with the steps done and in total.
        seed: Seed of the order and of the augmentation of the images.

    Returns:
        Errors before and after, and the history.

    Raises:
        InvalidArgument: An argument is invalid, or `dense` has other parameters than `model`, or
            smaller ones.
        MaskError: The masks do not fit the model.
        DataError: Batches are invalid, or too few images.
        NonFiniteLoss: The error became NaN or infinite at the first measurement.
        FileFormatError: `checkpoint` is damaged, or belongs to another run.

        If an error is raised, the model has its original weights.
    """
    how, seed = Refit.of(settings), whole("seed", seed, 0, SEEDS[1])
    check_autocast(autocast)
    if not isinstance(masks, Masks):
        raise InvalidArgument(f"masks must be fastsal.Masks, got {type(masks).__name__}")
    model, dense = unwrapped(model), unwrapped(dense)
    check_same(model, dense, may_be_narrower=True)
    batches, held_out = ruled(batches, batch), ruled(held_out, batch)
    source, held = images_apart(batches, samples, held_out, seed)
    return refit_on(
        model,
        dense,
        source,
        held,
        masks,
        how,
        autocast=autocast,
        progress=progress,
        seed=seed,
        checkpoint=checkpoint,
    )


def refit_on(
    model: nn.Module,
    dense: nn.Module,
    source: Iterable[Pair],
    held: Iterable[Pair],
    masks: Masks,
    how: Refit,
    *,
    autocast: torch.dtype | None,
    progress: bool | Report,
    seed: int,
    room: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> RefitResult:
    """Refit as `refit` does, on checked arguments.

    Args:
        model: The pruned model.
        dense: The dense model.
        source: Training images, iterable again.
        held: Held-out images, iterable again.
        masks: Masks to hold.
        how: Checked settings.
        autocast: dtype for `torch.autocast`, or None.
        progress: As for `refit`.
        seed: Seed of all draws.
        room: Bytes for images and activations; None for no limit.
        checkpoint: As for `refit`.
    """
    start = time.perf_counter()
    names = _windows(model, how)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with (
        all_or_nothing(tensors),
        _all_trained(model),
        evaluating(model),
        evaluating(dense),
        reporter(progress, "refitting", "steps") as report,
    ):
        masks.apply(model)
        keeper = None
        passes = {"batches": source.__iter__, "held_out": held.__iter__}
        if checkpoint is not None:
            seen = {name: SeenImages(name) for name in passes}
            source = Repeated(partial(seen["batches"].watch, source))
            held = Repeated(partial(seen["held_out"].watch, held))
            asked = {**how.as_dict(), "autocast": autocast, "seed": seed}
            ends = {**tensors, **{f"dense:{n}": p for n, p in dense.named_parameters()}}
            structure = structure_digest(model)
            keeper = TrainingCheckpoint(checkpoint, asked, ends, "refit", structure, seen)
        matching = Matching(model, dense, names, masks, autocast, held)
        cut = [name for name in names if name not in matching.names]
        if cut and how.windows != "blocks":
            raise InvalidArgument(
                f"windows: {cut[0]!r} must have as many outputs as in the dense model; some of its "
                "units were removed"
            )
        names = matching.names
        buffer = _BUFFER if room is None else min(_BUFFER, room // 4)
        # Gradients of activations and the workspace of kernels come beside what is saved: on a
        # ResNet-50 the peak was a twelfth above the room without this quarter.
        left = None if room is None else (room - buffer) * 3 // 4
        micro_batch = how.micro_batch or matching.micro_batch(how.batch_size, left)
        fitting = Fitting(
            matching, source, how, masks, seed=seed, micro_batch=micro_batch, room=buffer
        )
        if keeper is None:
            found = fitting.run(report)
        else:
            found = fitting.run(report, keeper.load(passes), keeper.save)
            keeper.remove()
    return RefitResult(**found, windows=names, seconds=time.perf_counter() - start)


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
        with uninterrupted():
            for p, flag, gradient in found:
                p.requires_grad_(flag)
                p.grad = gradient
