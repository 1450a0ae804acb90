"""A backbone with frozen heads as one module, for pruning and fine-tuning on tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsal.errors import InvalidArgument
from fastsal.gradients import select_parameters
from fastsal.models.classifier import class_count, classifier_of
from fastsal.models.evaluating import set_modes
from fastsal.models.features import feature_outputs
from fastsal.models.outputs import output_tensor
from fastsal.transfer.linear_head import Head
from fastsal.transfer.own import OwnHead

PREFIX = "backbone."


class Headed(nn.Module):
    """A backbone followed by the frozen heads of one or more tasks.

    The backbone is shared, not copied: changes to its weights affect the original module. Its
    parameters are prefixed with `"backbone."`; the parameters of the heads need no gradients.

    Args:
        backbone: Model without or with a classifier.
        heads: Linear heads, or the model's own; the logits of several heads are concatenated.

    Raises:
        InvalidArgument: `heads` is empty or has a head that is not differentiable.
    """

    def __init__(self, backbone: nn.Module, heads: Sequence[Head | OwnHead]) -> None:
        super().__init__()
        if not heads:
            raise InvalidArgument("heads must hold at least one head")
        self.backbone = backbone
        self.columns: list[list[int] | None] = []
        self.linear = nn.ModuleList()
        place = next((p.device for p in backbone.parameters()), torch.device("cpu"))
        for head in heads:
            if isinstance(head, OwnHead):
                self.columns.append(None if head.columns is None else list(head.columns))
                self.linear.append(nn.Identity())
            elif isinstance(head, Head):
                self.columns.append(None)
                self.linear.append(head.linear().to(place))
            else:
                raise InvalidArgument(
                    "heads must be differentiable (linear heads or the model's own), got a "
                    f"{type(head).__name__}"
                )
        self.is_own = [isinstance(head, OwnHead) for head in heads]
        counts = [_outputs(backbone, head) for head in heads]
        # Number of logits; None if unknown.
        self.num_classes = None if None in counts else sum(n for n in counts if n is not None)
        # The backbone keeps its modes, which may differ between its layers.
        self.training = backbone.training
        set_modes(self.linear, backbone.training)

    def forward(self, images: Tensor) -> Tensor:
        """Map images `[n, c, h, w]` to the logits of all heads, `[n, k]`."""
        features = None if all(self.is_own) else feature_outputs(self.backbone, images)
        own: Any = output_tensor(self.backbone(images)) if any(self.is_own) else None
        found = []
        for is_own, columns, layer in zip(self.is_own, self.columns, self.linear, strict=True):
            if not is_own:
                found.append(layer(features))
            else:
                found.append(own if columns is None else own[:, columns])
        return found[0] if len(found) == 1 else torch.cat(found, dim=1)

    def forward_features(self, images: Tensor) -> Tensor:
        """Map images `[n, c, h, w]` to the features that the heads receive, `[n, f]`."""
        return feature_outputs(self.backbone, images)

    def get_classifier(self) -> list[nn.Module]:
        """Return the heads and the classifier of the backbone, which fine-tuning freezes."""
        return [*self.linear, *classifier_of(self.backbone)]


def _outputs(backbone: nn.Module, head: Head | OwnHead) -> int | None:
    """Return the number of logits of a head; None if unknown."""
    if isinstance(head, OwnHead):
        return class_count(backbone) if head.columns is None else len(head.columns)
    return head.outputs


class SegmentedCrossEntropy:
    """Cross-entropy of concatenated logits; the softmax runs over the task of the label only.

    Args:
        sizes: Number of classes of each task; label l of task i is `sum(sizes[:i]) + l`.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        ends = torch.tensor(sizes, device="cpu").cumsum(0)
        self.first = torch.repeat_interleave(
            ends - torch.tensor(sizes, device="cpu"), torch.tensor(sizes, device="cpu")
        )
        self.end = torch.repeat_interleave(ends, torch.tensor(sizes, device="cpu"))

    def __call__(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the losses `[n]` of outputs `[n, k]`, in nats."""
        label = labels[:, None]
        mine = (label >= self.first.to(label.device)) & (label < self.end.to(label.device))
        return F.cross_entropy(
            outputs.float().masked_fill(~mine, -torch.inf), labels, reduction="none"
        )


def backbone_parameters(
    model: nn.Module, parameters: str | Sequence[str] | None = None
) -> list[str]:
    """Name the weights of a backbone that are pruned.

    Args:
        model: Backbone, with or without a classifier.
        parameters: Names or patterns, as for `select_parameters`; None selects the default weights
            except those of the classifier.
    """
    chosen = select_parameters(model, parameters)
    if parameters is not None:
        return list(chosen)
    head = {p for module in classifier_of(model) for p in module.parameters()}
    return [name for name, p in chosen.items() if p not in head]
