"""The weights that layers compute from their parameters, as weight standardization does.

A pruned parameter is then no claim about the layer: where the mean of each row is subtracted, zeros
of the parameter are not zeros of the weight in use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastsal.gradients.state import PrivateRandomness, frozen, replaced
from fastsal.models.evaluating import differentiable, first_layer_parameter, pair_of, to_model
from fastsal.models.inputs import example_images
from fastsal.utils.warn import warn_user

# Functions to the position and the name of their weight.
_WEIGHTS: dict[Callable[..., Any], tuple[int, str]] = {
    **dict.fromkeys(
        (
            *(F.linear, F.conv1d, F.conv2d, F.conv3d),
            *(torch.conv1d, torch.conv2d, torch.conv3d),
            *(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
            *(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
        ),
        (1, "weight"),
    ),
    F.bilinear: (2, "weight"),
}
# Products whose weight may be any argument.
_PRODUCTS = {
    *(torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__),
    *(torch.mm, Tensor.mm, torch.bmm, Tensor.bmm, torch.einsum),
    *(torch.addmm, Tensor.addmm, torch.baddbmm, Tensor.baddbmm),
}
# Classes whose forward uses the parameter itself.
_DIRECT = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, nn.MultiheadAttention)
# Fraction of the zeros of a parameter that must be zeros in use, where the sizes differ.
_SURVIVING = 0.9


class Zeros(NamedTuple):
    """Zeros of a weight in use.

    Attributes:
        zeros: Number of zeros.
        weights: Number of weights.
    """

    zeros: int
    weights: int

    @property
    def fraction(self) -> float:
        """Fraction of zeros."""
        return self.zeros / self.weights if self.weights else 0.0


def zeros_in_use(
    model: nn.Module, parameters: Mapping[str, Tensor], images: Tensor | None = None
) -> dict[str, Zeros] | None:
    """Count the zeros of the weights that a model computes from parameters.

    Args:
        model: Any module; its state is restored.
        parameters: Name to values that are used in one forward pass.
        images: `[n, ...]`, of which two are used; None makes them up.

    Returns:
        Name to the zeros of the weight of which the smallest fraction is zero, for parameters from
        which a convolution or a linear map computes its weight. None if that is not known, as the
        model does not run on these images.
    """
    suspects = {name: parameters[name] for name in indirect(model, parameters)}
    if not suspects:
        return {}
    first = first_layer_parameter(model)

    own = dict(model.named_parameters(remove_duplicate=False))
    copies = {name: values.detach().requires_grad_() for name, values in suspects.items()}
    try:
        with (
            frozen(model),
            differentiable(),
            PrivateRandomness(first.device).active(keep=False),
            replaced(model, {name: own[name] for name in copies}, copies),
        ):
            some = example_images(model) if images is None else images
            x = to_model(pair_of(some), model)
            if x.is_floating_point():
                x.requires_grad_()
            with _Uses(copies, x) as uses:
                # Hooks of the user see the passes of the run only; an input may be modified.
                model.forward(x.clone())
            return dict(uses.found)
    except Exception:  # whatever a model raises on images that it does not expect
        return None


def indirect(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return the names of the matrices that are not simply used by a layer of PyTorch."""
    direct = set()
    for module in model.modules():
        if _uses_directly(module):
            direct |= {id(p) for p in module.parameters(recurse=False)}
    every = dict(model.named_parameters(remove_duplicate=False))
    return [n for n in names if n in every and every[n].dim() > 1 and id(every[n]) not in direct]


def _uses_directly(module: nn.Module) -> bool:
    kind = next((kind for kind in _DIRECT if isinstance(module, kind)), None)
    if kind is None or "forward" in vars(module) or module._forward_pre_hooks:
        return False
    return all(
        getattr(type(module), name, None) is getattr(kind, name, None)
        for name in ("forward", "_conv_forward")
    )


