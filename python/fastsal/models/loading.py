"""Build models by timm name or from a Python file."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from fastsal.errors import FastsalError, InvalidArgument
from fastsal.models.classifier_signs import record_fresh
from fastsal.models.evaluating import set_modes
from fastsal.models.weights import check_weights_path, load_weights
from fastsal.utils.devices import resolve_device
from fastsal.utils.digests import Digest
from fastsal.utils.numbers import as_integer, whole
from fastsal.utils.paths import user_path
from fastsal.utils.plain_text import first_line
from fastsal.utils.suggestions import did_you_mean, listed

# Held while a model is built: other threads would draw from the same random numbers.
_building = threading.RLock()


def load_model(
    spec: str,
    *,
    weights: str | os.PathLike[str] | None = None,
    weights_key: str | None = None,
    num_classes: int | None = None,
    in_chans: int | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """Build a model and load its weights.

    Args:
        spec: A timm model name, a model of the Hugging Face Hub in timm's format as
            `hf-hub:OWNER/NAME`, or `path/file.py:function`, a function that returns a module.
        weights: None for random weights, "pretrained" for those of timm, or the path of a
            file, see `fastsal.models.load_weights`.
        weights_key: Key of the state dict in the file, with dots between those of nested dicts, or
            the prefix of its names; None chooses an average if there is one, else the weights.
        num_classes: Number of classes, 0 for a backbone of timm without a classifier; None uses the
            default of the model. If pretrained weights have another number, the classifier is
            random, and using it before it is trained gives a warning.
        in_chans: Number of image channels; None uses the default of the model.
        seed: Seed of the random weights. The global random state is not changed.
        device: Device that the model is moved to: `"cpu"`, `"cuda"`, `"cuda:1"`, `"mps"`, or
            `"auto"` for the GPU if there is one. Random weights do not depend on it.

    Returns:
        The model, in evaluation mode.

    Raises:
        InvalidArgument: The model is unknown, its function lacks an argument, or this machine has
            no such device.
        FileFormatError: The weights cannot be read or do not fit the model.
        FastsalError: Pretrained weights cannot be downloaded.
    """
    chosen = {
        name: whole(name, value, least)
        for name, value, least in (("num_classes", num_classes, 0), ("in_chans", in_chans, 1))
        if value is not None
    }
    seed = whole("seed", seed, None)
    place = resolve_device(device)
    pretrained = isinstance(weights, str) and weights == "pretrained"
    if weights is not None and not pretrained:
        check_weights_path(user_path(weights))
    elif weights_key is not None:
        raise InvalidArgument(
            f"weights_key must be None without a weights file, got {weights_key!r}"
        )
    with _seeded(seed):
        if ".py" in spec and _split_spec(spec):
            if pretrained:
                raise InvalidArgument(
                    f"weights must be a path for a model from a file, got 'pretrained' for {spec!r}"
                )
            model = _from_file(spec, chosen)
        else:
            model = _from_timm(spec, pretrained, chosen)
    if weights is not None and not pretrained:
        load_weights(model, weights, weights_key=weights_key)
    if pretrained:
        _record_fresh_classifier(model)
    # Not `eval()`: it may merge weights of adapters, which would then be merged again when the
    # weights of this model are saved and loaded.
    set_modes(model, False)
    # Models of a file may be somewhere else already, or on the meta device.
    return model if place.type == "cpu" else model.to(place)


def _record_fresh_classifier(model: nn.Module) -> None:
    """Record a classifier that the pretrained weights do not have, which timm leaves random."""
    count = as_integer(getattr(model, "num_classes", None))
    stored = as_integer((getattr(model, "pretrained_cfg", None) or {}).get("num_classes"))
    if count and stored is not None and count != stored:
        record_fresh(model, f"the pretrained weights have {stored} classes, not {count}")


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed PyTorch's CPU generator for the block, then restore its state.

    The generator is that of the whole process, so that models are built one after the other.
    """
    with _building, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _split_spec(spec: str) -> tuple[str, str] | None:
    """Split `file.py:function`; return None if `spec` names no Python file."""
    file, _, function = spec.rpartition(":")
    if file.endswith(".py"):
        return file, function
    return (spec, "") if spec.endswith(".py") else None


def _from_file(spec: str, chosen: dict[str, int]) -> nn.Module:
    file, function = _split_spec(spec) or ("", "")
    path = user_path(file)
    if not path.is_file():
        raise InvalidArgument(f"model: {spec!r}: there is no file {file}")
    if not function:
        raise InvalidArgument(f"model must be {file}:FUNCTION, got {spec!r} without a function")
    module = _import_file(path)
    build = getattr(module, function, None)
    if not callable(build):
        names = [
            name
            for name, value in vars(module).items()
            if callable(value) and getattr(value, "__module__", None) == module.__name__
        ]
        raise InvalidArgument(
            f"model: {file} defines no function {function!r}, only {listed(names) or 'none'}"
            f"{did_you_mean(function, names)}"
        )
    accepted = _accepted(build, spec, chosen)
    try:
        model = build(**accepted)
    except SystemExit as error:  # it would end the command as if its work were done
        raise InvalidArgument(f"model: {spec!r} must return a module, got an exit") from error
    if not isinstance(model, nn.Module):
        raise InvalidArgument(
            f"model: {spec!r} must return a torch.nn.Module, got {type(model).__name__}"
        )
    return model


