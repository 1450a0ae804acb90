"""A backbone with the frozen head of a task on it, as one module: what pruning and training see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsal.errors import InvalidArgument
from fastsal.gradients import select_parameters
from fastsal.models.classifier import classifier_of
from fastsal.models.features import feature_outputs
from fastsal.transfer.linear_head import Head
from fastsal.transfer.own import OwnHead

PREFIX = "backbone."


class Headed(nn.Module):
    """Images to the logits of one or more tasks, through one backbone and their frozen heads.

    The backbone is not copied: what is done to its weights here is done to it. Its parameters have
    their own names after `"backbone."`; the heads have none that need gradients.

    Args:
        backbone: the model.
        heads: linear heads, or the model's own; with several, their logits stand side by side.

    Raises:
        InvalidArgument: no head, or one through which no gradient goes.
    """

    def __init__(self, backbone: nn.Module, heads: Sequence[Head | OwnHead]) -> None:
        super().__init__()
        if not heads:
            raise InvalidArgument("heads: is empty; takes one or more")
        self.backbone = backbone
        self.columns: list[list[int] | None] = []
        self.linear = nn.ModuleList()
        for head in heads:
            if isinstance(head, OwnHead):
                self.columns.append(None if head.columns is None else list(head.columns))
                self.linear.append(nn.Identity())
            elif isinstance(head, Head):
                self.columns.append(None)
                self.linear.append(head.linear())
            else:
                raise InvalidArgument(
                    f"heads: no gradient goes through a {type(head).__name__}; takes linear heads, "
                    "or the model's own"
                )
        self.is_own = [isinstance(head, OwnHead) for head in heads]
        self.train(backbone.training)

    def forward(self, images: Tensor) -> Tensor:
        """Map images `[n, c, h, w]` to logits `[n, k]`, k the classes of all heads together."""
        features = None if all(self.is_own) else feature_outputs(self.backbone, images)
        own: Any = self.backbone(images) if any(self.is_own) else None
        found = []
        for is_own, columns, layer in zip(self.is_own, self.columns, self.linear, strict=True):
            if not is_own:
                found.append(layer(features))
            else:
                found.append(own if columns is None else own[:, columns])
        return found[0] if len(found) == 1 else torch.cat(found, dim=1)

    def forward_features(self, images: Tensor) -> Tensor:
        """Map images to what the heads are given, `[n, f]`."""
        return feature_outputs(self.backbone, images)

    def get_classifier(self) -> list[nn.Module]:
        """The heads and the backbone's own classifier: what fine-tuning leaves as it is."""
        return [*self.linear, *classifier_of(self.backbone)]


class SegmentedCrossEntropy:
    """Cross-entropy of logits that stand side by side: each label competes in its own task only.

    Args:
        sizes: classes of each task; label l of task i is `sum(sizes[:i]) + l`.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        ends = torch.tensor(sizes).cumsum(0)
        self.first = torch.repeat_interleave(ends - torch.tensor(sizes), torch.tensor(sizes))
        self.end = torch.repeat_interleave(ends, torch.tensor(sizes))

    def __call__(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the losses `[n]` of outputs `[n, k]`."""
        label = labels[:, None]
        mine = (label >= self.first.to(label.device)) & (label < self.end.to(label.device))
        return F.cross_entropy(
            outputs.float().masked_fill(~mine, -torch.inf), labels, reduction="none"
        )


def backbone_parameters(
    model: nn.Module, parameters: str | Sequence[str] | None = None
) -> list[str]:
    """Name the weights of a backbone that are pruned: all that `select_parameters` gives, but for
    the classifier's where `parameters` is None.
    """  # noqa: D205
    chosen = select_parameters(model, parameters)
    if parameters is not None:
        return list(chosen)
    head = {p for module in classifier_of(model) for p in module.parameters()}
    return [name for name, p in chosen.items() if p not in head]
