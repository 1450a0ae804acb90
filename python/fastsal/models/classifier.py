"""The classifier of a model: its layers and its number of classes.

`head=` comes first, then what the model declares with `get_classifier()`, then the layer that
produces the output in a traced forward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastsal.errors import InvalidArgument
from fastsal.models.evaluating import evaluating, to_model
from fastsal.models.inputs import example_images
from fastsal.models.output_layers import output_layers
from fastsal.models.outputs import output_tensor
from fastsal.models.wrappers import unwrapped
from fastsal.utils.numbers import as_integer
from fastsal.utils.suggestions import did_you_mean

# Model to the names of its head inside `using_head`.
_CHOSEN: WeakKeyDictionary[nn.Module, list[str]] = WeakKeyDictionary()
# Model to its modules when it was traced, and the names of the layers that produce its output.
_TRACED: WeakKeyDictionary[nn.Module, tuple[list[int], list[str]]] = WeakKeyDictionary()


def class_count(model: nn.Module, images: Tensor | None = None) -> int | None:
    """Return the number of classes that `model` predicts, or None if it cannot be determined.

    Read from `num_classes`, from timm's `get_classifier()`, or from the outputs of `model`.

    Args:
        model: Any module.
        images: `[n, c, h, w]`, of which one runs if the model declares nothing. With None the
            classes are the outputs of its classifier, see `find_head`.
    """
    model = unwrapped(model)
    asks = callable(getattr(model, "get_classifier", None))
    if not asks or images is None or declares_head(model):
        number = as_integer(getattr(model, "num_classes", None))
        if number is not None and number > 0:
            return number
        classifier = model.get_classifier() if asks else None  # type: ignore[operator]
        if isinstance(classifier, nn.Linear):
            return classifier.out_features
    if images is None:
        layers = classifier_of(model)
        is_one = len(layers) == 1 and isinstance(layers[0], nn.Linear)
        return int(layers[0].out_features) if is_one else None  # type: ignore[arg-type]
    try:
        with evaluating(model), torch.no_grad():
            found = output_tensor(model(to_model(images[:1], model)))
    except Exception:  # the run that follows fails in the same way, and says why
        return None
    return found.shape[1] if found.dim() == 2 else None


def classifier_of(model: nn.Module, images: Tensor | None = None) -> list[nn.Module]:
    """Return the layers of a model's classifier; an empty list if it has none."""
    try:
        return find_head(model, images)
    except InvalidArgument:
        return []


def find_head(model: nn.Module, images: Tensor | None = None) -> list[nn.Module]:
    """Return the layers of the classifier.

    Args:
        model: Any module.
        images: `[n, ...]`, of which two run once to find the layer that produces the output, unless
            the model declares its classifier. None makes up images; if the model does not accept
            them, the classifier is the last `Linear` that is defined.

    Raises:
        InvalidArgument: The model has no classifier.
    """
    model = unwrapped(model)
    if chosen := _CHOSEN.get(model):
        return [model.get_submodule(name) for name in chosen]
    if declares_head(model):
        return _declared_head(model)
    traced = trace_head(model, images)
    if traced:
        return traced
    for module in model.modules():  # the model may declare nothing, and a module of it its head
        if declares_head(module):
            return _declared_head(module)
    linear: list[nn.Module] = [m for m in model.modules() if isinstance(m, nn.Linear)]
    if not linear:
        raise InvalidArgument(
            f"train_head must be True for {type(model).__name__}, which has neither "
            "get_classifier() nor a Linear layer; freeze its head by name, with frozen"
        )
    if traced is not None:
        raise InvalidArgument(
            f"head must name the classifier of {type(model).__name__}, as no linear layer alone "
            "produces its output"
        )
    return linear[-1:]


def chosen_head(model: nn.Module) -> list[nn.Module]:
    """Return the layers that `using_head` chose; empty outside of it."""
    model = unwrapped(model)
    return [model.get_submodule(name) for name in _CHOSEN.get(model, ())]


@contextlib.contextmanager
def using_head(model: nn.Module, head: str | Sequence[str] | None) -> Iterator[None]:
    """Use the named layers as the classifier of a model inside the block; None changes nothing.

    Raises:
        InvalidArgument: The model has no such layer.
    """
    if head is None:
        yield
        return
    model = unwrapped(model)
    names = [head] if isinstance(head, str) else list(head)
    known = [name for name, _ in model.named_modules() if name]
    for name in names:
        if name not in known:
            raise InvalidArgument(
                f"head must name a layer of the model, got {name!r}{did_you_mean(name, known)}"
            )
    before = _CHOSEN.get(model)
    _CHOSEN[model] = names
    try:
        yield
    finally:
        del _CHOSEN[model]
        if before is not None:
            _CHOSEN[model] = before


def trace_head(model: nn.Module, images: Tensor | None) -> list[nn.Module] | None:
    """Return the layers that produce the output of a model, see `output_layers`.

    A model is traced once. The result is None if it does not run on the images.
    """
    model = unwrapped(model)
    modules = list(map(id, model.modules()))
    known = _TRACED.get(model)
    if known is None or known[0] != modules:
        try:
            some = example_images(model) if images is None else images
            known = modules, output_layers(model, some)
        except Exception:  # whatever a model raises on images that it does not expect
            return None
        _TRACED[model] = known
    return [model.get_submodule(name) for name in known[1]]


def declares_head(model: nn.Module) -> bool:
    """Whether a model has a `get_classifier()` that was written for the `forward` that it runs.

    A class derived from a model of timm may override `forward`, and add a head that the inherited
    `get_classifier()` does not know.
    """
    model = unwrapped(model)
    if not callable(getattr(model, "get_classifier", None)) or "forward" in vars(model):
        return False
    for base in type(model).__mro__:
        if "get_classifier" in vars(base) or base.__module__.startswith("timm."):
            return True
        if "forward" in vars(base):
            return False
    return False


def _declared_head(model: nn.Module) -> list[nn.Module]:
    found = model.get_classifier()  # type: ignore[operator]
    return list(found) if isinstance(found, (tuple, list)) else [found]
