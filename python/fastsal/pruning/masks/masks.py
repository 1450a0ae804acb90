"""Masks: the weights that are kept. They are applied to models, verified, and stored.

A file holds packed bits, the recipe that the masks were made with, and a digest, so that truncated
and modified files are detected.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastsal.errors import FileFormatError, InvalidArgument, MaskError
from fastsal.models.wrappers import renamed, unwrapped
from fastsal.pruning.masks.hold import Pruned, hold
from fastsal.pruning.masks.in_use import InUse, count_in_use
from fastsal.pruning.masks.patterns import broken_groups
from fastsal.utils.atomic import atomic_path
from fastsal.utils.booleans import boolean
from fastsal.utils.digests import Digest
from fastsal.utils.paths import user_path
from fastsal.utils.safetensors_files import header_of, metadata_of
from fastsal.utils.warn import warn_user

_FORMAT = "fastsal.Masks"
_VERSION = 1


class Masks(Mapping[str, Tensor]):
    """Masks of a model: a mapping from parameter name to boolean tensor, True = kept.

    Args:
        masks: Name to mask of the parameter's shape: boolean, or numbers with zero for pruned
            weights. Masks are copied to the CPU.
        recipe: How the masks were made, as values that JSON can hold. It is stored with them.
        copy: Whether boolean masks on the CPU are copied too. False shares their memory, for masks
            that nothing else changes.

    Attributes:
        recipe: As above.

    Raises:
        InvalidArgument: There is no mask, or one is empty.
    """

    def __init__(
        self,
        masks: Mapping[str, Tensor],
        recipe: Mapping[str, Any] | None = None,
        *,
        copy: bool = True,
    ) -> None:
        if not masks:
            raise InvalidArgument("masks must hold at least one parameter, got none")
        self._masks = {name: _boolean(mask, copy=copy) for name, mask in masks.items()}
        empty = [name for name, m in self._masks.items() if m.numel() == 0]
        if empty:
            raise InvalidArgument(f"masks must not be empty, got {empty[0]!r} without elements")
        self.recipe: dict[str, Any] = deepcopy(dict(recipe or {}))

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
        """Parameter name to shape."""
        return {name: tuple(m.shape) for name, m in self._masks.items()}

    @property
    def kept(self) -> dict[str, int]:
        """Parameter name to number of kept weights."""
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

        Args:
            model: A model with the masked parameters, or a wrapper of it.

        Raises:
            MaskError: The model lacks a parameter or has it in another shape. The model is
                unchanged.
        """
        parameters = self.parameters(model)
        with torch.no_grad():
            for name, parameter in parameters.items():
                # Not a product: zero times infinity is not zero.
                parameter.masked_fill_(~self[name].to(parameter.device), 0)

    def verify(self, model: nn.Module, images: Tensor | None = None) -> None:
        """Check that every pruned weight of a model is exactly zero, and that the pattern holds.

        Args:
            model: A model with the masked parameters, or a wrapper of it.
            images: Images for `in_use`; None makes them up.

        Raises:
            MaskError: Some are not (the message names the parameter and counts them), groups of
                the masks break the pattern of the recipe, or the model lacks a parameter or has it
                in another shape.

        Warns:
            UserWarning: Layers compute their weights from masked parameters, so that the weights in
                use have fewer zeros.
        """
        self.check(model)
        found = self.in_use(model, images)
        if found is not None and found.computed:
            warn_user(f"{found}; the masks have sparsity {self.sparsity:.4f}")

    def in_use(self, model: nn.Module, images: Tensor | None = None) -> InUse | None:
        """Count the zeros of the weights that layers use, which may differ from the parameters.

        A layer with weight standardization, for one, computes its weight from the parameter. Such
        layers are found in one forward pass, which runs only if a masked parameter is not simply
        the weight of a layer of PyTorch.

        Args:
            model: A model with the masked parameters, or a wrapper of it.
            images: `[n, ...]` as the model expects them; None makes them up.

        Returns:
            The sparsity in use and the parameters that it differs for; None if that is not known,
            as the model does not run on these images.
        """
        return count_in_use(self, self.parameters(model), model, images)

    def check(self, model: nn.Module) -> None:
        """Check zeros and pattern as `verify` does, without a look at the weights in use.

        Raises:
            MaskError: As `verify`.
        """
        for name, count in broken_groups(self, self.recipe).items():
            raise MaskError(
                f"masks: {count} groups of {name!r} break the pattern {self.recipe['pattern']!r}"
            )
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
        """Keep the pruned weights of a model at zero during training, inside a `with` block.

        At the start of the block the model, its gradients and the optimizer state are masked.
        Inside the block the gradients of pruned weights are zero, so that clipping and loss scaling
        ignore them, and pruned weights are zeroed before and after every step and after
        `load_state_dict`. At the end, also after an error, all hooks are removed; without an error
        the zeros are verified.

        Names and types of parameters do not change, so a `state_dict` has its ordinary form. A copy
        made inside the block (`copy.deepcopy`, an average) starts with the zeros but is not held:
        averages of zeros remain zero, but another optimizer may change them. An average that began
        before the model was masked forgets the dense weights only gradually.
        `load_state_dict(assign=True)` replaces the parameters; start another block after it.

        Args:
            model: The model, or a wrapper: `torch.compile`, `DistributedDataParallel`.
            optimizer: The optimizer or optimizers of the model, or wrappers of them, such as those
                that `accelerate` and Lightning Fabric return. None holds only gradients and
                loaded values, which is enough for an optimizer that is created inside the block and
                updates each weight by its own gradients.

        Raises:
            MaskError: The model lacks a masked parameter or has it in another shape. At the end of
                the block: something else wrote to pruned weights during training (they are zero
                again).
            InvalidArgument: The optimizer holds none of the masked parameters.
        """
        return hold(self._pruned(model), model, optimizer, lambda: self.check(model))

    def _pruned(self, model: nn.Module) -> Pruned:
        """Invert the masks; a parameter with two names is pruned where either mask says so."""
        pruned: dict[nn.Parameter, Tensor] = {}
        for name, p in self.parameters(model).items():
            where = ~self[name].to(p.device)
            pruned[p] = pruned[p] | where if p in pruned else where
        return pruned

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return the masked parameters of a model, by the names of the masks.

        Args:
            model: The model, or a wrapper (`torch.compile`, `DistributedDataParallel`, an averaged
                model). Segments that wrappers add to names, such as `_orig_mod.` and `module.`, are
                ignored where the model has no such name.

        Raises:
            MaskError: The model lacks a parameter or has it in another shape.
        """
        owned = dict(unwrapped(model).named_parameters(remove_duplicate=False))
        names = renamed(self, owned)
        found = {}
        for name, shape in self.shapes.items():
            if name not in names:
                raise MaskError(
                    f"model has no parameter {name!r}; the masks belong to another model"
                )
            parameter = owned[names[name]]
            if tuple(parameter.shape) != shape:
                raise MaskError(
                    f"model has parameter {name!r} of shape {tuple(parameter.shape)}, its mask has "
                    f"{shape}; the masks belong to another model"
                )
            found[name] = parameter
        return found

    def save(self, path: str | os.PathLike[str], recipe: Mapping[str, Any] | None = None) -> None:
        """Write the masks as packed bits, and the recipe, to a safetensors file, atomically.

        Args:
            path: The file; an existing one is replaced.
            recipe: Entries to add to `self.recipe` in the file.
        """
        from safetensors.numpy import save_file

        bits = {name: np.packbits(m.reshape(-1).numpy()) for name, m in self._masks.items()}
        header = {
            "format": _FORMAT,
            "version": _VERSION,
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            # In the form in which it is read back, of which the digest is.
            "recipe": json.loads(json.dumps({**self.recipe, **(recipe or {})}, default=_number)),
        }
        header["digest"] = _digest(header, bits)
        with atomic_path(path) as temporary:
            save_file(bits, temporary, metadata=metadata_of(header))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Masks:
        """Read masks from a file that `save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            FileFormatError: The file is truncated, modified, or of another format.
        """
        from safetensors import SafetensorError, safe_open

        path = user_path(path)
        shown = repr(os.fspath(path))
        if not path.is_file():
            raise FileNotFoundError(f"path must be an existing file, got {shown}")
        try:
            with safe_open(os.fspath(path), framework="np") as file:
                header = header_of(file.metadata())
                if header.get("format") != _FORMAT or header.get("version") != _VERSION:
                    raise FileFormatError(
                        f"path must be a masks file of version {_VERSION}, got {shown}"
                    )
                shapes = header["shapes"]
                bits = {name: file.get_tensor(name) for name in shapes}
                # Before memory of the size that the header names is allocated.
                if any(8 * bits[n].size - math.prod(s) not in range(8) for n, s in shapes.items()):
                    raise FileFormatError(f"path: {shown} has bits of other shapes than it says")
                if set(file.keys()) != set(shapes) or _digest(header, bits) != header["digest"]:
                    raise FileFormatError(f"path: {shown} was modified after it was written")
        except FileFormatError:
            raise
        except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise FileFormatError(
                f"path: {shown} is truncated or not a masks file: {error}"
            ) from error
        masks = {}
        for name, shape in shapes.items():
            flat = np.unpackbits(bits[name], count=math.prod(shape))
            masks[name] = torch.from_numpy(flat.astype(bool)).reshape(shape)
        return cls(masks, header["recipe"], copy=False)


def _number(value: Any) -> Any:
    """Return a scalar of NumPy or PyTorch as a number, for JSON."""
    if callable(getattr(value, "item", None)) and getattr(value, "ndim", None) == 0:
        return value.item()
    raise TypeError(f"recipe must hold values that JSON can hold, got {type(value).__name__}")


def _digest(header: Mapping[str, Any], bits: Mapping[str, Any]) -> str:
    """Return the SHA-256 of shapes, recipe and bits."""
    digest = Digest().json([header["shapes"], header["recipe"]])
    for name in sorted(bits):
        digest.text(f"{name}\0").array(bits[name])
    return digest.hexdigest()


def _boolean(mask: Any, *, copy: bool) -> Tensor:
    values = torch.as_tensor(mask, device="cpu").detach()
    return values if not copy and values.dtype == torch.bool else boolean(values)
