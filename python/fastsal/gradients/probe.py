"""Two samples through the model, once, to find out which parameters a rule may serve.

A rule reads the first axis of a call as the sample axis. That is so if the loss of one sample
leaves the other sample's part of the gradient as it is: the first loss alone must leave the second
part at zero, and both losses together must leave the first part where the first loss put it. The
rule of F.linear also takes samples as the last of the leading axes, as nn.MultiheadAttention has
them. What the rules give for both losses is held against autograd, so that a use that no rule saw
cannot go unnoticed.

It takes one forward pass and two backward passes, of which only the second forms the gradients of
weights.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from fastsal.errors import UnsupportedLayer
from fastsal.gradients.backward import Record
from fastsal.gradients.capture import Capture, hookable, make_root, saves_tensors_elsewhere
from fastsal.gradients.fallback import Call as RunModel
from fastsal.gradients.fallback import differentiate
from fastsal.gradients.registry import Call, Operation
from fastsal.gradients.workspace import Workspace

# Relative difference between rules and autograd, above which a use must have been missed.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2}
_COARSE_TOLERANCE = 0.2
# Relative difference between a sample's gradient with and without the other sample's loss.
_SAME = 1e-3

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
    """One call, and its output gradient under the first loss and under the sum of both."""

    record: Record
    edge: GradientEdge
    first: Tensor | None = None
    both: Tensor | None = None


class _Recorder:
    """Keeps the output gradients of every call."""

    def __init__(self) -> None:
        self.seen: list[_Seen] = []
        self.both = False
        self.checkpointed = False

    def on_call(self, name: str, operation: Operation, call: Call, output: Tensor) -> Tensor:
        self.checkpointed = self.checkpointed or saves_tensors_elsewhere()
        record = Record(name, operation, call, output)
        if not output.requires_grad:
            output = make_root(output)
        root = hookable(output)
        entry = _Seen(record, get_gradient_edge(root))

        def hook(grad_output: Tensor | None) -> None:
            if grad_output is None:
                return
            if self.both:
                entry.both = grad_output.detach()
            else:
                entry.first = grad_output.detach()

        root.register_hook(hook)  # type: ignore[no-untyped-call]
        self.seen.append(entry)
        return output


def probe(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    images: Tensor,
    losses: Losses,
    context: Callable[[], contextlib.AbstractContextManager[None]],
    call: RunModel,
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
        call: Runs the model on images.
        coarse: Whether the model runs in less than float32.

    Returns:
        What was found.

    Raises:
        UnsupportedLayer: Samples depend on each other, or a parameter receives no gradient.
    """
    images = images.detach().clone().requires_grad_()
    recorder = _Recorder()
    captures: list[Capture] = []

    def gradients(copies: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
        capture = Capture(copies, recorder.on_call)
        captures.append(capture)
        with context():
            with capture:
                values = losses(lambda: call(model, images))
            return _two_backward_passes(values, images, copies, recorder)

    truth = differentiate(model, parameters, gradients)
    reasons = dict(captures[0].unsupported)
    layouts: dict[str, bool] = {}
    rows: dict[str, Tensor] = {}
    operations: dict[str, str] = {}
    workspace = Workspace()
    for entry in recorder.seen:
        name = entry.record.name
        if entry.both is None:
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
        total = _rows(entry.record, entry.both, parameters[name], workspace)
        entry.first = entry.both = None
        rows[name] = rows[name] + total if name in rows else total

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


def _two_backward_passes(
    values: Tensor, images: Tensor, copies: Mapping[str, Tensor], recorder: _Recorder
) -> dict[str, Tensor | None]:
    """Gradients of both losses together, after those of the first alone went to the recorder."""
    if not values.requires_grad:
        return dict.fromkeys(copies)
    # The edges make a pass reach every call, also where no path leads on to the images.
    edges: list[GradientEdge | Tensor] = [entry.edge for entry in recorder.seen]
    try:
        first, *_ = _grad(values[0], [images, *edges], retain_graph=True)
        recorder.both = True
        both, *found = _grad(values.sum(), [images, *copies.values(), *edges])
    except RuntimeError as error:
        for entry in recorder.seen:
            entry.record.check_input()
        raise UnsupportedLayer(
            f"autograd cannot differentiate the model by {', '.join(copies)}: {error}"
        ) from error
    if first is not None and both is not None and not _separate(first, both, (2, -1), 0):
        raise UnsupportedLayer(
            "the loss of one sample depends on the other samples of its batch, so there is no "
            "per-sample gradient: a module computes batch statistics (BatchNorm without running "
            "statistics, or forced into train mode), or the model mixes samples"
        )
    return dict(zip(copies, found, strict=False))


def _grad(
    value: Tensor, by: list[GradientEdge | Tensor], *, retain_graph: bool = False
) -> tuple[Tensor | None, ...]:
    found: tuple[Tensor | None, ...] = torch.autograd.grad(
        value,
        by,  # type: ignore[arg-type]
        retain_graph=retain_graph,
        allow_unused=True,
    )
    return found


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
    return entry.both is None or _separate(entry.first, entry.both, shape, axis)


def _separate(first: Tensor | None, both: Tensor, shape: tuple[int, ...], axis: int) -> bool:
    """Say whether each loss leaves the other sample's part of a gradient as it is."""
    both = torch.nan_to_num(both.detach().reshape(shape).select(axis, 0), nan=0.0)
    if first is None:
        return not both.any()
    mine, other = torch.nan_to_num(first.detach().reshape(shape), nan=0.0).unbind(axis)
    if other.any():
        return False
    # The same products in the same order, as a rule; the kernels of a GPU may add otherwise.
    return float((mine - both).norm()) <= _SAME * float(mine.norm())


def _rows(
    record: Record, gradient: Tensor, parameter: nn.Parameter, workspace: Workspace
) -> Tensor:
    """Sum over both samples what the rule gives for a call."""
    out = workspace.take("probe", (2, *parameter.shape), parameter)
    record.fill(gradient, out, workspace)
    return out.sum(0)


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
