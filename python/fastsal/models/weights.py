"""Load the weights of a model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastsal.errors import FileFormatError, InvalidArgument
from fastsal.models.classifier_signs import record_fresh
from fastsal.models.fitting import class_hint, fill_aliases, misfits
from fastsal.models.layouts import recognized
from fastsal.models.packed import is_packed, unpack
from fastsal.models.pickles import read_pickle
from fastsal.models.saving import other_state, save_weights, tensors_in
from fastsal.models.state_dicts import choose_state, fitted
from fastsal.models.widths import read_widths, resized
from fastsal.models.wrappers import renamed, unwrapped
from fastsal.utils.paths import user_path
from fastsal.utils.warn import warn_user

__all__ = ["check_weights_path", "load_weights", "read_pickle", "read_weights", "save_weights"]

WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".pth.tar", ".ckpt", ".bin")
_ADVICE = "where it was made, save model.state_dict() alone with torch.save, and pass that file"


def load_weights(
    model: nn.Module, path: str | os.PathLike[str], *, weights_key: str | None = None
) -> None:
    """Load the weights of `model` from a file, in place. On error no tensor is changed.

    The file may be what training writes: a state dict, or a dict with one beside other things. An
    average of the weights (`state_dict_ema`, `model_ema`, ...) is preferred, as in timm, with a
    warning. Prefixes of wrappers (`module.`, `_orig_mod.`) and of a module that contains the model
    (`model.` of a Lightning checkpoint) are removed, unless the model itself has them.

    Layouts of self-supervised training (MoCo, DINO, MAE, ...) and of other libraries (transformers,
    torchvision, mmpretrain, ...) are recognized. A warning says what was found and left out. A file
    without a classifier leaves that of the model as it is; using it before it is trained warns. A
    file of a model from which units were removed makes the layers as narrow as they were saved.
    Packed files of `fastsal.export` are read, too.

    Args:
        model: The module to load into, or a wrapper of it.
        path: A file with a suffix in `WEIGHT_SUFFIXES`. Pickled code is never run; beside tensors,
            numbers and containers it may have `argparse.Namespace` and numbers of NumPy.
        weights_key: Key of the state dict in the file, with dots between those of nested dicts, or
            the prefix of its names, or both; None chooses as above.

    Raises:
        InvalidArgument: There is no such file, or no state dict under `weights_key`.
        FileFormatError: The file cannot be read, its names, shapes or types do not fit the model,
            or several parts of it do.
    """
    model, path = unwrapped(model), user_path(path)
    state, choice = _read(path, weights_key)
    with resized(model, read_widths(path), state, path):
        own = tensors_in(model.state_dict())
        state, notes, lacks_classifier = _for_model(state, model, own, path, choice)
        for name, _ in model.named_parameters():
            if name in state and not bool(torch.isfinite(state[name]).all()):
                raise FileFormatError(f"weights: {path} contains NaN or infinity in {name!r}")
        kept = {name: value for name, value in own.items() if name not in state}  # of the head
        model.load_state_dict({**kept, **state, **other_state(model, path)}, strict=True)
    if lacks_classifier:
        record_fresh(model, f"{Path(path).name} has no classifier")
    if notes:
        warn_user(f"weights: {path}: {'; '.join(notes)}")


def _for_model(
    state: dict[str, Tensor],
    model: nn.Module,
    own: dict[str, Tensor],
    path: str | os.PathLike[str],
    choice: str,
) -> tuple[dict[str, Tensor], list[str], bool]:
    """Return the tensors under the names of the model, notes, and whether it has no classifier.

    Names that fit as they are, or but for the prefix of a wrapper, come first, then those of known
    layouts, then those under any prefix.

    Raises:
        FileFormatError: The tensors do not fit.
    """
    names = renamed(state, own)
    direct = {names.get(name, name): value for name, value in state.items()}
    fill_aliases(direct, own)
    if len(names) < len(state) or misfits(direct, own):
        found = recognized(state, model, own, path)
        if found is not None:
            notes = [note for note in (choice, found.note) if note]
            return found.state, notes, found.lacks_classifier
    state, change = fitted(state, own, path)
    notes = [note for note in (choice, change) if note]
    fill_aliases(state, own)
    problems = misfits(state, own)
    if problems and change:
        found = recognized(state, model, own, path)
        if found is not None:
            notes += [found.note] if found.note else []
            return found.state, notes, found.lacks_classifier
    if problems:
        hint = class_hint(state, own)
        raise FileFormatError(
            f"weights: {path} does not fit the model: {'; '.join([*problems, *notes])}{hint}"
        )
    return state, notes, False


def read_weights(
    path: str | os.PathLike[str], *, weights_key: str | None = None
) -> dict[str, Tensor]:
    """Read a state dict from a file, under the names that it has there; see `load_weights`.

    Returns:
        Name to tensor, on the CPU.

    Raises:
        InvalidArgument: There is no such file, its suffix is none of `WEIGHT_SUFFIXES`, or there is
            no state dict under `weights_key`.
        FileFormatError: The file is damaged, or contains no state dict.
    """
    state, note = _read(path, weights_key)
    if note:
        warn_user(f"weights: {path}: {note}")
    return state


def _read(path: str | os.PathLike[str], key: str | None) -> tuple[dict[str, Tensor], str]:
    """Return a state dict of a file, and a note on its choice."""
    path = user_path(path)
    check_weights_path(path)
    if path.suffix == ".safetensors":
        loaded: Any = _read_safetensors(path)
    else:
        loaded = read_pickle(path, "weights", _ADVICE)
    return choose_state(loaded, key, path)


def check_weights_path(path: Path) -> None:
    """Raise InvalidArgument unless `path` is an existing file of a type in `WEIGHT_SUFFIXES`."""
    if not path.name.endswith(WEIGHT_SUFFIXES):
        raise InvalidArgument(
            f"weights must be 'pretrained' or a file that ends in {', '.join(WEIGHT_SUFFIXES)}, "
            f"got {str(path)!r}"
        )
    if not path.is_file():
        raise InvalidArgument(f"weights: there is no file {path}")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata()
        tensors = dict(load_file(str(path)))
        return unpack(tensors, metadata, path) if is_packed(metadata) else tensors
    except SafetensorError as error:
        raise FileFormatError(
            f"weights: {path} is truncated or not a safetensors file ({error})"
        ) from None
