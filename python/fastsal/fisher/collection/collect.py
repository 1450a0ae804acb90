"""From a model and images to statistics: one forward and backward pass a micro-batch."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastsal.data.batches import Batches
from fastsal.fisher.block_fisher import BlockFisher
from fastsal.fisher.collection.groups import collected
from fastsal.utils.choices import Curvature

Loss = Callable[[Tensor, Tensor], Tensor]


def collect(
    model: nn.Module,
    batches: Batches,
    *,
    block_size: int | None = 64,
    samples: int | None = None,
    loss: str | Loss = "cross-entropy",
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
) -> BlockFisher:
    """Collect the block-diagonal empirical Fisher of a model over images.

    The model is in evaluation mode for it, and is left exactly as it was found.

    With `curvature="features"` no labels are needed, nor a classifier. The features `f_θ(x)` `[F]`
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
            With `curvature="sampled"` and `"features"` the labels may be missing: None, or images
            alone.
        block_size: Weights of a block; None takes each parameter as one block.
        samples: Stop after so many; None takes all.
        loss: `"cross-entropy"`, or a function `(outputs, labels)` that returns losses `[n]`;
            outputs come in float32 at least.
        curvature: `"empirical"` for the empirical Fisher; `"sampled"` draws labels from the model's
            own softmax, for the true Fisher; `"features"` ignores labels and outputs, see above.
        parameters: Names or patterns; None takes the weights of Linear and ConvNd (tables of
            Embedding are taken where they are named, see `fastsal.models.selection`). With
            `curvature="features"` the classifier's are left out unless they are named exactly, as
            features do not depend on them.
        memory_budget: Bytes that this may add to the process, or text as `"8GiB"`: statistics,
            rows, what a forward and backward pass takes. Where the statistics do not fit, the
            images are gone over several times, each time for some of the parameters, so that
            `batches` must give the same images every time. Samples are summed in the same steps as
            without a budget, and so round alike; but where a smaller micro-batch makes PyTorch
            choose another kernel, gradients differ in their last bits (as a rule below four
            samples; `micro_batch` gives the most that are taken).
        scratch: A folder for statistics that are larger than the budget: they lie in a file there,
            which has no name and is gone with them.
        scratch_budget: Bytes that they may take there.
        progress: True shows a bar; a function is called with `(samples, total or None)`.
        seed: Seed of what is drawn; what a sample gets does not depend on batches.
        precision: `"float32"` or `"float64"`, in which sums are kept.
        micro_batch: Samples of one forward and backward pass; None chooses by memory.
        autocast: Run the passes in this type, `torch.bfloat16` say; sums stay as they are.
        loss_scale: Power of two that losses are multiplied by for the backward pass, undone in
            float32 before anything is squared, halved where gradients overflow; None takes 2¹⁶
            where the model or autocast is float16, 1 elsewhere.

    Raises:
        InvalidArgument: An argument is not taken; the budget is too small, and what it takes.
        DataError: No batches, fewer samples than asked for, labels out of range, bad images.
        NonFiniteGradient: NaN or infinity; names parameter and sample.
        UnknownParameter: `parameters` matches nothing.
        UnsupportedLayer: A per-sample gradient cannot be formed.
    """
    return collected(
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
