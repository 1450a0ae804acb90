"""The classifier of a model: where it is and how many classes it has."""

from __future__ import annotations

from torch import nn

from fastsal.errors import InvalidArgument


def class_count(model: nn.Module) -> int | None:
    """Return the number of classes that `model` puts out, or None where it cannot be known.

    Read from `num_classes`, from timm's `get_classifier()`, or from the last layer with weights
    if that is a `Linear`.
    """
    number = getattr(model, "num_classes", None)
    if isinstance(number, int) and number > 0:
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
    """Return a model's own classifier; nothing where it has none."""
    try:
        return find_head(model)
    except InvalidArgument:
        return []


def find_head(model: nn.Module) -> list[nn.Module]:
    """Return the classifier: what timm's `get_classifier()` gives, else the last `Linear`.

    Raises:
        InvalidArgument: The model has neither.
    """
    for module in model.modules():  # a wrapper has no get_classifier; what it wraps may
        ask = getattr(module, "get_classifier", None)
        if callable(ask):
            found = ask()
            return list(found) if isinstance(found, (tuple, list)) else [found]
    layers: list[nn.Module] = [m for m in model.modules() if isinstance(m, nn.Linear)]
    if not layers:
        raise InvalidArgument(
            f"train_head: {type(model).__name__} has neither get_classifier() nor a Linear, so its "
            "head cannot be told; takes train_head=True, with the head's names in frozen"
        )
    return layers[-1:]
