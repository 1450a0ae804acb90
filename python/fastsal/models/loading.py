"""Models by name or from a file, their weights on disk, and the images that they take."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib.util
import inspect
import os
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastsal.errors import FastsalError, FileFormatError, InvalidArgument
from fastsal.utils.atomic import atomic_path

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt")
_NAMED = 5  # keys that a message names before it counts the rest


@dataclass(frozen=True)
class InputSpec:
    """What a model takes: images `[n, channels, *size]`, normalised by `mean` and `std`.

    Attributes:
        channels: 1 for grey, 3 for RGB.
        size: `(height, width)` in pixels; None takes images as they are.
        mean: one value a channel, on the scale where white is 1.
        std: one value a channel, the same scale.
        interpolation: "bicubic", "bilinear" or "nearest", for resizing.
    """

    channels: int
    size: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"


def load_model(
    spec: str,
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    in_chans: int | None = None,
    seed: int = 0,
) -> nn.Module:
    """Build a model and fill in its weights.

    Args:
        spec: a timm model name, or `path/file.py:function`, a function that returns a module.
        weights: None for random weights, "pretrained" for timm's, or a `.safetensors`, `.pth` or
            `.pt` file.
        num_classes: outputs of the classifier; None leaves the model's own number.
        in_chans: channels of the images; None leaves the model's own number.
        seed: of the random weights. The global random state is left as found.

    Returns:
        The model, in evaluation mode, on the CPU.

    Raises:
        InvalidArgument: an unknown model, or an argument that the model's function does not take.
        FileFormatError: the weights cannot be read or do not fit the model.
        FastsalError: pretrained weights cannot be fetched.
    """
    for name, value in (("num_classes", num_classes), ("in_chans", in_chans)):
        if value is not None and value < 1:
            raise InvalidArgument(f"{name}: got {value}; takes 1 or more, or None")
    chosen = {
        name: value
        for name, value in (("num_classes", num_classes), ("in_chans", in_chans))
        if value is not None
    }
    pretrained = isinstance(weights, str) and weights == "pretrained"
    if weights is not None and not pretrained:
        _check_weights_path(Path(weights))
    with _seeded(seed):
        if ".py" in spec and _split_spec(spec):
            if pretrained:
                raise InvalidArgument(
                    f"weights: 'pretrained' is for timm names; {spec!r} is a file: give a path"
                )
            model = _from_file(spec, chosen)
        else:
            model = _from_timm(spec, pretrained, chosen)
    if weights is not None and not pretrained:
        load_weights(model, weights)
    return model.eval()


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Fill `model` in place from a file. Everything is checked first: all tensors, or none.

    Args:
        model: the module to fill.
        path: a `.safetensors`, `.pth` or `.pt` file: a state dict, bare or under "state_dict" or
            "model". A "module." prefix is dropped. Only tensors are read, never code.

    Raises:
        FileFormatError: the file cannot be read, or names or shapes do not fit the model.
    """
    state = read_weights(path)
    own = model.state_dict()
    _fill_aliases(state, own)
    problems = _misfits(state, own)
    if problems:
        hint = _class_hint(model, state, own)
        raise FileFormatError(
            f"weights: {path} does not fit the model: {'; '.join(problems)}{hint}"
        )
    for name, _ in model.named_parameters():
        if not bool(torch.isfinite(state[name]).all()):
            raise FileFormatError(f"weights: {path} holds NaN or infinity in {name!r}")
    model.load_state_dict(state, strict=True)


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a state dict from a file, see `load_weights`.

    Returns:
        Tensors on the CPU, by name.

    Raises:
        FileFormatError: the file is missing, damaged, or holds something else.
    """
    path = Path(path)
    _check_weights_path(path)
    if path.suffix == ".safetensors":
        loaded: Any = _read_safetensors(path)
    else:
        loaded = read_pickle(path, "weights", "an undamaged state dict, without other objects")
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
            f"weights: {path} holds no state dict; takes a dict from names to tensors, "
            "bare or under 'state_dict' or 'model'"
        )
    if all(name.startswith("module.") for name in loaded):
        loaded = {name.removeprefix("module."): value for name, value in loaded.items()}
    return dict(loaded)


def read_pickle(path: Path, argument: str, takes: str) -> Any:
    """Read what `torch.save` wrote: tensors, containers and numbers, never code.

    Raises:
        FileFormatError: the file is missing, damaged, or holds something else; the message names
            `argument` and what it takes.
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
            f"{argument}: {path} cannot be read as plain tensors ({why}); takes {takes}"
        ) from None


