"""Reconstruct a pruned model: solve for the kept weights of one layer after the other.

The kept weights of a layer minimize `E‖W̃ x̃ + b̃ − y‖²`, where `x̃` is the input of the layer in the
pruned model, whose earlier layers are solved already, and `y` its output in the dense model. Unlike
joint compensation within blocks of curvature, all inputs of a row are coupled, and errors of
earlier layers are corrected (asymmetric reconstruction: He et al., ICCV 2017, eq. 4; AdaRound,
Nagel et al. 2020, eq. 25). Where an output is added to another tensor, as in a residual block, `y`
also makes up for the error of that tensor. The mean of the error is taken up by the bias or by the
running mean of the following batch normalization.

Axes: n images.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from fastsal.data.batches import Batches
from fastsal.data.unpacking import BatchRule, ruled
from fastsal.errors import InvalidArgument
from fastsal.gradients.losses import check_autocast
from fastsal.models.wrappers import unwrapped
from fastsal.pruning.images_apart import images_apart
from fastsal.pruning.masks.masks import Masks
from fastsal.pruning.measured import HeldOutFeatures
from fastsal.pruning.reconstruction.passes import DAMPING
from fastsal.pruning.reconstruction.stage import ReconstructionStage
from fastsal.pruning.reconstruction_result import Reconstruction
from fastsal.pruning.same_model import check_same
from fastsal.pruning.shelf import Shelf, all_or_nothing, copies, tensors_of
from fastsal.utils.numbers import SEEDS, real, whole


def reconstruct(
    model: nn.Module,
    dense: nn.Module,
    batches: Batches,
    masks: Masks,
    *,
    samples: int | None = None,
    damping: float = DAMPING,
    held_out: Batches | None = None,
    batch: BatchRule | None = None,
    autocast: torch.dtype | None = None,
    seed: int = 0,
) -> Reconstruction:
    """Solve for the kept weights of each layer of a pruned model, in place.

    Two forward passes without gradients: the dense model's outputs are recorded, then each layer of
    the pruned model is solved just before it runs. All other parameters and buffers become those of
    the dense model; then biases and running means of batch normalization take up the mean error.
    Layers that a forward pass calls more than once, and weights that a layer computes, are left as
    they are. The result is undone unless it lowers the loss of held-out features,
    `½ ‖f_θ(x) − f(x)‖² / F`, of which an image counts at most what the mean feature costs.

    Args:
        model: The pruned model.
        dense: The dense model, of the same architecture; not changed.
        batches: Images `[n, ...]`, or pairs `(images, anything)`; labels are ignored. Iterable
            several times, such as a list or a `DataLoader`. As many run at once as fit into 2 GiB
            of activations; the rest is not used.
        masks: Masks, True = kept; applied to the model first.
        samples: Number of images to use; None for all.
        damping: Penalty on the squared move of a weight, a multiple of the mean second moment of
            the inputs of its layer.
        held_out: Images that decide whether the result is kept; None holds out one image in eight,
            at most 1,024.
        batch: Function from a batch of another form to `(images, anything)`.
        autocast: dtype of the passes under `torch.autocast`; None disables it.
        seed: Seed of the rows that are compared, and of the images that are held out.

    Returns:
        Held-out losses before and after, and whether the result was kept.

    Raises:
        InvalidArgument: An argument is invalid, or `dense` has other parameters than `model`.
        MaskError: The masks do not fit the model.
        DataError: Batches are invalid, or too few images.

        If an error is raised, the model has its original weights.
    """
    seed, damping = whole("seed", seed, 0, SEEDS[1]), real("damping", damping, above=0)
    check_autocast(autocast)
    if not isinstance(masks, Masks):
        raise InvalidArgument(f"masks must be fastsal.Masks, got {type(masks).__name__}")
    model, dense = unwrapped(model), unwrapped(dense)
    check_same(model, dense)
    batches, held_out = ruled(batches, batch), ruled(held_out, batch)
    source, held = images_apart(batches, samples, held_out, seed)
    tensors = tensors_of(model)
    with all_or_nothing(tensors):
        masks.apply(model)
        measured = HeldOutFeatures.of(dense, held)
        stage = ReconstructionStage(autocast, seed, None, damping)
        return stage.run(
            model,
            tensors,
            copies(tensors_of(dense)),
            masks,
            source,
            partial(measured.mean_loss, model),
            Shelf(),
        )
