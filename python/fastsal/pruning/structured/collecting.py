"""Statistics of the layers that consume units: moments of inputs, curvature of outputs.

The curvature of the outputs of a layer, `G = E[Σ_t g_t g_tᵀ]`, has the gradients `g_t` of matching
the model's own features at position t. With it, errors of different layers are in one unit: what
they change of the features.

Axes: n images, O outputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastsal.data.batches import Batches, Pair, as_batches
from fastsal.errors import InvalidArgument
from fastsal.gradients.losses import check_images, draw_noise, feature_matching
from fastsal.gradients.state import frozen
from fastsal.models.evaluating import differentiable, drop_kept, input_of, to_model
from fastsal.models.features import feature_outputs, find_feature_layer
from fastsal.models.hooks import hooked
from fastsal.pruning.structured.activations import Moments, input_rows
from fastsal.utils.float64 import in_float64
from fastsal.utils.progress import Report
from fastsal.utils.sizes import gib

# Images that the curvature of outputs is averaged over.
CURVATURE_SAMPLES = 256
# Images of one pass: the graph of a pass and patches of convolutions are kept meanwhile.
_IMAGES = 16


@dataclass
class Statistics:
    """Statistics of a layer that consumes units.

    Attributes:
        inputs: Moments of its inputs.
        curvature: Curvature G of its outputs `[O, O]`, float64; None if it was not collected.
    """

    inputs: Moments
    curvature: Tensor | None = None


def collect_statistics(
    model: nn.Module,
    names: Sequence[str],
    batches: Batches,
    samples: int | None,
    *,
    curvature: set[str],
    seed: int,
    report: Report | None = None,
) -> tuple[dict[str, Statistics], int]:
    """Collect the statistics of layers in one pass over images.

    Args:
        model: The model; it runs in evaluation mode.
        names: Names of layers.
        batches: Images, or pairs whose labels are ignored.
        samples: Number of images; None for all.
        curvature: Names of those layers whose curvature is collected, on the first images.
        seed: Seed of the noise of the features.
        report: Called with the images done and in total.

    Returns:
        Name to statistics, and the number of images.
    """
    layers = {name: model.get_submodule(name) for name in names}
    found = {name: Statistics(Moments(_flat(layer).shape[1])) for name, layer in layers.items()}
    for name in curvature:
        outputs = len(_flat(layers[name]))
        found[name].curvature = torch.zeros(outputs, outputs, dtype=torch.float64, device="cpu")
    noise = torch.Generator().manual_seed(seed)
    done = curved = 0
    # Gradients of outputs are enough, none of parameters.
    with frozen(model), _nothing_kept(model), _observing(layers, found), torch.no_grad():
        for images in _parts(as_batches(batches, samples, "ignored")):
            if not done:
                check_images(images)
                find_feature_layer(model, images)
            moved = to_model(images, model)
            if curvature and curved < CURVATURE_SAMPLES:
                with differentiable(), _gradients(layers, curvature, found):
                    f = feature_outputs(model, moved)
                    if f.requires_grad:
                        feature_matching(f, draw_noise(f, noise)).sum().backward()  # type: ignore[no-untyped-call]
                curved += len(images)
            else:
                feature_outputs(model, moved)
            done += len(images)
            if report is not None:
                report(done, samples)
    for name, statistics in found.items():
        if not statistics.inputs.count:
            raise InvalidArgument(f"model: {name!r} does not contribute to the features")
        if statistics.curvature is not None:
            statistics.curvature /= curved
    return found, done


def in_passes(model: nn.Module, names: Sequence[str], room: int | None) -> list[list[str]]:
    """Divide layers into groups whose statistics fit into memory together.

    Args:
        model: The model.
        names: Names of layers.
        room: Bytes of the statistics, and of the scores of one layer; None for no limit.

    Raises:
        InvalidArgument: The statistics of one layer do not fit.
    """
    if room is None:
        return [list(names)]
    found: list[list[str]] = [[]]
    used = 0
    for name in names:
        outputs, columns = _flat(model.get_submodule(name)).shape
        own, working = 8 * (columns**2 + outputs**2), 8 * 4 * columns**2
        if own + working > room:
            raise InvalidArgument(
                f"memory_budget must be at least {gib(own + working)} for {name!r}, got {gib(room)}"
            )
        if found[-1] and used + own + working > room:
            found.append([])
            used = 0
        found[-1].append(name)
        used += own
    return found


def _flat(layer: nn.Module) -> Tensor:
    """Return the weight of a layer, `[O, D]`."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight.flatten(1)


def _parts(pairs: Iterator[Pair]) -> Iterator[Tensor]:
    for images, _ in pairs:
        for start in range(0, len(images), _IMAGES):
            yield images[start : start + _IMAGES]


@contextlib.contextmanager
def _observing(layers: dict[str, nn.Module], found: dict[str, Statistics]) -> Iterator[None]:
    """Add the inputs of layers to their moments."""

    def observe(name: str) -> Callable[..., None]:
        def add(layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            with torch.no_grad():
                found[name].inputs.add(input_rows(layer, input_of(given, named)))

        return add

    with hooked(
        layer.register_forward_pre_hook(observe(name), with_kwargs=True)
        for name, layer in layers.items()
    ):
        yield


@contextlib.contextmanager
def _gradients(
    layers: dict[str, nn.Module], names: set[str], found: dict[str, Statistics]
) -> Iterator[None]:
    """Add the gradients at the outputs of layers to their curvature."""

    def observe(name: str) -> Callable[..., Tensor]:
        def add(gradient: Tensor) -> None:
            is_last = isinstance(layers[name], nn.Linear)
            g = gradient.detach() if is_last else gradient.detach().movedim(1, -1)
            g = g.reshape(-1, g.shape[-1]).float()
            product = in_float64((g.T @ g).cpu())
            total = found[name].curvature
            assert total is not None
            total += product

        def hook(_: nn.Module, __: object, result: Tensor) -> Tensor:
            if not result.requires_grad:
                # The graph starts at the first of the layers. What follows may change its output
                # in place, which autograd forbids for the start itself.
                result = result.requires_grad_().clone()
            result.register_hook(add)  # type: ignore[no-untyped-call]
            return result

        return hook

    with hooked(layers[name].register_forward_hook(observe(name)) for name in names):
        yield


@contextlib.contextmanager
def _nothing_kept(model: nn.Module) -> Iterator[None]:
    """Drop values that evaluation has kept, before and after: they may have a graph."""
    drop_kept(model)
    try:
        yield
    finally:
        drop_kept(model)