def save_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the state dict of `model` as plain safetensors under its ordinary names.

    A tensor that stands under several names is written once; `load_weights` knows them again.
    The file appears whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    from safetensors.torch import save_model

    with atomic_path(path) as temporary:
        save_model(model, str(temporary), metadata={"format": "pt"})


def input_spec(
    model: nn.Module,
    *,
    channels: int | None = None,
    size: int | tuple[int, int] | Literal["native"] | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
) -> InputSpec:
    """Say what images `model` takes.

    A timm model, or one with a `pretrained_cfg` or `default_cfg`, brings its own size, mean and
    std. Any other takes ImageNet's mean and std and images of their native size.

    Args:
        model: the module.
        channels: overrides the number read from its first convolution.
        size: overrides the size in pixels: one number, `(height, width)`, or "native".
        mean: overrides the mean: one value, or one a channel.
        std: overrides the standard deviation: one value, or one a channel.

    Raises:
        InvalidArgument: a value is out of range, or the model takes one size only and `size`
            is another.
    """
    own_size, own_mean, own_std, interpolation, fixed = _own_config(model)
    channels = channels if channels is not None else _channels(model)
    chosen = _parse_size(size, own_size)
    if fixed and own_size is not None and chosen != own_size:
        came = "native" if chosen is None else f"{chosen[0]}x{chosen[1]}"
        raise InvalidArgument(
            f"size: got {came}; this model takes {own_size[0]}x{own_size[1]} only"
        )
    spec = InputSpec(
        channels=channels,
        size=chosen,
        mean=_per_channel("mean", mean, own_mean, channels),
        std=_per_channel("std", std, own_std, channels),
        interpolation=interpolation,
    )
    if min(spec.std) <= 0:
        raise InvalidArgument(f"std: got {spec.std}; takes positive values")
    return spec


def class_count(model: nn.Module) -> int | None:
    """Return the number of classes that `model` puts out, or None where it cannot be known.

    Read from `num_classes`, from timm's `get_classifier()`, or from the last layer with weights
    if that is a `Linear`.
    """
    number = getattr(model, "num_classes", None)
    if isinstance(number, int) and number > 0:
        return number
    if callable(getattr(model, "get_classifier", None)):
        classifier = model.get_classifier()  # type: ignore[operator]
        if isinstance(classifier, nn.Linear):
            return classifier.out_features
    leaves = [m for m in model.modules() if any(True for _ in m.parameters(recurse=False))]
    if leaves and isinstance(leaves[-1], nn.Linear):
        return leaves[-1].out_features
    return None


# ---------------------------------------------------------------------------------- building


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator inside the block; restore its state after."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _split_spec(spec: str) -> tuple[str, str] | None:
    """Split `file.py:function`; None if `spec` is no file."""
    file, _, function = spec.rpartition(":")
    if file.endswith(".py"):
        return file, function
    return (spec, "") if spec.endswith(".py") else None


