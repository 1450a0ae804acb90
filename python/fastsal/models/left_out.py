"""What a selection of parameters leaves out, and its share of the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from fastsal.models.normalization import normalization_layers

# Kinds of layers, the first that fits; a class is listed before those that it derives from.
_KINDS: list[tuple[str, tuple[type[nn.Module], ...]]] = [
    ("embeddings", (nn.Embedding, nn.EmbeddingBag)),
    ("parametrized weights", (parametrize.ParametrizationList,)),
    ("attention projections", (nn.MultiheadAttention,)),
    ("recurrent layers", (nn.RNNBase, nn.RNNCellBase)),
    (
        "transposed convolutions",
        (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    ),
    ("convolutions", (nn.Conv1d, nn.Conv2d, nn.Conv3d)),
    ("linear layers", (nn.Linear,)),
]


@dataclass(frozen=True)
class LeftOut:
    """The parameters of a model that a selection leaves out.

    Attributes:
        names: Their names, in the order of the model.
        weights: Number of their weights.
        total: Number of all weights of the model.
        kinds: Kind of parameters to number of weights, the largest first.
    """

    names: tuple[str, ...]
    weights: int
    total: int
    kinds: dict[str, int]

    @property
    def share(self) -> float:
        """Fraction of the weights of the model that are left out."""
        return self.weights / self.total if self.total else 0.0

    def __str__(self) -> str:
        if not self.names:
            return "left out: nothing"
        count = f"{len(self.names)} parameter{'s' if len(self.names) > 1 else ''}"
        return (
            f"left out: {count}, {_short(self.weights)} of {_short(self.total)} weights "
            f"({100 * self.share:.1f} %): {', '.join(self.kinds)}"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, with the share and the line of text."""
        return {
            "names": list(self.names),
            "weights": self.weights,
            "total": self.total,
            "share": self.share,
            "kinds": self.kinds,
            "text": str(self),
        }


def left_out(model: nn.Module, names: Iterable[str]) -> LeftOut:
    """Return what the named parameters of a model leave out."""
    every = dict(model.named_parameters(remove_duplicate=False))
    chosen = {id(every[name]) for name in names if name in every}
    kinds = _kinds(model)
    rest = {name: p for name, p in model.named_parameters() if id(p) not in chosen}
    counts: Counter[str] = Counter()
    for p in rest.values():
        counts[kinds[id(p)]] += p.numel()
    return LeftOut(
        tuple(rest),
        sum(p.numel() for p in rest.values()),
        sum(p.numel() for p in model.parameters()),
        dict(counts.most_common()),
    )


def _kinds(model: nn.Module) -> dict[int, str]:
    """Return the kind of each parameter, by its identity."""
    found: dict[int, str] = {}
    normalization = set(normalization_layers(model))
    for module in model.modules():
        for own, p in module.named_parameters(recurse=False):
            if module in normalization:
                kind = "normalization"
            elif "bias" in own and p.dim() <= 1:
                kind = "biases"
            else:
                some = (name for name, types in _KINDS if isinstance(module, types))
                kind = next(some, "other parameters")
            found.setdefault(id(p), kind)
    return found


def _short(count: int) -> str:
    return f"{count / 1e6:.3g} M" if count >= 100_000 else f"{count:,}"
