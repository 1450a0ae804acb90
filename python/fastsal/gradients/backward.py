"""Hooks of one forward and backward pass that compute per-sample gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from fastsal.errors import UnsupportedLayer
from fastsal.gradients.capture import hookable, make_root
from fastsal.gradients.precision import row_dtype
from fastsal.gradients.rules.operations import Call, Operation
from fastsal.gradients.scaling import LossScale, all_finite
from fastsal.gradients.workspace import Workspace

Sink = Callable[[str, Tensor], None]  # sink(name, rows [n, *shape])


@runtime_checkable
class Lender(Protocol):
    """A sink that provides the memory that rows are written to, so that they are not copied."""

    def room(self, name: str, shape: Sequence[int]) -> Tensor | None:
        """Return contiguous memory `[n, *shape]` in the parameter's `row_dtype`, or None."""


@runtime_checkable
class Deferrer(Protocol):
    """A sink that may keep a call instead of its rows, and compute the rows when it adds them."""

    def defers(self, name: str, shape: Sequence[int], nbytes: int) -> bool:
        """Return whether to keep a call of `nbytes` instead of the rows `[n, *shape]`."""

    def defer(self, name: str, shape: Sequence[int], fill: Callable[[Tensor], None]) -> None:
        """Receive the function that writes the rows `[n, *shape]` to contiguous memory."""


@runtime_checkable
class Skipper(Protocol):
    """A sink that is told ahead of the backward pass which parameters have rows of zeros."""

    def skip(self, name: str) -> None:
        """Receive rows of zeros of a parameter that the forward pass did not use."""


