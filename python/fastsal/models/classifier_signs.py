"""Signs that the outputs of a model are not trained logits: it has no classifier, or a random one.

A cross-entropy of features is a number like any other, and so is that of a classifier with random
weights. Statistics, accuracies and limits that rest on it mean nothing for the images.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastsal.models.classifier import classifier_of
from fastsal.models.evaluating import evaluating, to_model
from fastsal.models.hooks import hooked
from fastsal.models.wrappers import unwrapped
from fastsal.utils.numbers import as_integer
from fastsal.utils.warn import warn_user

# What to do, by what the classifier is used for.
CURES = {
    "statistics": "prune by features, which need no classifier and no labels "
    "(curvature='features', --curvature features)",
    "accuracy": "fit a classifier to the features (fastsal.fit_heads, fastsal transfer)",
    "training": "pass loss=, a function of what the model returns, or a model with a classifier",
}
_FRESH_CURES = CURES | {"training": "train it too (train_head=True, --train-head)"}


@dataclass(frozen=True)
class _Fresh:
    """Why a classifier has random weights, and these weights."""

    why: str
    weights: list[Tensor]


_fresh: weakref.WeakKeyDictionary[nn.Module, _Fresh] = weakref.WeakKeyDictionary()


def record_fresh(model: nn.Module, why: str) -> None:
    """Record that the classifier of a model has random weights."""
    weights = [p.detach().clone() for module in classifier_of(model) for p in module.parameters()]
    if weights:
        _fresh[model] = _Fresh(why, weights)


def check_classifier(model: nn.Module, use: str, images: Tensor | None = None) -> bool:
    """Warn if the outputs of a model are features, or logits of a random classifier.

    Args:
        model: The model, whose outputs are used as logits.
        use: What for, a key of `CURES`.
        images: Images `[n, ...]`; the first one runs through the model, to see what its outputs
            are if it does not say so. None relies on what it says.

    Returns:
        Whether there was a warning.
    """
    model = unwrapped(model)
    if lacks_classifier(model, images):
        warn_user(
            f"model: {type(model).__name__} has no classifier, so that its outputs are features "
            f"and not logits of classes; {CURES[use]}"
        )
        return True
    why = fresh_classifier(model)
    if why is not None:
        warn_user(
            f"model: the classifier of {type(model).__name__} is random: {why}; {_FRESH_CURES[use]}"
        )
    return why is not None


def fresh_classifier(model: nn.Module) -> str | None:
    """Return why the classifier of a model has random weights; None once it was trained."""
    model = unwrapped(model)
    found = _fresh.get(model)
    if found is None:
        return None
    now = [p.detach() for module in classifier_of(model) for p in module.parameters()]
    is_same = len(now) == len(found.weights) and all(
        a.shape == b.shape and torch.equal(a.cpu().to(b.dtype), b)
        for a, b in zip(now, found.weights, strict=True)
    )
    return found.why if is_same else None


def lacks_classifier(model: nn.Module, images: Tensor | None = None) -> bool:
    """Return whether the outputs of a model are features.

    They are if `get_classifier()`, as timm's models have it, has no weights. Of a model that names
    no number of classes, they are features if the last layer with weights, in the order in which
    layers run, is a normalization.
    """
    model = unwrapped(model)
    number = as_integer(getattr(model, "num_classes", None))
    if number is not None and callable(getattr(model, "get_classifier", None)):
        return not any(any(True for _ in m.parameters()) for m in classifier_of(model))
    if number or images is None:
        return number == 0
    return _ends_with_normalization(model, images)


def _ends_with_normalization(model: nn.Module, images: Tensor) -> bool:
    last: list[nn.Module] = []

    def hook(module: nn.Module, _: object) -> None:
        last[:] = [module]

    leaves = [m for m in model.modules() if not any(True for _ in m.children())]
    layers = [m for m in leaves if any(True for _ in m.parameters(recurse=False))]
    if not layers:
        return False
    with hooked(layer.register_forward_pre_hook(hook) for layer in layers):
        image = to_model(images[:1].detach(), model)
        with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
            model(image)
    return bool(last) and "norm" in type(last[0]).__name__.lower()
