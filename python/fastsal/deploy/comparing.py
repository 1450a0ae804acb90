"""Compare the outputs of an exported file with those of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastsal.errors import FastsalError, InvalidArgument
from fastsal.models.evaluating import first_layer_parameter, outputs, to_model
from fastsal.models.outputs import output_tensor

_Array = NDArray[np.float32]


class OneOutput(nn.Module):
    """A model in evaluation mode, whose output is one tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = False

    def train(self, mode: bool = True) -> OneOutput:  # noqa: ARG002
        """Change nothing: converters call `eval()`, by which a model may merge weights."""
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits or features of images."""
        return output_tensor(self.model(images))


def images_of_type(model: nn.Module, images: Tensor, kind: str) -> Tensor:
    """Return images on the CPU in the type of a model, which files of a kind must be able to take.

    Raises:
        InvalidArgument: NumPy has no such type.
    """
    dtype = first_layer_parameter(model).dtype if any(True for _ in model.parameters()) else None
    if dtype in (None, torch.bfloat16):
        came = "no parameters" if dtype is None else "bfloat16"
        raise InvalidArgument(
            f"model must have parameters in float16, float32 or float64 for {kind}, got {came}"
        )
    return to_model(images, model).cpu()


def output_array(model: nn.Module, images: Tensor) -> _Array:
    """Return the logits or features of images, float32, wherever the model is."""
    found: _Array = output_tensor(outputs(model, images)).cpu().numpy()
    return found


def compare_outputs(
    model: nn.Module,
    run: Callable[[_Array], _Array],
    images: Tensor,
    tolerance: float,
    kind: str,
) -> float:
    """Return the difference of outputs, for all images at once and for one alone.

    Args:
        model: The model, in evaluation mode.
        run: Runs the file on images.
        images: `[n, ...]` on the CPU; the model may be elsewhere, and of another type.
        tolerance: Largest difference, relative to the largest output.
        kind: Kind of the file, for messages.

    Raises:
        FastsalError: The difference is larger, or outputs have another shape.
    """
    differences = []
    for some in (images, images[:1]):
        wanted = output_array(model, some)
        found = run(some.numpy())
        if found.shape != wanted.shape:
            raise FastsalError(
                f"the {kind} file has outputs {list(found.shape)}, the model {list(wanted.shape)}"
            )
        if np.isnan(wanted).any():
            raise FastsalError("the outputs of the model on images are NaN: none can be compared")
        found = found.astype(np.float32)
        apart = found != wanted  # equal infinities are none
        scale = max(float(np.abs(wanted[np.isfinite(wanted)]).max(initial=0)), 1e-30)
        differences.append(np.abs(found[apart] - wanted[apart]).max(initial=0) / scale)
    worst = float(np.max(differences))  # NaN if there is one
    if not worst <= tolerance:
        raise FastsalError(
            f"the outputs of the {kind} file differ from those of the model by {worst:.3g} of the "
            f"largest output, more than tolerance {tolerance:g}"
        )
    return worst


def compare_zeros(
    model: nn.Module, constants: Iterable[NDArray[Any]], kind: str
) -> tuple[int, int]:
    """Return how many weights a file has, and how many are zero, where the model's are zero.

    For converters that multiply weights by the scales of batch normalization: weights are
    recognized by their number and the places of their zeros. Those that are not found in this
    order are not counted.

    Args:
        model: The model.
        constants: Constants of the file, of a real type.
        kind: Kind of the file, for messages.

    Raises:
        FastsalError: The file lacks zeros of the model, or has none of its weights.
    """
    known: dict[int, list[NDArray[np.bool_]]] = {}
    for constant in constants:
        known.setdefault(constant.size, []).append(constant.reshape(-1) == 0)
    values = zeros = 0
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or parameter.numel() not in known:
            continue
        zero = (parameter.detach().cpu() == 0).numpy().reshape(-1)
        if any((zero <= found).all() for found in known[len(zero)]):
            values += len(zero)
            zeros += int(zero.sum())
        elif all(found.sum() < zero.sum() for found in known[len(zero)]):
            raise FastsalError(f"the {kind} lacks zeros of the model in {name!r}")
    if not values:
        raise FastsalError(f"the {kind} has none of the weights of the model")
    return values, zeros