class Record:
    """One call of an operation on a tracked weight, stored until its output gradient is known."""

    def __init__(self, name: str, operation: Operation, call: Call, output: Tensor) -> None:
        self.name = name
        self.operation = operation
        # Shares memory and version counter with the input, without its graph.
        self.call = replace(call, input=call.input.detach())
        self.version = call.input._version
        self.output_shape = output.shape

    def check_input(self) -> None:
        """Raise UnsupportedLayer if the input was changed in place after the call."""
        if self.call.input._version != self.version:
            raise UnsupportedLayer(
                f"{self.name}: the input of its {self.operation.name} call was modified in place "
                "after the call, so that the gradient of the weight cannot be computed; use an "
                "out-of-place operation (inplace=False)"
            )

    def fill(
        self,
        grad_output: Tensor,
        out: Tensor,
        workspace: Workspace,
        scale: LossScale,
        ran: int | None = None,
    ) -> None:
        """Write the rows `[n, *shape]` of this call to `out`.

        Args:
            grad_output: Gradient of the scaled losses with respect to the output.
            out: Float32 or wider, so that unscaling is exact.
            workspace: Scratch memory.
            scale: Loss scale.
            ran: Samples of the pass, of which rows of the first n are written; None if n.

        Raises:
            UnsupportedLayer: The input was modified in place, or its first axis is not the sample
                axis.
        """
        call, dy = self._of_first(grad_output, out.shape[0], ran or out.shape[0])
        _write_rows(self.operation, call, scale.undone(dy.to(out.dtype)), workspace, out)

    def kept(
        self, grad_output: Tensor, n: int, ran: int, workspace: Workspace
    ) -> Callable[[Tensor], None]:
        """Return a function that writes the rows, as `fill` without a scale, at any later time.

        It has copies of the input and of the gradient, as others may change both.
        """
        call, dy = self._of_first(grad_output, n, ran)
        call = replace(call, input=call.input.clone())
        return partial(_write_rows, self.operation, call, dy.clone(), workspace)

    def _of_first(self, grad_output: Tensor, n: int, ran: int) -> tuple[Call, Tensor]:
        """Return the call and the gradient of its output, of the first n of `ran` samples."""
        self.check_input()
        x = self.call.input
        axes = self.output_shape[:1] if self.call.samples_first else self.output_shape[:-1]
        if math.prod(axes) % ran:
            raise UnsupportedLayer(
                f"{self.name}: the input of its {self.operation.name} call, {list(x.shape)}, "
                f"does not contain {ran} samples as in the first batch"
            )
        dy = grad_output.reshape(self.output_shape)
        if n < ran:
            features = 1 if x.is_floating_point() else 0  # token ids have no axis of features
            x, dy = self._first(x, n, ran, features), self._first(dy, n, ran, 1)
        return replace(self.call, input=x), dy

    def _first(self, values: Tensor, n: int, ran: int, features: int) -> Tensor:
        """Return the part of the first n of `ran` samples, with the same layout."""
        if self.call.samples_first:
            return values[: len(values) // ran * n]
        last = values.shape[values.dim() - features :]
        return values.reshape(-1, ran, *last)[:, :n].reshape(-1, *last)


def _write_rows(
    operation: Operation, call: Call, dy: Tensor, workspace: Workspace, out: Tensor
) -> None:
    x = call.input.to(out.dtype) if call.input.is_floating_point() else call.input
    operation.rule(replace(call, input=x), dy.to(out.dtype), out, workspace)


class Pass:
    """Computes rows during a backward pass and passes each parameter to the sink once.

    With a loss scale, output gradients are stored until the end of the backward pass and checked
    for overflow first, because rows cannot be withdrawn from the sink. Gradients and inputs, both
    16-bit, use as much memory as the inputs of a float32 pass.

    Args:
        parameters: Name to parameter with a rule.
        n: Samples whose rows are computed, the first ones of the pass.
        ran: Samples of the pass.
        sink: Takes the rows.
        workspace: Scratch memory.
        scale: Loss scale.
        samples_last: Names of parameters whose calls have samples as the last leading axis.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        n: int,
        ran: int,
        sink: Sink,
        workspace: Workspace,
        scale: LossScale,
        samples_last: Collection[str] = (),
    ) -> None:
        self._samples_last = samples_last
        self._parameters = parameters
        self._n, self._ran = n, ran
        self._sink = sink
        self._workspace = workspace
        self._scale = scale
        self._waiting: list[tuple[Record, Tensor]] = []
        self._calls = dict.fromkeys(parameters, 0)
        self._fired = dict.fromkeys(parameters, 0)
        self._sums: dict[str, Tensor] = {}
        self._lender = sink if isinstance(sink, Lender) else None
        # Rows of a scaled loss are those of the scale of their own pass.
        self._deferrer: Deferrer | None = None
        if isinstance(sink, Deferrer) and not scale.is_active:
            self._deferrer = sink
        self._skipper = sink if isinstance(sink, Skipper) else None

    def on_call(self, name: str, operation: Operation, call: Call, output: Tensor) -> Tensor:
        """Attach the gradient hook to the output of a call."""
        call = replace(call, samples_first=name not in self._samples_last)
        record: Record | None = Record(name, operation, call, output)
        if not output.requires_grad:
            output = make_root(output)
        self._calls[name] += 1

        def hook(grad_output: Tensor | None) -> None:
            nonlocal record
            if grad_output is None or record is None:
                return
            if self._scale.is_active:
                self._waiting.append((record, grad_output.detach()))
                return
            arrived, record = record, None  # frees the input during the backward pass
            with torch.no_grad():
                self._arrive(arrived, grad_output)

        hookable(output).register_hook(hook)  # type: ignore[no-untyped-call]
        return output

    def backward(self, total: Tensor) -> None:
        """Run the backward pass of the summed losses, with a loss scale that does not overflow.

        If the smallest scale overflows, the gradients are passed on as they are; the sink reports
        the parameter and the sample.
        """
        self._skip_unused()
        if not self._scale.is_active:
            torch.autograd.backward(total)
            return
        while True:
            self._waiting.clear()
            torch.autograd.backward(self._scale.scaled(total), retain_graph=True)
            if all_finite(gradient for _, gradient in self._waiting):
                break
            if not self._scale.back_off():
                break

    def _skip_unused(self) -> None:
        """Tell a sink that asks for it which parameters were not called."""
        if self._skipper is None:
            return
        for name in [name for name, calls in self._calls.items() if calls == 0]:
            del self._calls[name]
            self._skipper.skip(name)

    def _arrive(self, record: Record, grad_output: Tensor) -> None:
        name = record.name
        parameter = self._parameters[name]
        shape = (self._n, *parameter.shape)
        self._fired[name] += 1
        if self._calls[name] == 1:
            if self._is_deferred(record, grad_output):
                return
            rows = self._room(name, "rows")
            record.fill(grad_output, rows, self._workspace, self._scale, self._ran)
            self._sink(name, rows)
            return
        if name not in self._sums:
            total = self._sums[name] = self._room(name, f"sum {name}")
            record.fill(grad_output, total, self._workspace, self._scale, self._ran)
        else:
            rows = self._workspace.take("rows", shape, parameter, row_dtype(parameter))
            record.fill(grad_output, rows, self._workspace, self._scale, self._ran)
            self._sums[name].add_(rows)
        if self._fired[name] == self._calls[name]:
            self._sink(name, self._sums[name])

    def _is_deferred(self, record: Record, grad_output: Tensor) -> bool:
        """Return whether the sink keeps the only call of a parameter instead of its rows."""
        deferrer, name = self._deferrer, record.name
        if deferrer is None:
            return False
        shape = (self._n, *self._parameters[name].shape)
        nbytes = (record.call.input.nbytes + grad_output.nbytes) * self._n // self._ran
        if not deferrer.defers(name, shape, nbytes):
            return False
        fill = record.kept(grad_output, self._n, self._ran, self._workspace)
        deferrer.defer(name, shape, fill)
        return True

    def flush(self) -> None:
        """Pass the remaining rows to the sink after the backward pass.

        These are the stored ones, and sums with a call that does not affect the loss.
        """
        self._waiting.reverse()
        with torch.no_grad():
            while self._waiting:
                self._arrive(*self._waiting.pop())
        for name, calls in self._calls.items():
            if self._fired[name] == calls > 0:
                continue
            if name in self._sums:
                self._sink(name, self._sums[name])
            else:
                self._sink(name, self._room(name, "rows").zero_())
        self._scale.passed()

    def _room(self, name: str, purpose: str) -> Tensor:
        """Return memory for the rows of a parameter, lent by the sink if it can."""
        parameter = self._parameters[name]
        shape = (self._n, *parameter.shape)
        lent = None if self._lender is None else self._lender.room(name, shape)
        if lent is not None:
            return lent
        return self._workspace.take(purpose, shape, parameter, row_dtype(parameter))
