"""Frozen heads for tasks, fitted on the features of the dense backbone.

Axes: n images, f features.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor, nn

from fastsal.data.image_set import ImageSet
from fastsal.errors import DataError, InvalidArgument
from fastsal.models.evaluating import evaluating
from fastsal.models.features import features
from fastsal.models.inputs import InputSpec, input_spec
from fastsal.transfer.knn import KnnHead, fit_knn
from fastsal.transfer.linear_head import Head
from fastsal.transfer.logistic import solve_probe
from fastsal.transfer.own import Columns, OwnHead, own_head
from fastsal.transfer.ridge import best_scale, solve_ridge
from fastsal.transfer.tasks import Part, Task, as_tasks, batches_of

if TYPE_CHECKING:
    from fastsal.transfer.head_cache import HeadCache

AnyHead = Head | KnnHead | OwnHead
KINDS = ("ridge", "knn", "probe", "own")


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
) -> dict[str, Head]: ...


@overload
def fit_heads(
    model: nn.Module,
    tasks: Task | Iterable[Task],
    *,
    kind: str,
    ridge: float = 0.1,
    k: int = 20,
    temperature: float = 0.07,
    l2: float | None = None,
    columns: Columns | None = None,
    spec: InputSpec | None = None,
    batch_size: int = 64,
    cache: HeadCache | str | os.PathLike[str] | None = None,
    seed: int = 0,
) -> dict[str, AnyHead]: ...


def fit_heads(
    model: nn.Module,
    tasks: Task | Iterable[Task],
    *,
    kind: str = "ridge",
    ridge: float = 0.1,
    k: int = 20,
    temperature: float = 0.07,
    l2: float | None = None,
    columns: Columns | None = None,
    spec: InputSpec | None = None,
    batch_size: int = 64,
    cache: HeadCache | str | os.PathLike[str] | None = None,
    seed: int = 0,
) -> Mapping[str, AnyHead]:
    """Fit one head a task on the features of the dense backbone.

    Args:
        model: the dense backbone; left as found.
        tasks: one or more tasks.
        kind: "ridge" solves a ridge regression in closed form, "knn" keeps the features and lets
            the nearest vote, "probe" trains a logistic regression, "own" takes the model's own
            classifier.
        ridge: α over the mean eigenvalue of `X_cᵀ V X_c`, so that the scale of the features does
            not matter. Of "ridge".
        k: how many neighbours vote. Of "knn".
        temperature: their votes weigh exp(cosine similarity / temperature). Of "knn".
        l2: penalty, see `logistic.py`; None chooses one on held-out images. Of "probe".
        columns: of "own": the names of all the model's classes in the order of its logits, or
            `{class: logit}`. None takes classes named by numbers as those logits, and others as
            all the logits in order.
        spec: how images are prepared; None asks `fastsal.input_spec`.
        batch_size: images a forward pass.
        cache: a folder, or a `HeadCache`, that heads are kept in and taken from; None fits anew.
        seed: of the images that "probe" holds out.

    Returns:
        `{task name: head}`.

    Raises:
        InvalidArgument: a number out of range, an unknown kind, or tasks that share a name.
        DataError: a class without images to fit on, or features that are not finite.
        FactorizationError: the normal equations are singular (`ridge` of 0).
    """
    from fastsal.transfer.head_cache import HeadCache, model_digest

    _check(kind, ridge, k, temperature, l2)
    found = as_tasks(tasks)
    spec = spec or input_spec(model)
    if kind == "own":
        own: dict[str, AnyHead] = {
            task.name: own_head(model, task, spec, columns) for task in found
        }
        return own
    if columns is not None:
        raise InvalidArgument(f"columns: got one for kind {kind!r}; takes it for 'own' only")
    settings: dict[str, object] = {
        "ridge": {"ridge": float(ridge)},
        "knn": {"k": k, "temperature": float(temperature)},
        "probe": {"l2": l2, "seed": seed if l2 is None else None},
    }[kind]  # type: ignore[assignment]
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
        key = "" if cache is None else cache.key(dense, task.fit, spec, kind, settings)
        kept = None if cache is None else cache.get(key)
        if kept is not None:
            heads[task.name] = replace(kept, task=task.name)
            continue
        x, y, classes = _collect(model, task, spec, batch_size)
        heads[task.name] = solvers[kind](task.name, x, y, classes, spec)
        if cache is not None:
            cache.put(key, heads[task.name])
    return heads


def _check(kind: str, ridge: float, k: int, temperature: float, l2: float | None) -> None:
    if kind not in KINDS:
        close = difflib.get_close_matches(str(kind), KINDS, n=1)
        hint = f" (close: {close[0]})" if close else ""
        raise InvalidArgument(f"kind: got {kind!r}{hint}; takes {', '.join(KINDS)}")
    if not 0 <= ridge < math.inf:
        raise InvalidArgument(f"ridge: got {ridge}; takes 0 or more")
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise InvalidArgument(f"k: got {k!r}; takes a whole number, 1 or more")
    if not 0 < temperature < math.inf:
        raise InvalidArgument(f"temperature: got {temperature}; takes a number above 0")
    if l2 is not None and not 0 < l2 < math.inf:
        raise InvalidArgument(f"l2: got {l2}; takes a number above 0, or None")


def _collect(
    model: nn.Module, task: Task, spec: InputSpec, batch_size: int
) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Return features float32 `[n, f]` and labels int64 `[n]`, on the CPU, and the classes."""
    x, y = _rows(model, task.fit, spec, batch_size)
    if int(y.min()) < 0:
        raise DataError(f"fit: task {task.name!r} has label {int(y.min())}; takes 0 or more")
    classes = (
        task.fit.classes
        if isinstance(task.fit, ImageSet)
        else tuple(str(label) for label in range(int(y.max()) + 1))
    )
    counts = torch.bincount(y, minlength=len(classes))
    if int(counts.min()) == 0:
        empty = classes[int(counts.argmin())]
        raise DataError(f"fit: task {task.name!r} has no image of class {empty!r} to fit on")
    if not bool(torch.isfinite(x).all()):
        raise DataError(f"fit: task {task.name!r} gives features that are not finite")
    return x, y, classes


def _rows(model: nn.Module, part: Part, spec: InputSpec, batch_size: int) -> tuple[Tensor, Tensor]:
    rows, labels = [], []
    with evaluating(model) as device:
        for images, y in batches_of(part, spec, batch_size):
            rows.append(features(model, images.to(device)).float().cpu())
            labels.append(y.long().cpu())
    if not rows:
        raise DataError("fit: no images to fit a head on")
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


__all__ = ["KINDS", "AnyHead", "Head", "KnnHead", "OwnHead", "fit_heads"]
