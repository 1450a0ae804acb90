"""Fit the heads of tasks on the features of the dense backbone.

Axes: n images, f features.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor, nn

from fastsal.data.image_set import ImageSet
from fastsal.errors import DataError, InvalidArgument
from fastsal.models.classifier import using_head
from fastsal.models.evaluating import evaluating
from fastsal.models.features import features
from fastsal.models.inputs import InputSpec, input_spec
from fastsal.models.placing import on_device
from fastsal.transfer.knn import KnnHead, fit_knn
from fastsal.transfer.linear_head import Head
from fastsal.transfer.logistic import solve_probe
from fastsal.transfer.own import Columns, OwnHead, own_head
from fastsal.transfer.ridge import best_scale, solve_ridge
from fastsal.transfer.tasks import Task, as_tasks, batches_of
from fastsal.utils.choices import HEAD_KINDS, HeadKind
from fastsal.utils.numbers import real, whole
from fastsal.utils.suggestions import check_choice
from fastsal.utils.warn import warn_user

if TYPE_CHECKING:
    from fastsal.transfer.head_cache import HeadCache

AnyHead = Head | KnnHead | OwnHead


@overload
def fit_heads(
    model: nn.Module,
    tasks: Task | Iterable[Task],
    *,
    kind: Literal["ridge", "probe"] = "ridge",
    ridge: float = 0.1,
    k: int = 20,
    temperature: float = 0.07,
    l2: float | None = None,
    columns: Columns | None = None,
    spec: InputSpec | None = None,
    batch_size: int = 64,
    cache: HeadCache | str | os.PathLike[str] | None = None,
    seed: int = 0,
    head: str | Sequence[str] | None = None,
    device: str | torch.device | None = None,
) -> dict[str, Head]: ...


@overload
def fit_heads(
    model: nn.Module,
    tasks: Task | Iterable[Task],
    *,
    kind: HeadKind,
    ridge: float = 0.1,
    k: int = 20,
    temperature: float = 0.07,
    l2: float | None = None,
    columns: Columns | None = None,
    spec: InputSpec | None = None,
    batch_size: int = 64,
    cache: HeadCache | str | os.PathLike[str] | None = None,
    seed: int = 0,
    head: str | Sequence[str] | None = None,
    device: str | torch.device | None = None,
) -> dict[str, AnyHead]: ...


def fit_heads(
    model: nn.Module,
    tasks: Task | Iterable[Task],
    *,
    kind: HeadKind = "ridge",
    ridge: float = 0.1,
    k: int = 20,
    temperature: float = 0.07,
    l2: float | None = None,
    columns: Columns | None = None,
    spec: InputSpec | None = None,
    batch_size: int = 64,
    cache: HeadCache | str | os.PathLike[str] | None = None,
    seed: int = 0,
    head: str | Sequence[str] | None = None,
    device: str | torch.device | None = None,
) -> Mapping[str, AnyHead]:
    """Fit one head per task on the features of the dense backbone.

    Args:
        model: Dense backbone; it is not changed.
        tasks: One or more tasks.
        kind: `"ridge"` solves a ridge regression in closed form, `"knn"` is a weighted k-nearest
            neighbor classifier, `"probe"` trains a logistic regression (linear probe), `"own"`
            uses the classifier of the model.
        ridge: For `"ridge"`: α divided by the mean eigenvalue of `X_cᵀ V X_c`, so that the result
            does not depend on the scale of the features; at least 0.
        k: For `"knn"`: number of neighbors, at least 1.
        temperature: For `"knn"`: neighbors are weighted by exp(cosine similarity / temperature);
            above 0.
        l2: For `"probe"`: L2 penalty, see `fastsal.transfer.logistic`; None selects one on held-out
            images.
        columns: For `"own"`: names of all classes of the model in the order of its logits, or
            `{class: index of its logit}`. With None, classes with numbers as names are indices of
            logits, and other classes are all logits in order.
        spec: Preprocessing of the images; None uses `fastsal.input_spec`.
        batch_size: Images per forward pass.
        cache: A folder or a `HeadCache` to load heads from and store them in; None fits each head.
        seed: For `"probe"`: seed of the held-out images.
        head: Name of the layer of the model whose input is the features; None finds it, see
            `fastsal.models.features`.
        device: Device of the forward passes, as for `evaluate`; heads are fitted on the CPU.

    Returns:
        `{task name: head}`.

    Raises:
        InvalidArgument: A number is out of range, the kind is unknown, or two tasks have one name.
        DataError: A class has no images to fit on, or features are not finite.
        FactorizationError: The normal equations are singular (`ridge` of 0).

    Warns:
        UserWarning: A head cannot be stored in `cache`, or a file there is damaged.
    """
    from fastsal.transfer.head_cache import HeadCache, model_digest

    check_choice("kind", kind, HEAD_KINDS)
    ridge = real("ridge", ridge, least=0)
    k = whole("k", k, 1)
    temperature = real("temperature", temperature, above=0)
    l2 = None if l2 is None else real("l2", l2, above=0)
    seed = whole("seed", seed, least=-(2**63))
    found = as_tasks(tasks)
    spec = spec or input_spec(model)
    if kind == "own":
        own: dict[str, AnyHead] = {
            task.name: own_head(model, task, spec, columns) for task in found
        }
        return own
    if columns is not None:
        raise InvalidArgument(f"columns must be None for kind {kind!r}; only 'own' uses it")
    settings: dict[str, object] = {
        "ridge": {"ridge": ridge},
        "knn": {"k": k, "temperature": temperature},
        "probe": {"l2": l2, "seed": seed if l2 is None else None},
    }[kind]  # type: ignore[assignment]
    if head is not None:
        settings["head"] = [head] if isinstance(head, str) else list(head)
    solvers: dict[str, Callable[[str, Tensor, Tensor, tuple[str, ...], InputSpec], AnyHead]] = {
        "ridge": lambda *given: _ridge(*given, ridge=ridge),
        "knn": lambda *given: fit_knn(*given, k=k, temperature=temperature),
        "probe": lambda *given: _probe(*given, l2=l2, seed=seed),
    }
    if cache is not None and not isinstance(cache, HeadCache):
        cache = HeadCache(cache)
    dense = model_digest(model) if cache is not None else ""
    heads: dict[str, AnyHead] = {}
    for task in found:
        key = "" if cache is None else cache.key(dense, task.fit, spec, kind, settings, task.batch)
        kept = None if cache is None else cache.get(key)
        if kept is not None:
            heads[task.name] = replace(kept, task=task.name)
            continue
        with using_head(model, head), on_device(model, device):
            x, y, classes = _collect(model, task, spec, batch_size)
        heads[task.name] = solvers[kind](task.name, x, y, classes, spec)
        if cache is not None:
            _store(cache, key, heads[task.name])
    return heads


def _store(cache: HeadCache, key: str, head: AnyHead) -> None:
    """Store a fitted head; a failure is a warning, as the head is there."""
    try:
        cache.put(key, head)
    except OSError as error:
        warn_user(f"cache: the head of {head.task!r} is not stored in {cache.folder} ({error})")


def _collect(
    model: nn.Module, task: Task, spec: InputSpec, batch_size: int
) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Return features float32 `[n, f]`, labels int64 `[n]`, both on the CPU, and class names."""
    x, y = _rows(model, task, spec, batch_size)
    if int(y.min()) < 0:
        raise DataError(f"fit: labels of task {task.name!r} must be at least 0, got {int(y.min())}")
    classes = (
        task.fit.classes
        if isinstance(task.fit, ImageSet)
        else tuple(str(label) for label in range(int(y.max()) + 1))
    )
    counts = torch.bincount(y, minlength=len(classes))
    if int(counts.min()) == 0:
        empty = classes[int(counts.argmin())]
        raise DataError(f"fit: task {task.name!r} has no image of class {empty!r}")
    if not bool(torch.isfinite(x).all()):
        raise DataError(f"fit: features of task {task.name!r} must be finite")
    return x, y, classes