def _from_file(spec: str, chosen: dict[str, int]) -> nn.Module:
    file, function = _split_spec(spec) or ("", "")
    path = Path(file).expanduser()
    if not path.is_file():
        raise InvalidArgument(f"model: {spec!r}: there is no file {file}")
    if not function:
        raise InvalidArgument(f"model: {spec!r} names no function; takes {file}:FUNCTION")
    module = _import_file(path)
    build = getattr(module, function, None)
    if not callable(build):
        names = [
            name
            for name, value in vars(module).items()
            if callable(value) and getattr(value, "__module__", None) == module.__name__
        ]
        raise InvalidArgument(
            f"model: {spec!r}: {file} defines no function {function!r}"
            f"{_close(function, names) or '; it defines ' + _few(names)}"
        )
    model = build(**_accepted(build, spec, chosen))
    if not isinstance(model, nn.Module):
        raise InvalidArgument(
            f"model: {spec!r} returned {type(model).__name__}; takes a torch.nn.Module"
        )
    return model


def _import_file(path: Path) -> ModuleType:
    """Import `path` under a private name; its folder can be imported from meanwhile."""
    resolved = path.resolve()
    name = "_fastsal_model_" + hashlib.sha256(str(resolved).encode()).hexdigest()[:16]
    spec = importlib.util.spec_from_file_location(name, resolved)
    if spec is None or spec.loader is None:
        raise InvalidArgument(f"model: {path} cannot be imported as a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    folder = str(resolved.parent)
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)
    return module


def _accepted(build: Callable[..., Any], spec: str, chosen: dict[str, int]) -> dict[str, int]:
    parameters = inspect.signature(build).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return chosen
    for name, value in chosen.items():
        if name not in parameters:
            raise InvalidArgument(
                f"{name}: got {value}, but {spec!r} has no such argument; it takes "
                f"{_few(list(parameters)) or 'none'}"
            )
    return chosen


def _from_timm(name: str, pretrained: bool, chosen: dict[str, int]) -> nn.Module:
    import timm

    try:
        create: Any = timm.create_model  # its keywords are typed for other uses
        model = create(name, pretrained=pretrained, **chosen)
    except RuntimeError as error:
        known = timm.list_models()
        if not timm.is_model(name):
            raise InvalidArgument(
                f"model: timm knows no model {name!r}{_close(name, known)}; "
                "takes a timm name or path/file.py:function"
            ) from None
        if str(error).startswith(("Invalid pretrained tag", "No pretrained")):
            raise InvalidArgument(f"model: {name!r}: {error}") from None
        raise
    except Exception as error:
        if pretrained and _is_network_error(error):
            raise FastsalError(
                f"weights: the pretrained weights of {name!r} cannot be fetched "
                f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}); "
                "check the connection, or give a .safetensors or .pth file"
            ) from error
        raise
    assert isinstance(model, nn.Module)
    return model


def _is_network_error(error: BaseException) -> bool:
    roots = {"huggingface_hub", "httpx", "requests", "urllib3", "urllib", "http"}
    return isinstance(error, OSError) or type(error).__module__.split(".")[0] in roots


# ----------------------------------------------------------------------------------- weights


def _check_weights_path(path: Path) -> None:
    if path.suffix not in WEIGHT_SUFFIXES:
        raise InvalidArgument(
            f"weights: got {str(path)!r}; takes 'pretrained' or a file that ends in "
            f"{', '.join(WEIGHT_SUFFIXES)}"
        )
    if not path.is_file():
        raise InvalidArgument(f"weights: there is no file {path}")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(str(path)))
    except SafetensorError as error:
        raise FileFormatError(f"weights: {path} is no whole safetensors file ({error})") from None


