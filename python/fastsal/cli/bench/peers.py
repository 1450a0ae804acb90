"""Alternatives that fastsal is compared with, each loaded as its users would load it."""

from __future__ import annotations

import ast
import importlib.util
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap


def sparseml_fisher() -> Any:
    """Return SparseML's `EmpiricalBlockFisherInverse` without importing the package.

    The package itself does not import with current versions of torch.

    Install it with `pip install --no-deps sparseml==1.8.0`.

    Raises:
        ImportError: SparseML is not installed.
    """
    spec = importlib.util.find_spec("sparseml")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("pip install --no-deps sparseml==1.8.0")
    root = Path(next(iter(spec.submodule_search_locations)))
    file = root / "pytorch" / "sparsification" / "pruning" / "modifier_pruning_obs.py"
    tree = ast.parse(file.read_text())
    name = "EmpiricalBlockFisherInverse"
    found: list[ast.stmt] = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name]
    scope: dict[str, Any] = {"torch": torch, "math": math, "Tensor": Tensor}
    exec(compile(ast.Module(found, []), str(file), "exec"), scope)
    return scope[name]


def torch_fisher(gradients: Tensor, block_size: int) -> Tensor:
    """Return `F_b` of all blocks from one batched product, `[blocks, B, B]`."""
    n = gradients.shape[0]
    blocks = gradients.reshape(n, -1, block_size).permute(1, 2, 0)
    return torch.bmm(blocks, blocks.mT) / n


def torch_inverse_diagonal(fisher: Tensor, damping: float) -> Tensor:
    """Return `diag((F + λI)⁻¹)` by batched Cholesky and inverse, in the dtype of `fisher`."""
    damped = fisher + damping * torch.eye(fisher.shape[1], dtype=fisher.dtype)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return inverse.diagonal(dim1=1, dim2=2)


def torch_compensation(damped: Tensor, weights: Tensor, kept: Tensor) -> Tensor:
    """Return compensated weights `[blocks, B]` of blocks `F + λI` by batched Cholesky."""
    both = kept[:, :, None] & kept[:, None, :]
    inside = torch.where(both, damped, torch.eye(damped.shape[1], dtype=damped.dtype))
    step = torch.einsum("bij,bj->bi", damped, weights * ~kept) * kept
    moved = torch.cholesky_solve(step[:, :, None], torch.linalg.cholesky(inside))[:, :, 0]
    return (weights + moved) * kept


def torch_dual_diagonal(gradients: Tensor, block_size: int, damping: float) -> Tensor:
    """Return `diag((F + λI)⁻¹)` of all blocks from the Gram matrices of their gradients."""
    n = gradients.shape[0]
    blocks = gradients.reshape(n, -1, block_size).permute(1, 0, 2)
    gram = torch.bmm(blocks, blocks.mT) + n * damping * torch.eye(n)
    solved = torch.linalg.solve_triangular(torch.linalg.cholesky(gram), blocks, upper=False)
    diagonal: Tensor = (1 - solved.square().sum(1)) / damping
    return diagonal


def torch_n_of_m(scores: Tensor, n: int, m: int) -> Tensor:
    """Return the mask of the `n` largest of every `m` neighbors."""
    groups = scores.view(-1, m)
    kept = torch.zeros(groups.shape, dtype=torch.bool)
    return kept.scatter_(1, groups.topk(n, dim=1).indices, True).view(scores.shape)


def torch_func_gradients(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return per-sample gradients of the cross-entropy by `torch.func`, name to `[n, *shape]`."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        logits = functional_call(model, (parameters, buffers), (image[None],))
        return nn.functional.cross_entropy(logits, label[None])

    result: dict[str, Tensor] = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, images, labels)
    return result


def plain_passes(model: nn.Module, images: Tensor, labels: Tensor, micro_batch: int) -> None:
    """Run the forward and backward passes of a training step without an optimizer."""
    for start in range(0, len(images), micro_batch):
        part = slice(start, start + micro_batch)
        model.zero_grad(set_to_none=True)
        loss = nn.functional.cross_entropy(model(images[part]), labels[part])
        loss.backward()  # type: ignore[no-untyped-call]
    model.zero_grad(set_to_none=True)
