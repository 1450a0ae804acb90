"""The hooks of one forward and backward pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from fastsal.errors import UnsupportedLayer
from fastsal.gradients.capture import hookable, make_root
from fastsal.gradients.registry import Call, Operation
from fastsal.gradients.workspace import Workspace

Sink = Callable[[str, Tensor], None]


@runtime_checkable
class Lender(Protocol):
    """A sink that lends the memory that rows are written to, so that it need not copy them."""

    def room(self, name: str, shape: Sequence[int]) -> Tensor | None:
        """Return contiguous memory `[n, *shape]` in the parameter's dtype, or None."""


class Record:
    """One call of an operation on a tracked weight, kept until its gradient arrives."""

    def __init__(self, name: str, operation: Operation, call: Call, output: Tensor) -> None:
        self.name = name
        self.operation = operation
        # The same memory and version counter as the input, without its graph.
        self.call = replace(call, input=call.input.detach())
        self.version = call.input._version
        self.output_shape = output.shape

    def check_input(self) -> None:
        """Raise UnsupportedLayer if the input was changed in place after the call."""
        if self.call.input._version != self.version:
            raise UnsupportedLayer(
                f"{self.name}: the input of its {self.operation.name} call was modified in place "
                "after the call, so the gradient of the weight is lost; "
                "make that operation out of place (inplace=False)"
            )

    def fill(self, grad_output: Tensor, out: Tensor, workspace: Workspace) -> None:
        """Write the rows [n, *shape] of this call into `out`.

        Raises:
            UnsupportedLayer: The input was changed in place, or its first axis does not hold
                the samples.
        """
        self.check_input()
        x = self.call.input
        leading = x.shape[0] if self.call.samples_first else math.prod(x.shape[:-1])
        if leading % out.shape[0]:
            raise UnsupportedLayer(
                f"{self.name}: the input of its {self.operation.name} call, {list(x.shape)}, "
                f"does not hold {out.shape[0]} samples as it did in the first batch"
            )
        call = replace(self.call, input=x.to(out.dtype))
        dy = grad_output.reshape(self.output_shape).to(out.dtype)
        self.operation.rule(call, dy, out, workspace)


class Pass:
    """Forms rows as gradients arrive, and hands each parameter over once."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        n: int,
        sink: Sink,
        workspace: Workspace,
        samples_last: Collection[str] = (),
    ) -> None:
        self._samples_last = samples_last
        self._parameters = parameters
        self._n = n
        self._sink = sink
        self._workspace = workspace
        self._calls = dict.fromkeys(parameters, 0)
        self._fired = dict.fromkeys(parameters, 0)
        self._sums: dict[str, Tensor] = {}
        self._lender = sink if isinstance(sink, Lender) else None

    def on_call(self, name: str, operation: Operation, call: Call, output: Tensor) -> Tensor:
        """Attach the hook to the output of a call."""
        call = replace(call, samples_first=name not in self._samples_last)
        record: Record | None = Record(name, operation, call, output)
        if not output.requires_grad:
            output = make_root(output)
        self._calls[name] += 1

        def hook(grad_output: Tensor | None) -> None:
            nonlocal record
            if grad_output is None or record is None:
                return
            arrived, record = record, None  # frees the input as the backward pass goes
            with torch.no_grad():
                self._arrive(arrived, grad_output)

        hookable(output).register_hook(hook)  # type: ignore[no-untyped-call]
        return output

    def _arrive(self, record: Record, grad_output: Tensor) -> None:
        name = record.name
        parameter = self._parameters[name]
        shape = (self._n, *parameter.shape)
        self._fired[name] += 1
        if self._calls[name] == 1:
            rows = self._room(name, "rows")
            record.fill(grad_output, rows, self._workspace)
            self._sink(name, rows)
            return
        if name not in self._sums:
            self._sums[name] = self._room(name, f"sum {name}")
            record.fill(grad_output, self._sums[name], self._workspace)
        else:
            rows = self._workspace.take("rows", shape, parameter)
            record.fill(grad_output, rows, self._workspace)
            self._sums[name].add_(rows)
        if self._fired[name] == self._calls[name]:
            self._sink(name, self._sums[name])

    def flush(self) -> None:
        """Hand over what the backward pass left: sums with a call that did not reach the loss."""
        for name, calls in self._calls.items():
            if self._fired[name] == calls > 0:
                continue
            if name in self._sums:
                self._sink(name, self._sums[name])
            else:
                self._sink(name, self._room(name, "rows").zero_())

    def _room(self, name: str, purpose: str) -> Tensor:
        """Memory for the rows that the sink will get."""
        parameter = self._parameters[name]
        shape = (self._n, *parameter.shape)
        lent = None if self._lender is None else self._lender.room(name, shape)
        return self._workspace.take(purpose, shape, parameter) if lent is None else lent