def _fill_aliases(state: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    """Give missing names of a shared tensor the value of the name that is there.

    Batch counters (`num_batches_tracked`), which old files lack, keep the model's own value.
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
    """List in words how `state` differs from `own`; empty if it fits."""
    missing = [name for name in own if name not in state]
    extra = [name for name in state if name not in own]
    shapes = [
        f"{name} {list(state[name].shape)} (the model's: {list(own[name].shape)})"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    kinds = [
        f"{name} {state[name].dtype} (the model's: {own[name].dtype})"
        for name in own
        if name in state and state[name].is_floating_point() != own[name].is_floating_point()
    ]
    problems = []
    if missing:
        problems.append(f"{len(missing)} missing: {_few(missing)}{_close(missing[0], extra)}")
    if extra:
        problems.append(f"{len(extra)} unexpected: {_few(extra)}{_close(extra[0], missing)}")
    if shapes:
        problems.append(f"{len(shapes)} of another shape: {_few(shapes)}")
    if kinds:
        problems.append(f"{len(kinds)} of another type: {_few(kinds)}")
    return problems


def _class_hint(model: nn.Module, state: dict[str, Tensor], own: dict[str, Tensor]) -> str:
    """Point to `num_classes` when the classifier alone differs."""
    count = class_count(model)
    wrong = [n for n in own if n in state and state[n].shape != own[n].shape]
    if count is None or not wrong or set(own) != set(state):
        return ""
    if any(own[n].shape[:1] != (count,) for n in wrong):
        return ""
    return f". The file's classifier has {state[wrong[0]].shape[0]} classes: give num_classes"


def _few(names: Sequence[str]) -> str:
    rest = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _close(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f" (close to {name!r}: {', '.join(near)})" if near else ""


# ------------------------------------------------------------------------------------- input

_Config = tuple[
    tuple[int, int] | None, tuple[float, ...], tuple[float, ...], str, bool
]  # size, mean, std, interpolation, whether the size is the only one


def _own_config(model: nn.Module) -> _Config:
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if not config:
        return None, IMAGENET_MEAN, IMAGENET_STD, "bicubic", False
    import timm.data

    resolve: Any = getattr(timm.data, "resolve_model_data_config")  # noqa: B009 - untyped
    own = getattr(model, "pretrained_cfg", None)
    resolved = resolve(model) if own else resolve(model, pretrained_cfg=dict(config))
    height, width = resolved["input_size"][-2:]
    interpolation = resolved["interpolation"]
    if interpolation not in ("bicubic", "bilinear", "nearest"):
        interpolation = "bicubic"
    get = config.get if hasattr(config, "get") else lambda key: getattr(config, key, None)
    fixed = bool(get("fixed_input_size")) and not getattr(model, "dynamic_img_size", False)
    patches = getattr(model, "patch_embed", None)
    built = getattr(patches, "img_size", None)
    if fixed and isinstance(built, tuple) and len(built) == 2:
        height, width = built
    size = (int(height), int(width))
    return size, tuple(resolved["mean"]), tuple(resolved["std"]), interpolation, fixed


def _channels(model: nn.Module) -> int:
    for module in model.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            return module.in_channels
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    shape = config.get("input_size") if isinstance(config, dict) else None
    return int(shape[0]) if shape else 3


def _parse_size(size: object, own: tuple[int, int] | None) -> tuple[int, int] | None:
    if size is None:
        return own
    if size == "native":
        return None
    pair = (size, size) if isinstance(size, int) else size
    if (
        not isinstance(pair, (tuple, list))
        or len(pair) != 2
        or not all(isinstance(v, int) and v > 0 for v in pair)
    ):
        raise InvalidArgument(
            f"size: got {size!r}; takes pixels, (height, width), 'native' or None"
        )
    return pair[0], pair[1]


def _per_channel(
    name: str, given: float | Sequence[float] | None, own: Sequence[float], channels: int
) -> tuple[float, ...]:
    if given is None:
        if len(own) == channels:
            return tuple(float(v) for v in own)
        if channels == 1 or len(own) == 1:
            return (sum(own) / len(own),) * channels
        raise InvalidArgument(
            f"{name}: the model takes {channels} channels and its {name} has {len(own)} values; "
            f"give {name}"
        )
    values = [given] if isinstance(given, (int, float)) else list(given)
    if len(values) == 1:
        values = values * channels
    if len(values) != channels:
        raise InvalidArgument(
            f"{name}: got {len(values)} values; takes one, or one for each of {channels} channels"
        )
    return tuple(float(v) for v in values)
