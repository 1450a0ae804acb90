"""A device that is not the CPU, on a machine without a GPU.

PyTorch accepts devices that are written in Python. This one computes on the CPU, but is as strict
as a GPU: tensors of two devices do not mix, its memory cannot be read from the CPU, and, as on
Apple's GPU, there is no float64. The interface is experimental, so that it may be missing.
"""

from __future__ import annotations

from functools import partial

import torch
from torch.utils._pytree import tree_map

from fastsal.utils.float64 import WITHOUT_FLOAT64

NAME = "pretended"
# Operations that may get tensors of the CPU: copies between devices, and indices.
_MIXED = ("aten::_copy_from", "aten::index", "aten::index_put_", "aten::_index_put_impl_")
# Views that PyTorch would make from the strides of a tensor, which are not those of its values.
_VIEWS = (
    *("t", "transpose.int", "permute", "slice.Tensor", "select.int", "expand", "unfold"),
    *("unsqueeze", "squeeze", "squeeze.dim", "squeeze.dims", "diagonal", "unbind.int"),
    *("split.Tensor", "split_with_sizes"),
)
_libraries: list[torch.library.Library] = []
_values: dict[int, torch.Tensor] = {}


def is_supported() -> bool:
    """Whether this version of PyTorch can have such a device."""
    try:
        from torch.utils.backend_registration import (  # noqa: F401
            _setup_privateuseone_for_python_backend,
        )
    except ImportError:
        return False
    return hasattr(torch._C, "_acc") and hasattr(torch._C._acc, "create_empty_tensor")


def register() -> torch.device:
    """Make the device known to this process, once; returns it."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    if not _libraries:
        WITHOUT_FLOAT64.add(NAME)
        _setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
        _libraries.append(torch.library.Library("_", "IMPL"))
        _libraries[0].fallback(_run, "PrivateUse1")
        _libraries.append(torch.library.Library("aten", "IMPL"))
        for name in _VIEWS:
            op = getattr(torch.ops.aten, name.partition(".")[0])
            op = getattr(op, name.partition(".")[2] or "default")
            _libraries[1].impl(name, partial(_run, op), "PrivateUse1")
        for name in ("convolution", "convolution_backward"):
            op = getattr(torch.ops.aten, name)
            named = f"{name}_overrideable"
            _libraries[1].impl(named, _convolution(op), "PrivateUse1")
    return torch.device(NAME, 0)


class _Backend:
    """What PyTorch asks the module of a device for."""

    def is_initialized(self):
        return True

    def is_available(self):
        return True

    def current_device(self):
        return 0

    def device_count(self):
        return 1

    def _is_in_bad_fork(self):
        return False

    def manual_seed_all(self, seed):
        pass

    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]


def _convolution(op):
    def run(*args):
        if op is torch.ops.aten.convolution_backward:  # without the sizes of the bias
            *start, mask = args
            inner = [*start[:3], [start[1].shape[1]], *start[3:]]
            bias = [inner[0].shape[1]]
            return _run(op.default, *inner[:3], bias, *start[3:], mask)
        return _run(op.default, *args)

    return run


def _is_here(value) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == NAME


def _wrap(raw):
    if raw.dtype is torch.float64:
        raise RuntimeError(f"{NAME} has no float64")
    found = torch._C._acc.create_empty_tensor(tuple(raw.shape), raw.dtype)
    # By its storage, which other tensors of the same memory share.
    _values[found.untyped_storage()._cdata] = raw
    return found


def _raw(tensor):
    """Return the values of a tensor, which may have another form than what made its memory."""
    found = _values[tensor.untyped_storage()._cdata]
    if tensor.shape == found.shape and tensor.is_contiguous():
        return found
    return found.contiguous().as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def address(tensor, data_ptr=torch.Tensor.data_ptr) -> int:
    """Return `data_ptr()`, which differs between tensors of the device too."""
    return _raw(tensor).data_ptr() if _is_here(tensor) else data_ptr(tensor)


def _run(op, *args, **kwargs):
    name = op.name().partition(".")[0]

    here: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def unwrapped(value):
        if _is_here(value):
            raw = _raw(value)
            here[id(raw)] = (raw, value)
            return raw
        if isinstance(value, torch.Tensor) and value.dim() and name not in _MIXED:
            raise RuntimeError(f"{name}: tensors must be on one device, got {NAME} and cpu")
        if isinstance(value, torch.device) and value.type == NAME:
            return torch.device("cpu")
        return value

    if name == "aten::_copy_from":
        source, target = args[:2]
        unwrapped(target).copy_(unwrapped(source))
        return target
    given, options = tree_map(unwrapped, (args, kwargs))
    options.pop("pin_memory", None)
    # A number in place of a tensor comes without the tensor that PyTorch made of it.
    given = tuple(
        torch.tensor(value)
        if str(wanted.type) == "Tensor" and isinstance(value, (int, float))
        else value
        for value, wanted in zip(given, op._schema.arguments, strict=False)
    )
    # Of memory that looks contiguous from outside.
    if name == "aten::as_strided":
        given = (given[0].contiguous(), *given[1:])
    if name == "aten::view" and not isinstance(given[1], torch.dtype):
        out = given[0].reshape(given[1])
    else:
        out = op(*given, **options)
    for raw, value in here.values():
        if value.shape != raw.shape:  # `out` of another size
            value.data = _wrap(raw)
    # All tensors look contiguous from outside.
    is_view = any(result.alias_info is not None for result in op._schema.returns)

    def wrapped(value):
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) in here:
            return here[id(value)][1]
        return _wrap(value if is_view else value.contiguous())

    return tree_map(wrapped, out)