def _rows(model: nn.Module, task: Task, spec: InputSpec, batch_size: int) -> tuple[Tensor, Tensor]:
    rows, labels = [], []
    with evaluating(model) as device:
        for images, y in batches_of(task.fit, spec, batch_size, task.batch):
            rows.append(features(model, images.to(device)).float().cpu())
            labels.append(y.long().cpu())
    if not rows:
        raise DataError("fit must hold at least one image")
    return torch.cat(rows), torch.cat(labels)


def _ridge(
    task: str, x: Tensor, y: Tensor, classes: tuple[str, ...], spec: InputSpec, *, ridge: float
) -> Head:
    counts = torch.bincount(y, minlength=len(classes))
    weight, bias, alpha, left_out = solve_ridge(x, y, counts, ridge)
    return Head(task, weight, bias, classes, alpha, spec, best_scale(left_out, y, counts))


def _probe(
    task: str,
    x: Tensor,
    y: Tensor,
    classes: tuple[str, ...],
    spec: InputSpec,
    *,
    l2: float | None,
    seed: int,
) -> Head:
    counts = torch.bincount(y, minlength=len(classes))
    weight, bias, l2 = solve_probe(task, x, y, counts, l2, seed)
    return Head(task, weight, bias, classes, l2, spec, kind="probe")


__all__ = ["AnyHead", "Head", "KnnHead", "OwnHead", "fit_heads"]
