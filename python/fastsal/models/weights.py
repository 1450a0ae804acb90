"""Load the weights of a model."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastsal.errors import FileFormatError, InvalidArgument
from fastsal.models.saving import other_state, save_weights, tensors_in
from fastsal.utils.suggestions import closest, listed

__all__ = ["check_weights_path", "load_weights", "read_pickle", "read_weights", "save_weights"]

WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt")


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load the weights of `model` from a file, in place. On error no tensor is changed.

    Args:
        model: The module to load into.
        path: A `.safetensors`, `.pth` or `.pt` file with a state dict, bare or under the key
            "state_dict" or "model". A "module." prefix is removed. Pickled code is never run.

    Raises:
        FileFormatError: The file cannot be read, or its names, shapes or types do not fit the
            model.
    """
    state = read_weights(path)
    own = tensors_in(model.state_dict())
    _fill_aliases(state, own)
    problems = _misfits(state, own)
    if problems:
        hint = _class_hint(state, own)
        raise FileFormatError(
            f"weights: {path} does not fit the model: {'; '.join(problems)}{hint}"
        )
    for name, _ in model.named_parameters():
        if not bool(torch.isfinite(state[name]).all()):
            raise FileFormatError(f"weights: {path} contains NaN or infinity in {name!r}")
    model.load_state_dict({**state, **other_state(model, path)}, strict=True)


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a state dict from a file, see `load_weights`.

    Returns:
        Name to tensor, on the CPU.

    Raises:
        InvalidArgument: There is no such file, or its suffix is none of `WEIGHT_SUFFIXES`.
        FileFormatError: The file is damaged, or contains no state dict.
    """
    path = Path(path)
    check_weights_path(path)
    if path.suffix == ".safetensors":
        loaded: Any = _read_safetensors(path)
    else:
        loaded = read_pickle(path, "weights", "pass a state dict without other objects")
    for key in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
            break
    if (
        not isinstance(loaded, dict)
        or not loaded
        or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in loaded.items())
    ):
        raise FileFormatError(
            f"weights: {path} contains no state dict: a dict from names to tensors, bare or under "
            "'state_dict' or 'model'"
        )
    if all(name.startswith("module.") for name in loaded):
        loaded = {name.removeprefix("module."): value for name, value in loaded.items()}
    return dict(loaded)


def read_pickle(path: Path, argument: str, advice: str) -> Any:
    """Read a file of `torch.save` that contains tensors, containers and numbers only.

    Args:
        path: The file.
        argument: Name of the argument that gave the path, for the message.
        advice: End of the message, what to do.

    Raises:
        FileFormatError: The file is missing or damaged, or contains other objects.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except (
        pickle.UnpicklingError,
        RuntimeError,
        OSError,
        EOFError,
        LookupError,
        ValueError,
    ) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FileFormatError(
            f"{argument}: {path} cannot be read as plain tensors ({why}); {advice}"
        ) from None


def check_weights_path(path: Path) -> None:
    """Raise InvalidArgument unless `path` is an existing file of a type in `WEIGHT_SUFFIXES`."""
    if path.suffix not in WEIGHT_SUFFIXES:
        raise InvalidArgument(
            f"weights must be 'pretrained' or a file that ends in {', '.join(WEIGHT_SUFFIXES)}, "
            f"got {str(path)!r}"
        )
    if not path.is_file():
        raise InvalidArgument(f"weights: there is no file {path}")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(str(path)))
    except SafetensorError as error:
        raise FileFormatError(
            f"weights: {path} is truncated or not a safetensors file ({error})"
        ) from None


def _fill_aliases(state: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    """Add the missing names of shared tensors to `state`.

    Batch counters (`num_batches_tracked`) missing in old files keep the value of the model.
    """
    by_tensor: dict[tuple[Any, ...], list[str]] = {}
    for name, value in own.items():
        if value.numel():
            key = (value.data_ptr(), tuple(value.shape), value.stride(), value.dtype)
            by_tensor.setdefault(key, []).append(name)
    for names in by_tensor.values():
        there = next((name for name in names if name in state), None)
        for name in names:
            if there is not None and name not in state:
                state[name] = state[there]
    for name, value in own.items():
        if name.endswith("num_batches_tracked") and name not in state:
            state[name] = value.clone()


def _misfits(state: dict[str, Tensor], own: dict[str, Tensor]) -> list[str]:
    """Describe how `state` differs from `own`; empty if it fits."""
    missing = [name for name in own if name not in state]
    extra = [name for name in state if name not in own]
    shapes = [
        f"{name} {list(state[name].shape)} instead of {list(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    kinds = [
        f"{name} {state[name].dtype} instead of {own[name].dtype}"
        for name in own
        if name in state and state[name].is_floating_point() != own[name].is_floating_point()
    ]
    problems = []
    if missing:
        problems.append(f"{len(missing)} missing: {listed(missing)}{_similar(missing[0], extra)}")
    if extra:
        problems.append(f"{len(extra)} unexpected: {listed(extra)}{_similar(extra[0], missing)}")
    if shapes:
        problems.append(f"{len(shapes)} of a different shape: {listed(shapes)}")
    if kinds:
        problems.append(f"{len(kinds)} of a different type: {listed(kinds)}")
    return problems


def _similar(name: str, known: list[str]) -> str:
    near = closest(name, known)
    return f" (similar: {', '.join(near)})" if near else ""


def _class_hint(state: dict[str, Tensor], own: dict[str, Tensor]) -> str:
    """Suggest `num_classes` if only the outputs of one layer differ in number."""
    wrong = [n for n in own if n in state and state[n].shape != own[n].shape]
    if not wrong or set(own) != set(state):
        return ""
    if any(state[n].shape[1:] != own[n].shape[1:] for n in wrong):
        return ""
    counts = {(state[n].shape[:1], own[n].shape[:1]) for n in wrong}
    if len(counts) > 1 or len({n.rpartition(".")[0] for n in wrong}) > 1:
        return ""
    classes = state[wrong[0]].shape[0]
    return f". The classifier in the file has {classes} classes: pass num_classes={classes}"