def _import_file(path: Path) -> ModuleType:
    """Import `path` under a private name, with its folder on `sys.path` during the import."""
    resolved = path.resolve()
    name = "_fastsal_model_" + Digest().text(str(resolved)).hexdigest()[:16]
    spec = importlib.util.spec_from_file_location(name, resolved)
    if spec is None or spec.loader is None:
        raise InvalidArgument(f"model: {path} cannot be imported as a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    folder = str(resolved.parent)
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, (ImportError, SyntaxError, SystemExit)):
            raise InvalidArgument(
                f"model: {path} cannot be imported ({type(error).__name__}: {first_line(error)})"
            ) from error
        raise
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)
    return module


def import_definition(spec: str, folder: str | os.PathLike[str] = "") -> None:
    """Import the file of a model, if there is one, as it may register a criterion.

    Args:
        spec: As for `load_model`.
        folder: Folder that the path of the file is relative to.
    """
    file, _ = _split_spec(spec) or ("", "")
    path = Path(folder) / user_path(file)
    if file and path.is_file():
        with _building:
            _import_file(path)


def _accepted(build: Callable[..., Any], spec: str, chosen: dict[str, int]) -> dict[str, int]:
    parameters = inspect.signature(build).parameters
    various = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = [
        name
        for name, p in parameters.items()
        if p.default is p.empty and p.kind not in various and name not in chosen
    ]
    if required:
        raise InvalidArgument(
            f"model: {spec!r} must need no arguments, got a function that needs {listed(required)}"
        )
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return chosen
    for name, value in chosen.items():
        if name not in parameters:
            raise InvalidArgument(
                f"{name} must be None for {spec!r}, whose arguments are "
                f"{listed(list(parameters)) or 'none'}, got {value}"
            )
    return chosen


def _from_timm(spec: str, pretrained: bool, chosen: dict[str, int]) -> nn.Module:
    import timm

    name = _timm_name(spec)
    source = name.rpartition(":")[0]
    try:
        create: Any = timm.create_model  # its keywords are typed for other uses
        model = create(name, pretrained=pretrained, **chosen)
    except Exception as error:
        if isinstance(error, RuntimeError) and not source:
            if not timm.is_model(name):
                raise InvalidArgument(
                    f"{_kinds(spec)}{did_you_mean(name, timm.list_models())}"
                ) from None
            if str(error).startswith(("Invalid pretrained tag", "No pretrained")):
                raise InvalidArgument(f"model: {spec!r}: {first_line(error)}") from None
        if source or pretrained:
            raise _not_loaded(spec, source, error) from error
        raise
    assert isinstance(model, nn.Module)
    return model


def _timm_name(spec: str) -> str:
    """Return a name as `timm.create_model` takes it: of its registry, or with a source.

    The Hub has timm's own models as `timm/NAME`; they are built from the registry, without access
    to the Hub.

    Raises:
        InvalidArgument: The source is unknown, or a name or a folder is missing.
    """
    import timm

    source, colon, name = spec.partition(":")
    if not colon:
        source, name = "", spec
    source = source.replace("_", "-").lower()
    own = name.removeprefix("timm/")
    if own != name and source in ("", "hf-hub") and _is_registered(own):
        return own
    if source == "local-dir":
        folder = user_path(name)
        if not (folder / "config.json").is_file():
            raise InvalidArgument(
                f"model: {spec!r}: there is no folder {folder} with a config.json"
            )
        return f"local-dir:{folder}"
    owner, slash, short = name.partition("/")
    is_id = bool(owner and slash and short)
    if source == "hf-hub" and is_id:
        return f"hf-hub:{name}"
    if not source and not slash:
        return name
    hint = f"; did you mean 'hf-hub:{name}'?" if not source and is_id and owner != "timm" else ""
    near = did_you_mean(own, timm.list_models()) if own != name else hint
    raise InvalidArgument(f"{_kinds(spec)}{near}")


def _is_registered(name: str) -> bool:
    """Whether timm's registry has a name, which may have a tag of pretrained weights."""
    import timm

    model, _, tag = name.partition(".")
    return bool(timm.is_model(model)) and (not tag or name in timm.list_pretrained(f"{model}.*"))


def _kinds(spec: str) -> str:
    return f"model must be a timm name, hf-hub:OWNER/NAME or path/file.py:function, got {spec!r}"


def _not_loaded(spec: str, source: str, error: Exception) -> FastsalError:
    """Return the error of a model or of weights that cannot be read from the Hub."""
    kind = type(error).__name__
    if kind in _ABSENT:
        return InvalidArgument(
            f"model: {spec!r}: {_ABSENT[kind]}; pass another name, or a file of weights"
        )
    what = f"model: {spec!r}" if source else f"weights: the pretrained weights of {spec!r}"
    if _is_network_error(error):
        return FastsalError(
            f"{what} cannot be downloaded ({kind}: {first_line(error)}); check the connection, or "
            "pass a .safetensors or .pth file of weights with a timm name"
        )
    return FastsalError(f"{what} cannot be loaded ({kind}: {first_line(error)})")


# Errors of huggingface_hub by their names, as it may be missing.
_ABSENT = {
    "RepositoryNotFoundError": "the Hugging Face Hub has no such model, or it is private (log in "
    "with `hf auth login`)",
    "GatedRepoError": "its owner restricts access (ask for it on the Hugging Face Hub, and log in "
    "with `hf auth login`)",
    "RevisionNotFoundError": "the Hugging Face Hub has no such revision of it",
    "RemoteEntryNotFoundError": "it has no configuration or weights in timm's format",
    "EntryNotFoundError": "it has no configuration or weights in timm's format",
    "HFValidationError": "the Hugging Face Hub has no such names; they are OWNER/NAME",
}


def _is_network_error(error: BaseException) -> bool:
    roots = ("huggingface_hub", "httpx", "requests", "urllib3", "urllib", "http", "ssl", "socket")
    return isinstance(error, OSError) or type(error).__module__.split(".")[0].startswith(roots)
