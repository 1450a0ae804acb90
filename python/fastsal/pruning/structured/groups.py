"""Groups of units: the slices of tensors that are removed together.

A unit is a hidden neuron of an MLP, a head of attention or a hidden channel. Its weights are rows
of the layers that produce it, entries of what acts on it alone (batch normalization, depthwise
convolution), and columns of the layers that consume it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastsal.models.evaluating import drop_kept
from fastsal.models.widths import record_widths, widths_of, with_widths
from fastsal.utils.interrupts import uninterrupted

# Why nothing is cut of what only the code of a model makes: at its original size.
NOT_IN_FILES = "{!r} has its units, and is a buffer that is not stored in files"


@dataclass(frozen=True)
class Slice:
    """The places of the units in one tensor.

    Attributes:
        module: Name of the module.
        tensor: Name of its parameter or buffer.
        axis: Axis that has the units.
        index: Places of unit j on the axis, `[m, places]`.
    """

    module: str
    tensor: str
    axis: int
    index: Tensor

    @property
    def name(self) -> str:
        """Qualified name of the tensor."""
        return f"{self.module}.{self.tensor}" if self.module else self.tensor


@dataclass(frozen=True)
class Number:
    """A number of a module that counts places of units, such as `out_features`.

    Attributes:
        module: Name of the module.
        attribute: Name of the number.
        each: Places of one unit.
    """

    module: str
    attribute: str
    each: int = 1


@dataclass(frozen=True)
class Group:
    """Units that can be removed one by one.

    Attributes:
        name: Name of the layer that produces them, or of the attention.
        units: Number m of units.
        producers: Names of the layers that produce them.
        consumers: Names of the layers that consume them, the first is the one that is scored by.
        slices: All places of the units.
        numbers: Numbers of modules to adjust.
        kind: `"mlp"`, `"heads"` or `"channels"`.
    """

    name: str
    units: int
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    slices: tuple[Slice, ...]
    numbers: tuple[Number, ...]
    kind: str

    def kept_columns(self, consumer: nn.Module, kept: Tensor) -> Tensor:
        """Return the columns of the flat weight `[O, D]` of a consumer that units have, sorted."""
        weight: Tensor = consumer.weight  # type: ignore[assignment]
        c = weight[0].numel() // self.units
        return (kept[:, None] * c + torch.arange(c, device="cpu")).flatten()


def tensor_of(model: nn.Module, part: Slice) -> Tensor:
    """Return the parameter or buffer of a slice."""
    found = getattr(model.get_submodule(part.module), part.tensor)
    assert isinstance(found, Tensor)
    return found


def is_temporary(module: nn.Module, tensor: str) -> bool:
    """Whether a buffer of a module is none of its state, and so in no file."""
    return tensor in module._non_persistent_buffers_set


def cut(model: nn.Module, cuts: Iterable[tuple[Group, Tensor]]) -> None:
    """Remove units from a model, in place, and record its widths.

    Parameters keep their identity; their gradients are dropped.

    Args:
        model: The model.
        cuts: Groups and the units to keep, sorted, int64.
    """
    changes: dict[str, dict[str, int]] = {}
    drop_kept(model)
    with torch.no_grad():
        for group, kept in cuts:
            for part in group.slices:
                tensor = tensor_of(model, part)
                places = part.index[kept].flatten().sort().values.to(tensor.device)
                tensor.grad = None
                tensor.data = tensor.data.index_select(part.axis, places).contiguous()
            for number in group.numbers:
                value = len(kept) * number.each
                setattr(model.get_submodule(number.module), number.attribute, value)
                changes.setdefault(number.module, {})[number.attribute] = value
    record_widths(model, with_widths(model, changes))


def silence(model: nn.Module, cuts: Iterable[tuple[Group, Tensor]]) -> None:
    """Set the consumers' weights of all units but those to keep to zero, in place.

    So the units are as if they were zero, at the size that the model has.
    """
    drop_kept(model)
    with torch.no_grad():
        for group, kept in cuts:
            for name in group.consumers:
                consumer = model.get_submodule(name)
                weight: Tensor = consumer.weight  # type: ignore[assignment]
                # In a format of its own: weights may be stored with the channels last.
                flat = weight.data.clone(memory_format=torch.contiguous_format)
                flat = flat.view(len(weight), -1)
                gone = torch.ones(flat.shape[1], dtype=torch.bool, device="cpu")
                gone[group.kept_columns(consumer, kept)] = False
                flat[:, gone.to(flat.device)] = 0
                weight.data = flat.view_as(weight)


@contextmanager
def restored(model: nn.Module, *, on_error_only: bool = False) -> Iterator[None]:
    """Give a model its tensors and numbers back at the end of the block.

    For blocks that replace the data of tensors, as `cut` and `silence` do, and change no values in
    place.

    Args:
        model: The model.
        on_error_only: Whether changes are kept unless the block raises.
    """
    tensors = [(t, t.data, t.grad) for t in [*model.parameters(), *model.buffers()]]
    numbers = [(module, _numbers_of(module)) for module in model.modules()]
    widths = widths_of(model)

    def restore() -> None:
        for tensor, data, gradient in tensors:
            if tensor.data.data_ptr() != data.data_ptr() or tensor.shape != data.shape:
                tensor.data = data
                tensor.grad = gradient
        for module, before in numbers:
            for key in _numbers_of(module).keys() - before.keys():
                if hasattr(type(module), key):  # the number of the class is back without it
                    delattr(module, key)
            for key, value in before.items():
                setattr(module, key, value)
        record_widths(model, widths)
        drop_kept(model)

    try:
        yield
    except BaseException:
        with uninterrupted():
            restore()
        raise
    if not on_error_only:
        with uninterrupted():
            restore()


def _numbers_of(module: nn.Module) -> dict[str, int]:
    """Return the numbers of a module itself, not those of its class."""
    return {key: value for key, value in vars(module).items() if type(value) is int}


def names_of(groups: Sequence[Group]) -> list[str]:
    """Return the names of all consumers, each once."""
    return list(dict.fromkeys(name for group in groups for name in group.consumers))
