"""Two samples through the model, once, to find out which parameters a rule may serve.

A rule reads the first axis of a call as the sample axis. That is so exactly if the loss of one
sample leaves the other sample's part of the gradient at zero, in both directions. The rule of
F.linear also takes samples as the last of the leading axes, as nn.MultiheadAttention has them.
What the rules give is then held against autograd, so that a use that no rule saw cannot go
unnoticed.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from fastsal.errors import UnsupportedLayer
from fastsal.gradients.backward import Record
from fastsal.gradients.capture import Capture, hookable, make_root, saves_tensors_elsewhere
from fastsal.gradients.fallback import differentiate
from fastsal.gradients.registry import Call, Operation
from fastsal.gradients.workspace import Workspace

# Relative difference between rules and autograd, above which a use must have been missed.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2}
_COARSE_TOLERANCE = 0.2

_MIXED = (
    "its first axis is not the sample axis (a sequence-first layout, or a table that all samples "
    "share)"
)
_LAYOUTS = "its calls differ in the place of the sample axis"
_UNSEEN = "used where no rule sees it (an autograd.Function, a scripted function or a checkpoint)"

# forward(model call) -> losses [2]
Losses = Callable[[Callable[[], object]], Tensor]


@dataclass(frozen=True)
class Findings:
    """Which parameters a rule serves.

    Attributes:
        operations: Name to operation, for those with a rule.
        reasons: Name to reason, for those without.
        samples_last: Names whose calls hold samples as the last leading axis.
        checkpointed: Whether calls are recomputed in the backward pass.
    """

    operations: dict[str, str]
    reasons: dict[str, str]
    samples_last: set[str]
    checkpointed: bool


@dataclass
class _Seen:
    record: Record
    gradients: dict[int, Tensor] = field(default_factory=dict)


class _Recorder:
    """Keeps the output gradients of every call, per sample whose loss they come from."""

    def __init__(self) -> None:
        self.seen: list[_Seen] = []
        self.slot = 0
        self.checkpointed = False

    def on_call(self, name: str, operation: Operation, call: Call, output: Tensor) -> Tensor:
        self.checkpointed = self.checkpointed or saves_tensors_elsewhere()
        entry = _Seen(Record(name, operation, call, output))
        if not output.requires_grad:
            output = make_root(output)

        def hook(grad_output: Tensor | None) -> None:
            if grad_output is not None:
                entry.gradients[self.slot] = grad_output.detach()

        hookable(output).register_hook(hook)  # type: ignore[no-untyped-call]
        self.seen.append(entry)
        return output


def probe(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    images: Tensor,
    losses: Losses,
    context: Callable[[], contextlib.AbstractContextManager[None]],
    *,
    coarse: bool,
) -> Findings:
    """Sort parameters into those with a rule and those without.

    Args:
        model: Model in evaluation mode; its parameters need no gradients.
        parameters: Tracked parameters.
        images: Two samples `[2, ...]`.
        losses: Takes a function that runs the model, returns the checked losses `[2]`.
        context: Entered around each pass; the same random numbers every time.
        coarse: Whether the model runs in less than float32.

    Returns:
        What was found.

    Raises:
        UnsupportedLayer: Samples depend on each other, or a parameter receives no gradient.
    """
    images = images.detach().clone().requires_grad_()
    recorder = _Recorder()
    capture = Capture(parameters, recorder.on_call)
    with context():
        with capture:
            values = losses(lambda: model(images))
        if values.requires_grad:
            for slot in (0, 1):
                recorder.slot = slot
                torch.autograd.backward(values[slot], retain_graph=slot == 0)
                _check_independent(images, slot)

    reasons = dict(capture.unsupported)
    layouts: dict[str, bool] = {}
    rows: dict[str, Tensor] = {}
    operations: dict[str, str] = {}
    workspace = Workspace()
    for entry in recorder.seen:
        name = entry.record.name
        if not entry.gradients:
            continue
        kind = entry.record.operation.name
        operations.setdefault(name, kind)
        samples_first = _samples_first(entry)
        if samples_first is None:
            reasons.setdefault(name, _MIXED)
        elif layouts.setdefault(name, samples_first) != samples_first:
            reasons.setdefault(name, _LAYOUTS)
        if name in reasons or samples_first is None:
            continue
        entry.record.call = replace(entry.record.call, samples_first=samples_first)
        known = operations[name]
        if kind not in known.split("+"):
            operations[name] = f"{known}+{kind}"
        total = _rows(entry, parameters[name], workspace)
        entry.gradients.clear()
        rows[name] = rows[name] + total if name in rows else total

    truth = _autograd(model, parameters, images, losses, context)
    _compare(parameters, rows, truth, reasons, coarse=coarse)
    missing = [name for name in parameters if truth[name] is None and name not in operations]
    if missing:
        raise UnsupportedLayer(
            f"no gradient reaches {', '.join(missing)}: unused by the model, or cut off from the "
            "loss (torch.no_grad, detach, a reentrant checkpoint); leave it out with "
            "parameters=[..., '!name']"
        )
    served = {name: operations[name] for name in parameters if name not in reasons}
    samples_last = {name for name in served if not layouts[name]}
    return Findings(served, reasons, samples_last, recorder.checkpointed)


def _check_independent(images: Tensor, slot: int) -> None:
    gradient, images.grad = images.grad, None
    if gradient is None:
        return
    other = torch.nan_to_num(gradient[1 - slot], nan=0.0)
    if other.any():
        raise UnsupportedLayer(
            "the loss of one sample depends on the other samples of its batch, so there is no "
            "per-sample gradient: a module computes batch statistics (BatchNorm without running "
            "statistics, or forced into train mode), or the model mixes samples"
        )


def _samples_first(entry: _Seen) -> bool | None:
    """Say where the sample axis of a call is: outermost, last of the leading axes, or nowhere."""
    shape = entry.record.output_shape
    if shape[0] % 2 == 0 and _separates(entry, (2, -1), 0):
        return True
    positions = math.prod(shape[:-1])
    if entry.record.operation.any_layout and positions % 2 == 0:
        return False if _separates(entry, (positions // 2, 2, shape[-1]), 1) else None
    return None


def _separates(entry: _Seen, shape: tuple[int, ...], axis: int) -> bool:
    for slot, gradient in entry.gradients.items():
        other = gradient.reshape(shape).select(axis, 1 - slot)
        if torch.nan_to_num(other, nan=0.0).any():
            return False
    return True


def _rows(entry: _Seen, parameter: nn.Parameter, workspace: Workspace) -> Tensor:
    """Sum over both samples what the rule gives for a call."""
    # Each loss reaches its own sample only, so that the sum holds both.
    gradient = sum(entry.gradients.values(), start=torch.zeros(()).to(parameter))
    out = workspace.take("probe", (2, *parameter.shape), parameter)
    entry.record.fill(gradient, out, workspace)
    return out.sum(0)


def _autograd(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    images: Tensor,
    losses: Losses,
    context: Callable[[], contextlib.AbstractContextManager[None]],
) -> dict[str, Tensor | None]:
    try:
        with context():
            # The images still need gradients: with equal flags the same kernels run.
            return differentiate(model, parameters, lambda: losses(lambda: model(images)).sum())
    except RuntimeError as error:
        raise UnsupportedLayer(
            f"autograd cannot differentiate the model by {', '.join(parameters)}: {error}"
        ) from error


def _compare(
    parameters: Mapping[str, nn.Parameter],
    rows: Mapping[str, Tensor],
    truth: Mapping[str, Tensor | None],
    reasons: dict[str, str],
    *,
    coarse: bool,
) -> None:
    norms = {name: float(g.norm()) for name, g in truth.items() if g is not None}
    largest = max(norms.values(), default=0.0)
    for name, parameter in parameters.items():
        gradient = truth[name]
        if gradient is None or name in reasons:
            continue
        if name not in rows:
            reasons[name] = _UNSEEN
            continue
        tolerance = _COARSE_TOLERANCE if coarse else _TOLERANCE.get(parameter.dtype, 0.2)
        difference = float((rows[name] - gradient).norm())
        # Gradients that vanish in exact arithmetic are rounding noise; the second term lets
        # them pass.
        if difference > tolerance * norms[name] + 1e-4 * tolerance * largest:
            reasons[name] = _UNSEEN
