"""2:4 sparsity as PyTorch stores it on a GPU of CUDA: two values of every four, and their places.

Tensor cores of compute capability 8.0 and above skip the other two. PyTorch compresses weights of
linear layers on the GPU (`torch.sparse.to_sparse_semi_structured`), in 16 bits here.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastsal.deploy.comparing import compare_outputs, output_array
from fastsal.deploy.staged import bytes_beside, staged
from fastsal.errors import FastsalError, InvalidArgument
from fastsal.models.evaluating import set_modes
from fastsal.utils.plain_text import first_line

_LEAST_CAPABILITY = (8, 0)


def require_gpu() -> torch.device:
    """Return the current GPU; raise InvalidArgument unless it multiplies by 2:4 weights."""
    if not torch.cuda.is_available():
        raise InvalidArgument(
            "torch-2:4 requires a GPU of CUDA, where PyTorch compresses weights; there is none here"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST_CAPABILITY:
        raise InvalidArgument(
            "torch-2:4 requires a GPU of compute capability 8.0 or above, got "
            f"{torch.cuda.get_device_name(device)} of {capability[0]}.{capability[1]}"
        )
    return device


def has_two_of_four(weight: Tensor) -> bool:
    """Whether a matrix `[O, I]` has at most two values in every four neighbors of a row."""
    if weight.ndim != 2 or weight.shape[1] % 4:
        return False
    return bool(((weight != 0).reshape(-1, 4).sum(1) <= 2).all())


def two_of_four_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers whose weights have 2:4 zeros, by name.

    Classes derived from `Linear` are left: the modules around them may read the weight otherwise.
    """
    return {
        name: layer
        for name, layer in model.named_modules()
        if type(layer) is nn.Linear and has_two_of_four(layer.weight.detach())
    }


def semi_structured(model: nn.Module, dtype: torch.dtype) -> tuple[nn.Module, dict[str, int]]:
    """Return a copy of a model on the GPU, in 16 bits, with compressed 2:4 weights.

    Args:
        model: Any module; not changed.
        dtype: `torch.float16` or `torch.bfloat16`.

    Returns:
        The copy, in evaluation mode, and its layers that are compressed, with the number of their
        weights. Layers whose shape PyTorch cannot compress stay dense.

    Raises:
        InvalidArgument: There is no such GPU, or no weight has 2:4 zeros in a shape that PyTorch
            compresses.
    """
    device = require_gpu()
    found = copy.deepcopy(model).to(device=device, dtype=dtype)
    set_modes(found, False)
    done: dict[str, int] = {}
    reason = "no linear layer has two zeros in every four weights"
    for name, layer in two_of_four_layers(found).items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that the interface is a prototype
                stored = torch.sparse.to_sparse_semi_structured(layer.weight.detach().contiguous())
        except RuntimeError as error:
            reason = f"{name}: {first_line(error)}"
            continue
        layer.weight = nn.Parameter(stored, requires_grad=False)
        done[name] = stored.numel()
    if not done:
        raise InvalidArgument(
            "model must have weights that PyTorch stores as 2:4, as the pattern 2:4 gives them; "
            + reason
        )
    return found, done


def export_semi_structured(
    model: nn.Module, path: Path, images: Tensor, tolerance: float, dtype: torch.dtype
) -> tuple[int, float, int, int]:
    """Write the state dict of a model in 16 bits, with compressed 2:4 weights, and compare it.

    Args:
        model: The model, in evaluation mode.
        path: The file, `.pt`, which `torch.load` reads.
        images: `[n, ...]`, n >= 2.
        tolerance: Largest difference of outputs from those of the dense model of the same type,
            relative to the largest output.
        dtype: `torch.float16` or `torch.bfloat16`.

    Returns:
        Bytes of the file, the difference, the weights of compressed layers, and how many of them
        are zero.

    Raises:
        InvalidArgument: There is no GPU for it, or no such weight.
        FastsalError: The file differs from the model.
    """
    stored, names = semi_structured(model, dtype)
    dense = copy.deepcopy(model).to(device=next(stored.parameters()).device, dtype=dtype)
    with staged(path) as made:
        torch.save(stored.state_dict(), made)
        _load(stored, made)
        values, zeros = _compare_zeros(dense, stored, names)
        difference = compare_outputs(
            dense,
            lambda x: output_array(stored, torch.from_numpy(x)),
            images.float().cpu(),
            tolerance,
            "2:4",
        )
        size = bytes_beside(made)
    return size, difference, values, zeros


def _load(model: nn.Module, path: Path) -> None:
    """Put the tensors of a file into a model, in place of its own."""
    from torch.sparse import (
        SparseSemiStructuredTensorCUSPARSELT,
        SparseSemiStructuredTensorCUTLASS,
    )

    kinds: list[Any] = [SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS]
    with torch.serialization.safe_globals(kinds):
        model.load_state_dict(torch.load(path, weights_only=True), assign=True)


def _compare_zeros(dense: nn.Module, stored: nn.Module, names: Iterable[str]) -> tuple[int, int]:
    values = zeros = 0
    for name in names:
        wanted = dense.get_parameter(f"{name}.weight").detach()
        found = stored.get_parameter(f"{name}.weight").to_dense()
        if not torch.equal(wanted, found):
            raise FastsalError(f"the 2:4 file differs from the model in {name + '.weight'!r}")
        values += wanted.numel()
        zeros += int((wanted == 0).sum())
    return values, zeros
