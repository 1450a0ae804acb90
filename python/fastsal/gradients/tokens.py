"""Token ids as model inputs: the graph starts at their embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastsal.gradients.capture import make_root


class TokenLookups(TorchFunctionMode):
    """Starts the graph at the embeddings of tokens, as `requires_grad_` does at images.

    Args:
        tokens: Input of the model, integers. Lookups of views of it are intercepted, and those of
            integer tensors of the same size that are computed from it, such as tokens of another
            type or with an offset.

    Attributes:
        outputs: Results of the lookups, which require gradients.
    """

    def __init__(self, tokens: Tensor) -> None:
        super().__init__()
        self._size = tokens.numel()
        # Referenced, so that their memory is not reused by other tensors.
        self._followed: dict[int | None, Tensor] = {_memory(tokens): tokens}
        self.outputs: list[Tensor] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run one torch function, and start the graph at its output if it looks tokens up."""
        del types
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if not isinstance(output, Tensor) or not self._is_followed((*args, *kwargs.values())):
            return output
        if func is F.embedding and torch.is_grad_enabled():
            if not output.requires_grad:
                output = make_root(output)
            self.outputs.append(output)
        elif not output.is_floating_point() and output.numel() == self._size:
            self._followed[_memory(output)] = output
        return output

    def _is_followed(self, arguments: Iterable[Any]) -> bool:
        return any(isinstance(x, Tensor) and _memory(x) in self._followed for x in arguments)


def _memory(tensor: Tensor) -> int | None:
    """Return the address of a tensor's storage, or None if it is not strided."""
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else None
