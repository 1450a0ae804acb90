"""From a model and images to statistics: one forward and backward pass a micro-batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastsal.errors import DataError, InvalidArgument
from fastsal.feature_matching import without_classifier
from fastsal.fisher import BlockFisher
from fastsal.gradients import GradientEngine, select_parameters
from fastsal.progress import reporter
from fastsal.sinks import choose_sink

Batches = Iterable[Any]
Loss = Callable[[Tensor, Tensor], Tensor]


def collect(
    model: nn.Module,
    batches: Batches,
    *,
    block_size: int | None = 64,
    samples: int | None = None,
    loss: str | Loss = "cross-entropy",
    labels: str = "true",
    parameters: str | Sequence[str] | None = None,
    memory_budget: int | None = None,
    progress: bool | Callable[[int, int | None], None] = False,
    seed: int = 0,
    precision: str = "float32",
    micro_batch: int | None = None,
    autocast: torch.dtype | None = None,
    loss_scale: float | None = None,
) -> BlockFisher:
    """Collect the block-diagonal empirical Fisher of a model over images.

    The model is in evaluation mode for it, and is left exactly as it was found.

    With `labels="features"` no labels are needed, nor a classifier. The features `f_θ(x)` `[F]`
    that a classifier is given are taken for the mean of a Gaussian: a target `y = f(x) + √F ε`,
    `ε ~ N(0, I)`, is drawn for each image, the loss is `½ ‖f_θ(x) − y‖² / F`, and the gradient is
    `−J_f(x)ᵀ ε / √F`. Its outer products sum to the Gauss–Newton matrix `JᵀJ / F` (Martens, 2020,
    section 9), which is exactly the Hessian, at these weights, of half the mean squared change of
    the features, `½ ‖f_θ(x) − f(x)‖² / F`: the loss that distils the dense model's features. The
    scale is `F`, no variance measured on images, so that statistics of any two image sets, batches
    or machines can be merged; `λ` and increases have the unit of a squared feature.

    Args:
        model: Takes images `[n, C, H, W]`, puts out logits `[n, classes]` (or what `loss` takes).
            Its weights may be float16 or bfloat16: gradients and sums are float32 then.
        batches: Any iterable of `(images, labels)`, `[n, C, H, W]` floating point and normalised
            (or tokens `[n, L]`, int64 or int32), `[n]` integer (or what `loss` takes, `[n, ...]`).
            With `labels="sampled"` and `"features"` the labels may be missing: None, or images
            alone.
        block_size: Weights of a block; None takes each parameter as one block.
        samples: Stop after so many; None takes all.
        loss: `"cross-entropy"`, or a function `(outputs, labels)` that returns losses `[n]`;
            outputs come in float32 at least.
        labels: `"true"` for the empirical Fisher; `"sampled"` draws labels from the model's own
            softmax, for the true Fisher; `"features"` ignores labels and outputs, see above.
        parameters: Names or patterns; None takes the weights of Linear and ConvNd (tables of
            Embedding are taken where they are named, see `fastsal.gradients.selection`). With
            `labels="features"` the classifier's are left out unless they are named exactly, as
            features do not depend on them.
        memory_budget: Bytes that the statistics and the rows gathered for them may take.
        progress: True shows a bar; a function is called with `(samples, total or None)`.
        seed: Seed of what is drawn; what a sample gets does not depend on batches.
        precision: `"float32"` or `"float64"`, in which sums are kept.
        micro_batch: Samples of one forward and backward pass; None chooses by memory.
        autocast: Run the passes in this type, `torch.bfloat16` say; sums stay as they are.
        loss_scale: Power of two that losses are multiplied by for the backward pass, undone in
            float32 before anything is squared, halved where gradients overflow; None takes 2¹⁶
            where the model or autocast is float16, 1 elsewhere.

    Raises:
        DataError: No batches, fewer samples than asked for, labels out of range, bad images.
        NonFiniteGradient: NaN or infinity; names parameter and sample.
        UnknownParameter: `parameters` matches nothing.
        UnsupportedLayer: A per-sample gradient cannot be formed.
    """
    check_samples(samples)
    chosen = select_parameters(model, parameters)
    checked = as_batches(batches, samples, labels)
    if labels == "features":
        first = next(checked)
        checked = itertools.chain([first], checked)
        chosen = without_classifier(model, chosen, parameters, first[0])
    shapes = {name: tuple(p.shape) for name, p in chosen.items()}
    fisher = BlockFisher(shapes, block_size=block_size, precision=precision)
    spare = _spare(fisher, memory_budget)
    total = 0
    with (
        GradientEngine(
            model,
            chosen,
            loss=loss,
            labels=labels,
            seed=seed,
            autocast=autocast,
            micro_batch=micro_batch,
            loss_scale=loss_scale,
        ) as engine,
        reporter(progress, "statistics") as report,
    ):
        # A micro-batch at a time, so that an error can name the sample.
        step = engine.micro_batch
        sink = choose_sink(fisher, chosen, step, samples=samples, spare=spare)
        for images, targets in checked:
            if samples is None:
                sink.expect(total + images.shape[0])
            for start in range(0, images.shape[0], step):
                part = slice(start, start + step)
                some = None if targets is None else targets[part]
                engine.run(images[part], some, sink)
                sink.end_micro_batch(images[part].shape[0])
                total += images[part].shape[0]
                report(total, samples)
        sink.flush()
    return fisher


def as_batches(
    batches: Batches, samples: int | None, labels: str = "true"
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Check what users iterate and stop after `samples`.

    Yields:
        Images `[n, ...]`, n >= 1, and labels `[n]` or None.

    Raises:
        DataError: No batch, something else than pairs, fewer samples than asked for.
    """
    total = 0
    for number, batch in enumerate(batches):
        images, targets = _unpack(batch, number, labels)
        if samples is not None and total + images.shape[0] > samples:
            images = images[: samples - total]
            targets = None if targets is None else targets[: samples - total]
        total += images.shape[0]
        yield images, targets
        if total == samples:
            return
    if total == 0:
        raise DataError("batches: is empty; takes at least one batch of (images, labels)")
    if samples is not None:
        raise DataError(f"samples: asked for {samples}, but batches gave {total}")