def warn_if_computed(
    model: nn.Module, names: Iterable[str], images: Callable[[], Tensor | None]
) -> None:
    """Warn, once, of parameters whose zeros are not zeros of the weights in use.

    Half of the weights of each are set to zero in one forward pass to see whether they stay so.

    Args:
        model: Any module; its weights are not changed.
        names: Names of parameters.
        images: Returns images `[n, ...]`, or None to make them up; called only if needed.
    """
    suspects = indirect(model, names)
    if not suspects:
        return
    every = dict(model.named_parameters(remove_duplicate=False))
    halved = {name: _halved(every[name].detach()) for name in suspects}
    found = zeros_in_use(model, halved, images())
    lost = lost_zeros(halved, found or {})
    if lost:
        layer = lost[0].rpartition(".")[0]
        kind = type(model.get_submodule(layer)).__name__
        several = (
            f"{len(lost)} parameters, such as {lost[0]!r}" if len(lost) > 1 else f"{lost[0]!r}"
        )
        warn_user(
            f"the weight of {layer or 'the model'!r} ({kind}) is computed from its parameter, and "
            f"zeros of the parameter are not zeros of the weight in use: sparsity of {several} is "
            "not that of the layers; effective_sparsity of the result is"
        )


def lost_zeros(values: Mapping[str, Tensor], found: Mapping[str, Zeros]) -> list[str]:
    """Return the names of the parameters with fewer zeros in use than in their values."""
    lost = []
    for name, in_use in found.items():
        zeros = int((values[name] == 0).sum())
        least = zeros if in_use.weights == values[name].numel() else 0
        fraction = _SURVIVING * zeros / values[name].numel()
        if in_use.zeros < least or in_use.fraction < fraction:
            lost.append(name)
    return lost


def _halved(values: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(values.shape, generator=generator, dtype=torch.float32, device="cpu")
    zero = draws < 0.5
    return values.masked_fill(zero.to(values.device), 0)


class _Uses(TorchFunctionMode):
    """Finds the weights of convolutions and linear maps that depend on parameters alone.

    Args:
        tracked: Name to parameter, a leaf that requires gradients.
        images: The input of the model.

    Attributes:
        found: Name to the zeros of a weight in use that is computed from the parameter.
    """

    def __init__(self, tracked: Mapping[str, Tensor], images: Tensor) -> None:
        super().__init__()
        self._tracked = dict(tracked)
        self._names = {id(value): name for name, value in tracked.items()}
        self._images = images
        self.found: dict[str, Zeros] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run one torch function, and note its weight."""
        del types
        kwargs = dict(kwargs or {})
        for weight in self._weights(func, args, kwargs):
            self._note(weight)
        return func(*args, **kwargs)

    def _weights(
        self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Iterator[Tensor]:
        if func in _WEIGHTS:
            position, name = _WEIGHTS[func]
            value = args[position] if len(args) > position else kwargs.get(name)
            if isinstance(value, Tensor):
                yield value
        # Data of token ids has no leaf, so that weights cannot be told from data.
        elif func in _PRODUCTS and self._images.is_floating_point():
            for value in (*args, *kwargs.values()):
                items = value if isinstance(value, (list, tuple)) else (value,)
                yield from (x for x in items if isinstance(x, Tensor))

    def _note(self, weight: Tensor) -> None:
        if not weight.requires_grad or weight.grad_fn is None or weight.dim() < 2:
            return
        leaves = _leaves(weight.grad_fn)
        if id(self._images) in leaves:
            return
        for name in {self._names[leaf] for leaf in leaves if leaf in self._names}:
            if _memory(weight) == _memory(self._tracked[name]):
                continue  # a view
            zeros = Zeros(int((weight.detach() == 0).sum()), weight.numel())
            known = self.found.get(name)
            if known is None or zeros.fraction < known.fraction:
                self.found[name] = zeros


def _leaves(node: Any) -> set[int]:
    """Return the identities of the leaves that a node of the graph depends on."""
    found = set()
    seen, waiting = {node}, [node]
    while waiting:
        current = waiting.pop()
        leaf = getattr(current, "variable", None)
        if leaf is not None:
            found.add(id(leaf))
        fresh = {child for child, _ in current.next_functions if child is not None} - seen
        seen |= fresh
        waiting += fresh
    return found


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
