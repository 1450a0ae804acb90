"""The distance between the outputs of two models, which refitting lowers.

Axes: n images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastsal.data.batches import Pair
from fastsal.errors import DataError, InvalidArgument
from fastsal.gradients.precision import at_least_float32
from fastsal.models.classifier import classifier_of
from fastsal.models.evaluating import first_layer_parameter, plain_call, to_model
from fastsal.models.features import feature_outputs, find_feature_layer
from fastsal.models.outputs import output_tensor
from fastsal.pruning.masks.masks import Masks
from fastsal.pruning.refit.windows import capturing
from fastsal.utils.float64 import in_float64
from fastsal.utils.sizes import gib

_FINAL = "(final)"  # key of the features or outputs among the windows
# Features are constant, as those of one image, if their variance is below this part of the mean
# square.
_CONSTANT = 1e-6


class Matching:
    """The windows of a pruned model, and their distance from those of the dense model.

    The error of a window `w` is `mean_n ‖a_w(x_n) − b_w(x_n)‖² / s_w`, where `a` and `b` are the
    outputs of the pruned and of the dense model, and the scale `s_w` is the mean of `‖b_w(x)‖²`
    over held-out images. For the features or outputs it is the variance, the mean of
    `‖b_w(x) − mean b_w‖²`: a large constant part tells nothing about images. The error of images is
    half that of the features or outputs and half the mean over the other windows. So errors of
    micro-batches add up.

    Attributes:
        names: Names of the windows besides the features or outputs.

    Args:
        model: The pruned model, in evaluation mode.
        dense: The dense model, in evaluation mode.
        names: Names of the windows besides the features or outputs. Those whose outputs have
            another shape in the dense model, as some of their units were removed, are left out.
        masks: Masks; if they prune the classifier, outputs are matched in place of features, and
            also if features have another width in the dense model.
        autocast: dtype for `torch.autocast`, or None.
        held: Held-out images, for any number of iterations.

    Raises:
        InvalidArgument: The models have outputs of different shapes.
    """

    def __init__(
        self,
        model: nn.Module,
        dense: nn.Module,
        names: list[str],
        masks: Masks,
        autocast: torch.dtype | None,
        held: Iterable[Pair],
    ) -> None:
        self.model, self._dense = model, dense
        self.names, self._autocast, self._held = names, autocast, held
        self._scales: dict[str, float] = {}
        images = next(iter(held))[0]
        head = {p for layer in classifier_of(model, images) for p in layer.parameters()}
        prunes_head = not head.isdisjoint(masks.parameters(model).values())
        self._call: Callable[[nn.Module, Tensor], Any] = (
            plain_call if prunes_head or not head else feature_outputs
        )
        for each in (model, dense):
            find_feature_layer(each, images)
        shapes = self._shapes(images)
        if shapes[0][_FINAL] != shapes[1][_FINAL] and self._call is feature_outputs:
            self._call = plain_call
            shapes = self._shapes(images)
        found, wanted = (tuple(each[_FINAL]) for each in shapes)
        if found != wanted:
            raise InvalidArgument(
                f"dense must have outputs of the shape of model's, {found}, got {wanted}"
            )
        self.names = [name for name in names if shapes[0][name] == shapes[1][name]]

    def _shapes(self, images: Tensor) -> list[dict[str, torch.Size]]:
        """Return the shapes of one image's outputs of both models."""
        with torch.no_grad():
            return [
                {name: t.shape[1:] for name, t in self._outputs(each, images[:2]).items()}
                for each in (self.model, self._dense)
            ]

    def micro_batch(self, most: int, room: int | None) -> int:
        """Return how many images run together within some memory.

        Args:
            most: Images at most.
            room: Bytes for the activations of a forward and backward pass; None chooses.

        Raises:
            InvalidArgument: There is no room for one image.
        """
        images = next(iter(self._held))[0][:2]
        self._scales = dict.fromkeys([*self.names, _FINAL], 1.0)
        each = self._activation_bytes(images)
        fits = (_room(self.model) if room is None else room) // max(1, each)
        if room is not None and not fits:
            raise InvalidArgument(
                f"memory_budget must leave {gib(each)} for refitting with one image at a time, "
                f"{gib(room)} are left"
            )
        return max(1, min(most, fits))

    def _activation_bytes(self, images: Tensor) -> int:
        """Return the bytes that one image needs until the backward pass."""
        own = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        saved: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
        with torch.enable_grad(), hooks:
            error = self.error(images)
        del error
        with torch.no_grad():
            outputs = self._outputs(self._dense, images)
        # Outputs of the dense model are kept beside, and gradients pass by.
        return (sum(saved.values()) + 2 * sum(t.nbytes for t in outputs.values())) // len(images)

    def find_scales(self, micro_batch: int) -> None:
        """Compute the scales, from the held-out images."""
        totals = dict.fromkeys([*self.names, _FINAL], 0.0)
        finals = []
        with torch.no_grad():
            for images in parts(self._held, micro_batch):
                outputs = self._outputs(self._dense, images)
                for name, b in outputs.items():
                    totals[name] += float(at_least_float32(b).square().sum())
                finals.append(in_float64(outputs[_FINAL]))
        final = torch.cat(finals)
        variance = float((final - final.mean(0)).square().sum())
        if variance > _CONSTANT * totals[_FINAL]:
            totals[_FINAL] = variance
        # Windows whose outputs are zero everywhere are left out.
        self._scales = {name: total / len(final) for name, total in totals.items() if total > 0}
        if not self._scales:
            raise DataError("the held-out images must have outputs other than zero, got zeros")

    def error(self, images: Tensor) -> Tensor:
        """Return the error of images `[n, ...]`, a scalar with a graph if gradients are enabled."""
        with torch.no_grad():
            wanted = self._outputs(self._dense, images)
        found = self._outputs(self.model, images)
        errors = {
            name: (at_least_float32(found[name]) - at_least_float32(wanted[name])).square().sum()
            / (scale * len(images))
            for name, scale in self._scales.items()
        }
        final = [errors.pop(_FINAL)] if _FINAL in errors else []
        others = [torch.stack(list(errors.values())).mean()] if errors else []
        return torch.stack(final + others).mean()

    def held_out_error(self, micro_batch: int) -> float:
        """Return the error of the held-out images; inf for NaN."""
        return self.mean_error(self._held, micro_batch)

    def mean_error(self, batches: Iterable[Pair], micro_batch: int) -> float:
        """Return the error of the images of batches; inf for NaN."""
        total = samples = 0.0
        with torch.no_grad():
            for images in parts(batches, micro_batch):
                total += float(self.error(images)) * len(images)
                samples += len(images)
        error = total / samples
        return error if math.isfinite(error) else math.inf

    def _outputs(self, model: nn.Module, images: Tensor) -> dict[str, Tensor]:
        first = first_layer_parameter(model)
        moved = to_model(images, model)
        with (
            capturing(model, self.names) as caught,
            torch.autocast(
                first.device.type, dtype=self._autocast, enabled=self._autocast is not None
            ),
        ):
            final = self._call(model, moved)
        missing = [name for name in self.names if name not in caught]
        if missing:
            raise InvalidArgument(
                f"windows: {missing[0]!r} must be called by the model and return a tensor; it is "
                "not called, or returns none"
            )
        return {**caught, _FINAL: output_tensor(final)}


def parts(batches: Iterable[Pair], size: int) -> Iterator[Tensor]:
    """Yield the images of batches, at most `size` at a time."""
    for images, _ in batches:
        for start in range(0, len(images), size):
            yield images[start : start + size]


def _room(model: nn.Module) -> int:
    """Return the bytes that activations may take without a budget."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    return 2**31