def check_samples(samples: int | None) -> None:
    """Raise InvalidArgument unless `samples` is 1 or more, or None."""
    if samples is not None and samples < 1:
        raise InvalidArgument(f"samples: got {samples}; takes 1 or more, or None for all")


def _unpack(batch: Any, number: int, labels: str) -> tuple[Tensor, Tensor | None]:
    if labels in ("sampled", "features"):
        if isinstance(batch, Tensor):
            batch = (batch, None)
        elif isinstance(batch, (tuple, list)) and len(batch) == 1:  # as a TensorDataset gives
            batch = (batch[0], None)
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
        raise DataError(
            f"batches: batch {number} is {type(batch).__name__}; takes pairs (images, labels)"
        )
    images, targets = batch
    if not isinstance(images, Tensor) or images.dim() < 1 or images.shape[0] == 0:
        raise DataError(
            f"batches: batch {number} has no images; takes tensors [n, C, H, W], or tokens "
            "[n, L], n >= 1"
        )
    if labels == "features" and not isinstance(targets, Tensor):
        targets = None  # whatever it is, it is not used
    if targets is not None:
        try:
            targets = torch.as_tensor(targets)
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(f"labels: batch {number} has no tensor of labels: {error}") from error
        if targets.dim() == 0 or targets.shape[0] != images.shape[0]:
            raise DataError(
                f"labels: batch {number} has {list(targets.shape)} for {images.shape[0]} images; "
                "takes one an image"
            )
    return images, targets


def _spare(fisher: BlockFisher, budget: int | None) -> int | None:
    """Bytes of the budget that the statistics leave."""
    if budget is None:
        return None
    needed = fisher.final_nbytes
    if needed > budget:
        raise InvalidArgument(
            f"memory_budget: the statistics take {needed / 2**20:.0f} MiB, more than "
            f"{budget / 2**20:.0f} MiB; take fewer parameters or a smaller block_size"
        )
    return budget - needed
