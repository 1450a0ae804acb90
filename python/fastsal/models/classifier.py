"""The classifier of a model: its layers and its number of classes."""

from __future__ import annotations

from torch import nn

from fastsal.errors import InvalidArgument
from fastsal.models.wrappers import unwrapped
from fastsal.utils.numbers import as_integer


def class_count(model: nn.Module) -> int | None:
    """Return the number of classes that `model` predicts, or None if it cannot be determined.

    Read from `num_classes`, from timm's `get_classifier()`, or from the last layer with weights
    if that is a `Linear`.
    """
    model = unwrapped(model)
    number = as_integer(getattr(model, "num_classes", None))
    if number is not None and number > 0:
        return number
    if callable(getattr(model, "get_classifier", None)):
        classifier = model.get_classifier()  # type: ignore[operator]
        if isinstance(classifier, nn.Linear):
            return classifier.out_features
    leaves = [m for m in model.modules() if any(True for _ in m.parameters(recurse=False))]
    if leaves and isinstance(leaves[-1], nn.Linear):
        return leaves[-1].out_features
    return None


def classifier_of(model: nn.Module) -> list[nn.Module]:
    """Return the layers of a model's classifier; an empty list if it has none."""
    try:
        return find_head(model)
    except InvalidArgument:
        return []


def find_head(model: nn.Module) -> list[nn.Module]:
    """Return the layers of the classifier: those of `get_classifier()`, else the last `Linear`.

    Raises:
        InvalidArgument: The model has neither.
    """
    model = unwrapped(model)
    for module in model.modules():  # a module of the user may lack get_classifier
        ask = getattr(module, "get_classifier", None)
        if callable(ask):
            found = ask()
            return list(found) if isinstance(found, (tuple, list)) else [found]
    layers: list[nn.Module] = [m for m in model.modules() if isinstance(m, nn.Linear)]
    if not layers:
        raise InvalidArgument(
            f"train_head must be True for {type(model).__name__}, which has neither "
            "get_classifier() nor a Linear layer; freeze its head by name, with frozen"
        )
    return layers[-1:]
