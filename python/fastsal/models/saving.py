"""Write the state of a model to a safetensors file, and check beforehand that it can be written.

A safetensors file has tensors only, none of which may share memory. Tensors with several names are
written once, others that share memory are written in full. State that is not a tensor (of
`get_extra_state`) is stored in the metadata of the file, as `torch.save` writes it, and so are the
widths of a model from which units were removed.
"""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastsal.errors import InvalidArgument
from fastsal.models.packed import pack
from fastsal.models.widths import Widths, encoded, widths_of
from fastsal.models.wrappers import unwrapped
from fastsal.utils.atomic import atomic_path
from fastsal.utils.warn import warn_user

_EXTRA = "fastsal.extra_state"


def save_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the state dict of `model` as a safetensors file under its ordinary names.

    A tensor with several names is written once; `load_weights` restores the other names. Of a
    wrapper, the model inside is written. The file is written atomically.

    Raises:
        InvalidArgument: The state dict has a tensor or a name that a safetensors file cannot have;
            `check_savable` finds this beforehand.
        OSError: The file cannot be written.
    """
    from safetensors.torch import save_file

    state = _state_of(model)
    state.check()
    with atomic_path(path) as temporary:
        save_file(state.separate(), str(temporary), metadata=state.metadata())


def save_packed(
    model: nn.Module, path: str | os.PathLike[str], dtype: torch.dtype | None = None
) -> None:
    """Write the state dict of `model` as a packed file, see `fastsal.models.packed`.

    Args:
        model: The model, or a wrapper of it.
        path: The file, written atomically.
        dtype: Type that floating-point tensors are rounded to; None keeps every bit.

    Raises:
        InvalidArgument: The state dict has a tensor or a name that the file cannot have, or a value
            that is infinite in `dtype`.
        OSError: The file cannot be written.
    """
    from safetensors.torch import save_file

    state = _state_of(model)
    state.check()
    tensors = state.separate()
    if dtype is not None:
        tensors = {name: _rounded(name, tensor, dtype) for name, tensor in tensors.items()}
    packed, metadata = pack(tensors)
    with atomic_path(path) as temporary:
        save_file(packed, str(temporary), metadata={**state.metadata(), **metadata})


def _rounded(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor in a type, if it is of real numbers.

    Raises:
        InvalidArgument: A finite value is infinite in that type.
    """
    if not tensor.is_floating_point():
        return tensor
    found = tensor.to(dtype)
    is_infinite = found.isinf()
    if not bool(is_infinite.any()):
        return found
    lost = tensor[is_infinite]
    lost = lost[lost.isfinite()]
    if len(lost):
        raise InvalidArgument(
            f"dtype must be a type that can hold {name!r}, whose values are up to "
            f"{float(lost.abs().max()):.3g}, got {str(dtype).removeprefix('torch.')}"
        )
    return found


def check_savable(model: nn.Module) -> int:
    """Check that `save_weights` can write a model, and return the bytes that it will write.

    Raises:
        InvalidArgument: The state dict has a tensor or a name that a safetensors file cannot have.

    Warns:
        UserWarning: State of a layer cannot be stored without code, and is left out.
    """
    state = _state_of(model)
    state.check()
    left_out = [name for name, value in state.others.items() if _encoded(value) is None]
    if left_out:
        warn_user(
            f"model: the state {left_out[0]!r} is an object that cannot be stored without code; it "
            "is left out of the file, and a model that loads it keeps its own"
        )
    return sum(value.numel() * value.element_size() for value in state.tensors.values())


