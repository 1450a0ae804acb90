"""The public function that collects statistics of a model over images."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch
from torch import nn

from fastsal.data.batches import Batches
from fastsal.data.numbering import check_labels_of
from fastsal.fisher.block_fisher import BlockFisher
from fastsal.fisher.collection.groups import collected
from fastsal.fisher.statistics import Collected
from fastsal.gradients.losses import LossFunction
from fastsal.models.classifier import using_head
from fastsal.utils.choices import Curvature


def collect(
    model: nn.Module,
    batches: Batches,
    *,
    block_size: int | None = 64,
    samples: int | None = None,
    loss: str | LossFunction = "cross-entropy",
    curvature: Curvature = "empirical",
    parameters: str | Sequence[str] | None = None,
    memory_budget: int | str | None = None,
    scratch: str | os.PathLike[str] | None = None,
    scratch_budget: int | str | None = None,
    progress: bool | Callable[[int, int | None], None] = False,
    seed: int = 0,
    precision: str = "float32",
    micro_batch: int | None = None,
    autocast: torch.dtype | None = None,
    loss_scale: float | None = None,
    head: str | Sequence[str] | None = None,
) -> BlockFisher:
    """Collect the block-diagonal empirical Fisher of a model over images.

    The model runs in evaluation mode, and its state is restored afterwards. A warning is given if
    labels or logits do not look right: labels that are not numbered as the outputs of the model, a
    loss worse than guessing, a model without a classifier or with a random one.

    With `curvature="features"` neither labels nor a classifier is needed. The features `f_θ(x)`
    `[F]`, which are the input of the classifier, are treated as the mean of a Gaussian. A target
    `y = f(x) + √F ε`, `ε ~ N(0, I)`, is drawn for each image, the loss is `½ ‖f_θ(x) − y‖² / F`,
    and the gradient is `−J_f(x)ᵀ ε / √F`. Its outer products sum to the Gauss–Newton matrix
    `JᵀJ / F` (Martens, 2020, section 9). At these weights it is exactly the Hessian of half the
    mean squared change of the features, `½ ‖f_θ(x) − f(x)‖² / F`, the loss of distilling the
    features of the dense model. The scale is `F`, not a variance measured on images, so that
    statistics of any two image sets, batches or machines can be merged. `λ` and loss increases
    have the unit of a squared feature.

    Args:
        model: Maps images `[n, C, H, W]` to logits `[n, classes]`, or to what `loss` requires. Its
            weights may be float16 or bfloat16; gradients and sums are then float32.
        batches: Iterable of `(images, labels)`: `[n, C, H, W]` floating point and normalized, or
            tokens `[n, L]` int64 or int32; and `[n]` integer, or the `[n, ...]` that `loss`
            requires. With `curvature="sampled"` and `"features"` labels may be missing: None, or
            images alone.
        block_size: Weights of a block; None makes each parameter one block.
        samples: Number of samples to use; None uses all.
        loss: `"cross-entropy"`, or a function `(outputs, labels)` that returns losses `[n]`. Its
            outputs are at least float32.
        curvature: `"empirical"` uses the given labels (the empirical Fisher); `"sampled"` draws
            labels from the softmax of the model (the true Fisher); `"features"` ignores labels and
            outputs, see above.
        parameters: Names or patterns; None selects the weights of Linear and ConvNd layers, and the
            projections of `nn.MultiheadAttention`.
            Embedding tables must be named (see `fastsal.models.selection`). With
            `curvature="features"` the weights of the classifier are excluded unless they are named
            exactly, as features do not depend on them.
        memory_budget: Most bytes that may be added to the process, or text such as `"8GiB"`, for
            statistics, rows, and forward and backward passes. If the statistics do not fit, several
            passes are made over the images, each for a subset of the parameters, so that `batches`
            must yield the same images every time. Samples are summed in the same steps as without a
            budget, with the same rounding. If a smaller micro-batch makes PyTorch choose another
            kernel (usually below four samples), gradients differ in their last bits.
        scratch: Folder for statistics that do not fit in the budget; accumulators are stored there
            in an unlinked file, which the system deletes with the process.
        scratch_budget: Most bytes of that file.
        progress: True shows a progress bar; a function is called with `(samples, total or None)`.
        seed: Seed of random draws; the draw of a sample does not depend on its batch.
        precision: Type of the sums, `"float32"` or `"float64"`.
        micro_batch: Samples of one forward and backward pass; None chooses by memory. With a memory
            budget it is an upper limit.
        autocast: Type to run passes in, such as `torch.bfloat16`; the type of sums is unchanged.
        loss_scale: Power of two that losses are multiplied by in the backward pass. Loss scaling
            keeps float16 gradients from underflowing; it is undone in float32 before squaring, and
            halved if gradients overflow. None is 2¹⁶ if the model or autocast is float16, else 1.
        head: Name of the classifier's layer, or several; None finds it. Only
            `curvature="features"` uses it: features are its input.

    Returns:
        The statistics.

    Raises:
        InvalidArgument: An argument is invalid, or the memory budget is too small.
        DataError: There are no batches or too few samples, or an image or label is invalid.
        NonFiniteGradient: NaN or infinity; names parameter and sample.
        UnknownParameter: `parameters` matches nothing.
        UnsupportedLayer: The per-sample gradient of a weight cannot be formed.
    """
    if curvature == "empirical":
        check_labels_of(batches, model)
    with using_head(model, head):
        statistics = collected(
            model,
            batches,
            block_size=block_size,
            samples=samples,
            loss=loss,
            curvature=curvature,
            parameters=parameters,
            memory_budget=memory_budget,
            scratch=scratch,
            scratch_budget=scratch_budget,
            progress=progress,
            seed=seed,
            precision=precision,
            micro_batch=micro_batch,
            autocast=autocast,
            loss_scale=loss_scale,
        )
    assert isinstance(statistics, Collected)  # without a `use`, the sums are always stored
    return statistics.fisher
