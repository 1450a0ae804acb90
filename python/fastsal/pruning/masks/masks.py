"""Masks: which weights are kept, applied, proven and stored.

True = kept. On file a mask is packed bits with the recipe that made it and a digest, so that a
file of another model, a truncated or a changed one is refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastsal.errors import FileFormatError, InvalidArgument, MaskError
from fastsal.pruning.masks.hold import hold
from fastsal.utils.atomic import atomic_path

_FORMAT = "fastsal.Masks"
_VERSION = 1
# What DistributedDataParallel, averaged models and torch.compile put before ordinary names.
_WRAPPED = re.compile(r"^(module\.|_orig_mod\.)+|(?<=\.)_orig_mod\.")


class Masks(Mapping[str, Tensor]):
    """Name to boolean tensor of the parameter's shape, True = kept.

    Args:
        masks: Name to mask; boolean, or any type with zeros for pruned weights.
        recipe: How they came about; anything that JSON holds.

    Raises:
        InvalidArgument: There is no mask, or one is empty.
    """

    def __init__(
        self, masks: Mapping[str, Tensor], recipe: Mapping[str, Any] | None = None
    ) -> None:
        if not masks:
            raise InvalidArgument("masks: is empty; takes name to boolean tensor")
        self._masks = {n: torch.as_tensor(m).detach().cpu().bool() for n, m in masks.items()}
        empty = [name for name, m in self._masks.items() if m.numel() == 0]
        if empty:
            raise InvalidArgument(f"masks: {empty[0]!r} is empty; takes the parameter's shape")
        self.recipe: dict[str, Any] = dict(recipe or {})

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __repr__(self) -> str:
        return (
            f"Masks({len(self)} parameters, {sum(self.kept.values()):,} of {self.total:,} weights "
            f"kept, sparsity {self.sparsity:.4f})"
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Masks) or self.shapes != other.shapes:
            return False
        return all(torch.equal(self[name], other[name]) for name in self)

    __hash__ = None  # type: ignore[assignment]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name to shape."""
        return {name: tuple(m.shape) for name, m in self._masks.items()}

    @property
    def kept(self) -> dict[str, int]:
        """Name to number of kept weights."""
        return {name: int(m.sum()) for name, m in self._masks.items()}

    @property
    def total(self) -> int:
        """Number of weights, kept and pruned."""
        return sum(m.numel() for m in self._masks.values())

    @property
    def sparsity(self) -> float:
        """Fraction of weights that are pruned."""
        return 1 - sum(self.kept.values()) / self.total

    def apply(self, model: nn.Module) -> None:
        """Set the pruned weights of a model to zero, in place.

        Raises:
            MaskError: The model lacks a parameter or has it in another shape; nothing is changed.
        """
        parameters = self.parameters(model)
        with torch.no_grad():
            for name, parameter in parameters.items():
                # Not a product: zero times infinity is not zero.
                parameter.masked_fill_(~self[name].to(parameter.device), 0)

    def verify(self, model: nn.Module) -> None:
        """Prove that every pruned weight of a model is exactly zero.

        Raises:
            MaskError: Some are not (names the parameter and counts them), or the model does not
                fit the masks.
        """
        for name, parameter in self.parameters(model).items():
            alive = (parameter.detach() != 0) & ~self[name].to(parameter.device)
            count = int(alive.sum())
            if count:
                at = [int(i) for i in alive.nonzero()[0]]
                raise MaskError(
                    f"model: {count} pruned weights of {name!r} are not zero, the first at {at}"
                )

    def hold(
        self, model: nn.Module, optimizer: Optimizer | Iterable[Optimizer] | None = None
    ) -> AbstractContextManager[None]:
        """Keep the pruned weights of a model zero while it is trained, inside a `with` block.

        When the block begins the model is masked, and so are its gradients and the optimiser's
        state. Inside it gradients of pruned weights are zero, so that clipping and loss scaling do
        not see them, and weights are zeroed about every step and after `load_state_dict`. When it
        ends nothing is left on the model, on success and on an error, and the zeros are proven.

        Parameters keep their names and types: a `state_dict` is an ordinary one. A copy that is
        made inside the block, by `copy.deepcopy` or for an average, has its zeros and is not held:
        averages of zeros are zero, but an optimiser of its own may move them. An average that began
        before the model was masked forgets dense weights as slowly as it forgets all others.
        `load_state_dict(assign=True)` gives the model other parameters: begin another block then.

        Args:
            model: The model, or what wraps it: `torch.compile`, `DistributedDataParallel`.
            optimizer: What trains it: one or several. None holds gradients and what is loaded
                only, which is enough for an optimiser that starts inside the block and moves
                each weight by its own gradients.

        Raises:
            MaskError: The masks are of another model. At the end: something else wrote to pruned
                weights (they are zero again); the training has seen them.
            InvalidArgument: The optimiser holds none of the masked parameters.
        """
        return hold(self, model, optimizer)

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return the parameters of a model that these masks are of, by the masks' names.

        The model may be wrapped, by `torch.compile`, `DistributedDataParallel` or an average: the
        prefixes `_orig_mod.` and `module.` do not count where a name is not there with them.

        Raises:
            MaskError: The model lacks a parameter or has it in another shape.
        """
        owned = dict(model.named_parameters(remove_duplicate=False))
        plain = {_WRAPPED.sub("", name): p for name, p in owned.items()}
        found = {}
        for name, shape in self.shapes.items():
            parameter = owned.get(name, plain.get(_WRAPPED.sub("", name)))
            if parameter is None:
                raise MaskError(
                    f"model: has no parameter {name!r}; these masks are of another model"
                )
            if tuple(parameter.shape) != shape:
                raise MaskError(
                    f"model: parameter {name!r} has shape {tuple(parameter.shape)}, its mask "
                    f"{shape}; these masks are of another model"
                )
            found[name] = parameter
        return found

    def save(self, path: str | os.PathLike[str], recipe: Mapping[str, Any] | None = None) -> None:
        """Write packed bits and the recipe to a safetensors file, whole or not at all.

        Args:
            path: The file.
            recipe: Added to `self.recipe`.
        """
        from safetensors.numpy import save_file

        bits = {name: np.packbits(m.reshape(-1).numpy()) for name, m in self._masks.items()}
        header = {
            "format": _FORMAT,
            "version": _VERSION,
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            # As it will be read back, which the digest is of.
            "recipe": json.loads(json.dumps({**self.recipe, **(recipe or {})})),
        }
        header["digest"] = _digest(header, bits)
        with atomic_path(path) as temporary:
            save_file(bits, temporary, metadata={"fastsal": json.dumps(header)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Masks:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            FileFormatError: It is truncated, tampered with, or something else.
        """
        from safetensors import SafetensorError, safe_open

        shown = repr(os.fspath(path))
        if not os.path.isfile(path):
            raise FileNotFoundError(f"path: there is no file {shown}")
        try:
            with safe_open(os.fspath(path), framework="np") as file:
                header = json.loads((file.metadata() or {}).get("fastsal", "{}"))
                if header.get("format") != _FORMAT or header.get("version") != _VERSION:
                    raise FileFormatError(
                        f"path: {shown} holds no masks of version {_VERSION} of this format"
                    )
                shapes = header["shapes"]
                bits = {name: file.get_tensor(name) for name in shapes}
                if set(file.keys()) != set(shapes) or _digest(header, bits) != header["digest"]:
                    raise FileFormatError(f"path: {shown} was changed after it was written")
        except FileFormatError:
            raise
        except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise FileFormatError(f"path: {shown} cannot be read as masks: {error}") from error
        masks = {}
        for name, shape in shapes.items():
            flat = np.unpackbits(bits[name], count=math.prod(shape))
            masks[name] = torch.from_numpy(flat.astype(bool)).reshape(shape)
        return cls(masks, header["recipe"])


def _digest(header: Mapping[str, Any], bits: Mapping[str, Any]) -> str:
    """SHA-256 of shapes, recipe and bits."""
    told = json.dumps([header["shapes"], header["recipe"]], sort_keys=True)
    digest = hashlib.sha256(told.encode())
    for name in sorted(bits):
        digest.update(name.encode() + b"\0" + np.ascontiguousarray(bits[name]).tobytes())
    return digest.hexdigest()