def tensors_in(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a state dict, which may have other values of `get_extra_state`."""
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def other_state(model: nn.Module, path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the state of a model that is not tensors: as in a file, else as the model has it."""
    from safetensors import SafetensorError, safe_open

    own = _state_of(model).others
    if not own or Path(path).suffix != ".safetensors":
        return own
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            stored = json.loads((file.metadata() or {}).get(_EXTRA, "{}"))
        found = {n: _decoded(stored[n]) for n in own if n in stored}
    except (SafetensorError, ValueError, RuntimeError, OSError, EOFError):
        return own
    return {**own, **found}


@dataclass(frozen=True)
class _State:
    """The state dict of a model, as a file has it.

    Attributes:
        tensors: Name to tensor, each tensor once.
        aliases: Another name of a tensor to its name in `tensors`.
        others: Name to a value that is not a tensor.
        widths: Numbers of layers from which units were removed.
    """

    tensors: dict[str, Tensor]
    aliases: dict[str, str]
    others: dict[str, Any]
    widths: Widths

    def metadata(self) -> dict[str, str]:
        """Return the metadata of the file."""
        stored = {name: _encoded(value) for name, value in self.others.items()}
        stored = {name: text for name, text in stored.items() if text is not None}
        found = {"format": "pt", **self.aliases, **encoded(self.widths)}
        return found | ({_EXTRA: json.dumps(stored)} if stored else {})

    def separate(self) -> dict[str, Tensor]:
        """Return the tensors on the CPU, none of which shares memory with another."""
        seen: set[int] = set()
        found = {}
        for name, value in self.tensors.items():
            plain = value.detach().cpu().contiguous()
            start = plain.untyped_storage().data_ptr()
            found[name] = plain.clone() if start in seen else plain
            seen.add(start)
        return found

    def check(self) -> None:
        """Raise InvalidArgument unless a file can have these names, types and metadata."""
        from safetensors import SafetensorError
        from safetensors.torch import save

        for name, value in self.tensors.items():
            if value.layout != torch.strided or value.is_quantized or value.is_meta:
                kind = "without data" if value.is_meta else "sparse or quantized"
                raise InvalidArgument(
                    f"model: {name!r} must be a dense tensor to be written to a safetensors file, "
                    f"got one that is {kind}"
                )
            if name == "__metadata__":
                raise InvalidArgument(
                    "model: the name '__metadata__' is reserved in safetensors files; rename that "
                    "parameter or buffer"
                )
            try:
                save({name: torch.zeros(1, dtype=value.dtype, device="cpu")})
            except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
                raise InvalidArgument(
                    f"model: {name!r} ({value.dtype}) cannot be written to a safetensors file "
                    f"({type(error).__name__}: {' '.join(str(error).split())})"
                ) from None
        if not self.tensors:
            raise InvalidArgument("model must have parameters or buffers to write, got none")
        try:
            save({"x": torch.zeros(1, dtype=torch.uint8, device="cpu")}, self.metadata())
        except (SafetensorError, ValueError, TypeError) as error:
            raise InvalidArgument(
                f"model: the state of its layers cannot be written to a safetensors file ({error})"
            ) from None


def _state_of(model: nn.Module) -> _State:
    model = unwrapped(model)
    state = model.state_dict()
    groups: dict[Any, list[str]] = {}
    for name, value in tensors_in(state).items():
        place: Any = name  # of a tensor that shares no memory
        if value.layout == torch.strided and value.numel() and not value.is_meta:
            place = (
                value.device, value.data_ptr(), tuple(value.shape), value.stride(), value.dtype,
            )  # fmt: skip
        groups.setdefault(place, []).append(name)
    chosen = {name: min(names) for names in groups.values() for name in names}
    return _State(
        {name: value for name, value in tensors_in(state).items() if chosen[name] == name},
        {name: first for name, first in chosen.items() if name != first},
        {name: value for name, value in state.items() if not isinstance(value, Tensor)},
        widths_of(model),
    )


def _encoded(value: Any) -> str | None:
    """Return a value as text; None if it cannot be read back without running code."""
    file = io.BytesIO()
    try:
        torch.save(value, file)
        text = base64.b64encode(file.getvalue()).decode()
        _decoded(text)
    except Exception:  # of the value's own code too
        return None
    return text


def _decoded(text: str) -> Any:
    return torch.load(io.BytesIO(base64.b64decode(text)), map_location="cpu", weights_only=True)
