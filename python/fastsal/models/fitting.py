"""Compare a state dict with a model, name by name and shape by shape."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastsal.models.state_dicts import State
from fastsal.utils.suggestions import closest, listed


def fill_aliases(state: State, own: State) -> None:
    """Add the missing names of shared tensors to `state`.

    Batch counters (`num_batches_tracked`) missing in old files keep the value of the model.
    """
    by_tensor: dict[tuple[Any, ...], list[str]] = {}
    for name, value in own.items():
        if value.numel():
            key = (value.data_ptr(), tuple(value.shape), value.stride(), value.dtype)
            by_tensor.setdefault(key, []).append(name)
    for names in by_tensor.values():
        there = next((name for name in names if name in state), None)
        for name in names:
            if there is not None and name not in state:
                state[name] = state[there]
    for name, value in own.items():
        if name.endswith("num_batches_tracked") and name not in state:
            state[name] = value.clone()


def misfits(state: State, own: State) -> list[str]:
    """Describe how `state` differs from `own`; empty if it fits."""
    missing = [name for name in own if name not in state]
    extra = [name for name in state if name not in own]
    shapes = [
        f"{name} {list(state[name].shape)} instead of {list(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    kinds = [
        f"{name} {state[name].dtype} instead of {own[name].dtype}"
        for name in own
        if name in state and _is_float(state[name]) != _is_float(own[name])
    ]
    problems = []
    if missing:
        problems.append(f"{len(missing)} missing: {listed(missing)}{_similar(missing[0], extra)}")
    if extra:
        problems.append(f"{len(extra)} unexpected: {listed(extra)}{_similar(extra[0], missing)}")
    if shapes:
        problems.append(f"{len(shapes)} of a different shape: {listed(shapes)}")
    if kinds:
        problems.append(f"{len(kinds)} of a different type: {listed(kinds)}")
    return problems


def class_hint(state: State, own: State) -> str:
    """Suggest `num_classes` if only the outputs of one layer differ in number."""
    wrong = [n for n in own if n in state and state[n].shape != own[n].shape]
    if not wrong or set(own) != set(state):
        return ""
    if any(state[n].shape[1:] != own[n].shape[1:] for n in wrong):
        return ""
    if any(size > 1 for n in wrong for size in own[n].shape[2:]):
        return ""  # a convolution, which is no classifier
    counts = {(state[n].shape[:1], own[n].shape[:1]) for n in wrong}
    if len(counts) > 1 or len({n.rpartition(".")[0] for n in wrong}) > 1:
        return ""
    classes = state[wrong[0]].shape[0]
    return f". The classifier in the file has {classes} classes: pass num_classes={classes}"


def _is_float(value: Tensor) -> bool:
    return value.is_floating_point()


def _similar(name: str, known: list[str]) -> str:
    near = closest(name, known)
    return f" (similar: {', '.join(near)})" if near else ""
