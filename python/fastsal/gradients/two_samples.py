"""Choice of the rule for each parameter, from one run of the model on two samples.

A rule assumes that the first axis of a call is the sample axis. This holds if the loss of one
sample does not affect the other sample's part of the output gradient: under the first loss alone
the second part is zero, and under both losses the first part is that of the first loss alone. The
rules of F.linear and F.embedding also support samples as the last of the leading axes, as in
nn.MultiheadAttention. The same test at the images, or at the embeddings of tokens, verifies that
samples do not depend on each other. Finally the rules are compared with autograd for both losses,
so that a use of a weight that was not intercepted is detected.

The first part under both losses differs from that of the first loss alone by rounding too: kernels
of a GPU sum in an order that changes, and TF32 or 16 bits make more of it. Where it differs by more
than rounding explains, a pass under the second loss alone decides, whose first part must be zero.

The cost is one forward pass and two backward passes, of which only the second computes gradients of
weights; seldom a third.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from fastsal.errors import UnsupportedLayer
from fastsal.gradients.backward import Record
from fastsal.gradients.capture import Capture, hookable, make_root, saves_tensors_elsewhere
from fastsal.gradients.fallback import RunModel, as_dense, differentiate
from fastsal.gradients.precision import at_least_float32, row_dtype
from fastsal.gradients.rules.operations import Call, Operation
from fastsal.gradients.sample_axis import SplitGradient
from fastsal.gradients.scaling import LossScale, all_finite, largest
from fastsal.gradients.tokens import TokenLookups
from fastsal.gradients.workspace import Workspace

# Relative difference between rules and autograd above which a use was not intercepted.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2}
_COARSE_TOLERANCE = 0.2
_MIXED = (
    "its first axis is not the sample axis (a sequence-first layout, or an input that all samples "
    "share)"
)
_LAYOUTS = "its calls differ in the position of the sample axis"
_UNSEEN = "a use is not intercepted (an autograd.Function, a scripted function or a checkpoint)"

# forward(model call) -> losses [2]
Losses = Callable[[Callable[[], object]], Tensor]


@dataclass(frozen=True)
class RuleChoice:
    """The parameters with a rule and those without.

    Attributes:
        operations: Name to operation, for parameters with a rule.
        reasons: Name to reason, for parameters without a rule.
        samples_last: Names of parameters whose calls have samples as the last leading axis.
        checkpointed: Whether calls are recomputed in the backward pass.
        loss_scale: Loss scale that suits the gradients of both samples.
        order: Names of parameters with a call, in the order in which their gradients are complete.
    """

    operations: dict[str, str]
    reasons: dict[str, str]
    samples_last: set[str]
    checkpointed: bool
    loss_scale: float
    order: list[str]


@dataclass
class _Seen(SplitGradient):
    """One call, and the gradients of its output."""

    record: Record = field(kw_only=True)
    edge: GradientEdge = field(kw_only=True)


class _Recorder:
    """Records the output gradients of every call."""

    def __init__(self) -> None:
        self.seen: list[_Seen] = []
        self.arrived: list[str] = []  # names under both losses, once for each call
        self.under: Literal["first", "both", "second"] = "first"
        self.checkpointed = False

    def on_call(self, name: str, operation: Operation, call: Call, output: Tensor) -> Tensor:
        self.checkpointed = self.checkpointed or saves_tensors_elsewhere()
        record = Record(name, operation, call, output)
        if not output.requires_grad:
            output = make_root(output)
        root = hookable(output)
        entry = _Seen(
            record.output_shape,
            operation.any_layout,
            record=record,
            edge=get_gradient_edge(root),
        )

        def hook(grad_output: Tensor | None) -> None:
            if grad_output is None:
                return
            setattr(entry, self.under, grad_output.detach())
            if self.under == "both":
                self.arrived.append(name)

        root.register_hook(hook)  # type: ignore[no-untyped-call]
        self.seen.append(entry)
        return output


def find_rules(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    images: Tensor,
    losses: Losses,
    context: Callable[[], contextlib.AbstractContextManager[None]],
    run_model: RunModel,
    scale: LossScale,
    *,
    coarse: bool,
) -> RuleChoice:
    """Find the parameters whose per-sample gradients a rule computes.

    Args:
        model: Model in evaluation mode, whose parameters do not require gradients.
        parameters: Tracked parameters.
        images: Two samples `[2, ...]`, images or token ids.
        losses: Function of a function that runs the model; returns the checked losses `[2]`.
        context: Context manager of a pass, with the same random numbers every time.
        run_model: Runs the model on images.
        scale: Initial loss scale; not modified.
        coarse: Whether the model runs in less than float32.

    Raises:
        UnsupportedLayer: Samples depend on each other, or a parameter receives no gradient.
    """
    start = _Start(images.detach().clone())
    scale = scale.copy()
    recorder = _Recorder()
    captures: list[Capture] = []

    def gradients(copies: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
        capture = Capture(copies, recorder.on_call)
        captures.append(capture)
        with context():
            with capture:
                values = losses(lambda: start.run(lambda: run_model(model, start.images)))
            return _two_backward_passes(values, start, copies, recorder, scale)

    found = differentiate(model, parameters, gradients)
    truth = {n: None if g is None else _unscaled(g, scale) for n, g in found.items()}
    reasons = dict(captures[0].unsupported)
    layouts: dict[str, bool] = {}
    calls = Counter(entry.record.name for entry in recorder.seen if entry.both is not None)
    differences = _Differences(truth, calls)
    operations: dict[str, str] = {}
    workspace = Workspace()
    for entry in recorder.seen:
        name = entry.record.name
        if entry.both is None:
            continue
        kind = entry.record.operation.name
        operations.setdefault(name, kind)
        samples_first = entry.samples_first
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
        total = _rows(entry.record, entry.both, parameters[name], workspace, scale)
        entry.first = entry.both = entry.second = None
        differences.add(name, total)

    _compare(parameters, differences.norms, truth, reasons, coarse=coarse)
    missing = [name for name in parameters if truth[name] is None and name not in operations]
    if missing:
        raise UnsupportedLayer(
            f"no gradient reaches {', '.join(missing)}: unused by the model, or detached from the "
            "loss (torch.no_grad, detach, a reentrant checkpoint); exclude it with "
            "parameters=[..., '!name']"
        )
    served = {name: operations[name] for name in parameters if name not in reasons}
    samples_last = {name for name in served if not layouts[name]}
    order = list(dict.fromkeys(reversed(recorder.arrived)))[::-1]  # by the last call
    return RuleChoice(served, reasons, samples_last, recorder.checkpointed, scale.value, order)


class _Start:
    """The start of the graph: the images, or the embeddings of tokens.

    Args:
        images: `[2, ...]`.

    Attributes:
        images: The input of the model, which it may modify in place.
    """

    def __init__(self, images: Tensor) -> None:
        self._is_tokens = not images.is_floating_point()
        self.images = images if self._is_tokens else make_root(images)
        self._edges = [] if self._is_tokens else [get_gradient_edge(self.images)]
        self._shapes = [images.shape]
        self._lookups = TokenLookups(images)

    def run(self, model: Callable[[], object]) -> object:
        """Run the model, and intercept its embeddings if the samples are tokens."""
        with self._lookups if self._is_tokens else contextlib.nullcontext():
            found = model()
        if self._is_tokens:
            self._shapes = [tensor.shape for tensor in self._lookups.outputs]
        return found

    @property
    def tensors(self) -> Sequence[GradientEdge | Tensor]:
        """Where samples must not mix."""
        return self._lookups.outputs if self._is_tokens else self._edges

    def found(
        self, first: Sequence[Tensor | None], both: Sequence[Tensor | None]
    ) -> list[SplitGradient]:
        """Return the gradients of the tensors under the first loss, and under both."""
        return [
            SplitGradient(shape, self._is_tokens, one, two)
            for shape, one, two in zip(self._shapes, first, both, strict=True)
        ]


def _two_backward_passes(
    values: Tensor,
    start: _Start,
    copies: Mapping[str, Tensor],
    recorder: _Recorder,
    scale: LossScale,
) -> dict[str, Tensor | None]:
    """Return the gradients of the sum of both losses; the recorder stores those of the first too.

    Losses are scaled, with a scale that does not overflow. If gradients of a call or of the start
    leave it open whether samples mix, the recorder stores those of the second loss alone too.
    """
    if not values.requires_grad:
        return dict.fromkeys(copies)
    # With the edges, a pass reaches every call, also those without a path to the images.
    edges: list[GradientEdge | Tensor] = [entry.edge for entry in recorder.seen]
    starts = len(start.tensors)
    try:
        while True:
            recorder.under = "first"
            first = _grad(scale.scaled(values[0]), [*start.tensors, *edges])
            recorder.under = "both"
            recorder.arrived.clear()
            both = _grad(scale.scaled(values.sum()), [*start.tensors, *copies.values(), *edges])
            if not scale.is_active:
                break
            there = [as_dense(g) for g in both if g is not None]
            again = scale.rise(largest(there)) if all_finite(there) else scale.back_off()
            if not again:
                break
        began = start.found(first[:starts], both[:starts])
        seen = [*began, *recorder.seen]
        unknown = [found for found in seen if found.find_layout(has_second=False)]
        if unknown:
            recorder.under = "second"
            second = _grad(scale.scaled(values[1]), [*start.tensors, *edges])
            for found, gradient in zip(began, second, strict=False):
                found.second = gradient
            for found in unknown:
                found.find_layout(has_second=True)
    except RuntimeError as error:
        for entry in recorder.seen:
            entry.record.check_input()
        raise UnsupportedLayer(
            f"autograd cannot differentiate the model by {', '.join(copies)}: {error}"
        ) from error
    if any(found.both is not None and found.samples_first is None for found in began):
        raise UnsupportedLayer(
            "the loss of one sample depends on the other samples of its batch, so there is no "
            "per-sample gradient: a module uses batch statistics (BatchNorm without running "
            "statistics, or forced into training mode), or the model mixes samples"
        )
    return dict(zip(copies, both[starts:], strict=False))


def _unscaled(gradient: Tensor, scale: LossScale) -> Tensor:
    return scale.undone(at_least_float32(as_dense(gradient)))


def _grad(value: Tensor, by: list[GradientEdge | Tensor]) -> tuple[Tensor | None, ...]:
    found: tuple[Tensor | None, ...] = torch.autograd.grad(
        value,
        by,  # type: ignore[arg-type]
        retain_graph=True,
        allow_unused=True,
    )
    return found


class _Differences:
    """Compares the sums of a parameter's calls with autograd, in the memory that they are given in.

    New memory for every parameter takes longer than the comparison.

    Args:
        truth: Name to the gradient of autograd, or None.
        calls: Name to the number of calls.

    Attributes:
        norms: Name to the norm of the difference, of parameters with all calls and a gradient.
    """

    def __init__(self, truth: Mapping[str, Tensor | None], calls: Mapping[str, int]) -> None:
        self._truth = truth
        self._left = dict(calls)
        self._sums: dict[str, Tensor] = {}
        self.norms: dict[str, float] = {}

    def add(self, name: str, total: Tensor) -> None:
        """Add the gradient of a call, in scratch memory, which is overwritten."""
        self._left[name] -= 1
        if name in self._sums:
            total = self._sums[name].add_(total)
        elif self._left[name] > 0:
            self._sums[name] = total.clone()
        gradient = self._truth[name]
        if self._left[name] == 0 and gradient is not None:
            self.norms[name] = float(total.sub_(gradient).norm())


def _rows(
    record: Record,
    gradient: Tensor,
    parameter: nn.Parameter,
    workspace: Workspace,
    scale: LossScale,
) -> Tensor:
    """Return the rule's gradient of a call, summed over both samples, in scratch memory."""
    out = workspace.take("two samples", (2, *parameter.shape), parameter, row_dtype(parameter))
    record.fill(gradient, out, workspace, scale)
    return out[0].add_(out[1])


def _compare(
    parameters: Mapping[str, nn.Parameter],
    differences: Mapping[str, float],
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
        if name not in differences:
            reasons[name] = _UNSEEN
            continue
        tolerance = _COARSE_TOLERANCE if coarse else _TOLERANCE.get(parameter.dtype, 0.2)
        # Gradients that are zero in exact arithmetic are rounding noise; the second term accepts
        # them.
        if differences[name] > tolerance * norms[name] + 1e-4 * tolerance * largest:
            reasons[name] = _UNSEEN
