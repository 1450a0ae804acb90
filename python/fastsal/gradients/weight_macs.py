"""Count the multiply-accumulates of weights, from the calls of one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

from torch import Tensor, nn

from fastsal.gradients.capture import Interception
from fastsal.gradients.rules.operations import Call, Operation
from fastsal.gradients.state import PrivateRandomness, frozen, replaced
from fastsal.models.evaluating import (
    differentiable,
    first_layer_parameter,
    pair_of,
    plain_call,
    to_model,
)
from fastsal.models.inputs import example_images
from fastsal.models.wrappers import unwrapped

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def weight_macs(model: nn.Module, images: Tensor | None = None) -> dict[str, int]:
    """Return how many multiply-accumulates each weight of a layer takes part in, for one image.

    They are those of linear layers and convolutions: one for each output position, pixel or token,
    of a channel. Of an embedding, a normalization or a bias there are none, and products of
    activations, such as those of attention, have no weight.

    Args:
        model: Any module; its modes and flags are restored. Of a wrapper, that inside.
        images: `[n, ...]`, normalized; two run through the model. None makes them up.

    Returns:
        Name of every parameter with two or more axes to the multiply-accumulates of one weight.
        Their sum over all weights is the number of the model.

    Raises:
        Exception: Whatever the model raises on these images.
    """
    model = unwrapped(model)
    own = {name: p for name, p in model.named_parameters() if p.ndim > 1 and p.is_floating_point()}
    first = first_layer_parameter(model)
    with (
        differentiable(),  # without gradients, attention of PyTorch is one call on all its weights
        frozen(model),
        PrivateRandomness(first.device).active(keep=False),
    ):
        some = example_images(model) if images is None else images
        pair = to_model(pair_of(some), model)
        copies = {name: p.detach().requires_grad_() for name, p in own.items()}
        counts = _Counts(copies)
        with replaced(model, own, copies), _layers_counted(model, counts), counts:
            plain_call(model, pair)
    return {name: counts.of(name) // 2 for name in own}


class _Counts(Interception):
    """Counts the positions of calls on weights, and of the layers that own them."""

    def __init__(self, tracked: Mapping[str, Tensor]) -> None:
        super().__init__(tracked)
        self._by_calls: dict[str, int] = {}
        self._by_layers: dict[str, int] = {}

    def around(
        self, name: str, operation: Operation, call: Call, run: Callable[[], Tensor]
    ) -> Tensor:
        """Count a call on a weight itself."""
        result = run()
        if operation.name != "embedding":
            places = result.numel() // call.weight_shape[0]
            self._by_calls[name] = self._by_calls.get(name, 0) + places
        return result

    def add_layer(self, name: str, places: int) -> None:
        """Count a call of a layer, whose weight may be computed from the parameter."""
        self._by_layers[name] = self._by_layers.get(name, 0) + places

    def of(self, name: str) -> int:
        """Return the positions of a weight: those of its calls or, without any, of its layer."""
        return self._by_calls.get(name) or self._by_layers.get(name, 0)


@contextmanager
def _layers_counted(model: nn.Module, counts: _Counts) -> Iterator[None]:
    """Count the calls of linear layers and convolutions while the block runs."""

    def hook(
        prefix: str,
        layer: nn.Module,
        given: tuple[Tensor, ...],
        named: dict[str, Tensor],
        result: Tensor,
    ) -> None:
        weight: Tensor = layer.weight  # type: ignore[assignment]
        # A transposed convolution uses each weight once for each position of its input.
        ends = (*given, *named.values())[0] if isinstance(layer, _TRANSPOSED) else result
        places = ends.numel() // max(1, weight.shape[0])
        matrices = {n: p for n, p in layer.named_parameters() if p.ndim > 1}
        # Of a parametrized layer it is the parameter that the weight is computed from; that of a
        # weight normalization comes after the norms.
        names = [n for n, p in matrices.items() if p.numel() == weight.numel()]
        if names:
            counts.add_layer(prefix + ("weight" if "weight" in names else names[-1]), places)

    with ExitStack() as stack:
        for name, layer in model.named_modules():
            if isinstance(layer, (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED)):
                own = partial(hook, f"{name}." if name else "")
                handle = layer.register_forward_hook(own, with_kwargs=True)
                stack.callback(handle.remove)
        yield
