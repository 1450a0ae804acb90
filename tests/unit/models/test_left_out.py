"""What is not pruned is told, and attention is pruned by default."""

from __future__ import annotations

import timm
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import fastsal
from fastsal.models.left_out import left_out
from fastsal.models.selection import select_parameters

from ..gradients.oracle import loop, randomize


class Vit(nn.Module):
    """A small vision transformer in the form of torchvision's, with nn.MultiheadAttention."""

    def __init__(self, width=16, depth=2):
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, stride=4)
        self.pos = nn.Parameter(torch.randn(1, 4, width) / 9)
        layer = nn.TransformerEncoderLayer(width, 2, 2 * width, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        tokens = self.patch(x).flatten(2).mT + self.pos
        return self.head(self.norm(self.encoder(tokens)).mean(1))


def vit(dtype=torch.float32):
    torch.manual_seed(0)
    return randomize(Vit().to(dtype))


def data(dtype=torch.float32):
    torch.manual_seed(1)
    return torch.randn(6, 3, 8, 8, dtype=dtype), torch.arange(6) % 5


def test_nine_tenths_of_a_transformer_are_nine_tenths_of_its_matrices():
    model = vit()
    result = fastsal.prune(model, None, 0.9, criterion="magnitude", compensate=False)
    matrices = [p for name, p in model.named_parameters() if p.dim() > 1 and name != "pos"]
    zeros = sum(int((p == 0).sum()) for p in matrices)
    assert abs(zeros / sum(p.numel() for p in matrices) - 0.9) < 1e-3
    assert "encoder.layers.0.self_attn.in_proj_weight" in result.masks


def test_gradients_of_projections_equal_autograd_by_their_rule():
    model = vit(torch.float64).eval()
    images, labels = data(torch.float64)
    chosen = select_parameters(model)
    rows = fastsal.per_sample_gradients(model, images, labels)
    torch.testing.assert_close(rows, loop(model, images, labels, list(chosen)))
    with fastsal.gradients.GradientEngine(model, chosen) as engine:
        engine.prepare(images, labels)
        assert engine.operations["encoder.layers.1.self_attn.in_proj_weight"] == "linear"


def test_projections_of_attention_between_sequences():
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.query = nn.Parameter(torch.randn(1, 2, 4, dtype=torch.float64))
            self.attend = nn.MultiheadAttention(4, 2, kdim=3, vdim=3, batch_first=True).double()
            self.fc = nn.Linear(4, 5).double()

        def forward(self, x):
            x = x.flatten(2).mT
            return self.fc(self.attend(self.query.expand(len(x), -1, -1), x, x)[0].mean(1))

    torch.manual_seed(0)
    model = Cross().eval()
    names = [f"attend.{n}_proj_weight" for n in "qkv"] + ["attend.out_proj.weight", "fc.weight"]
    assert sorted(select_parameters(model)) == sorted(names)
    images, labels = data(torch.float64)
    rows = fastsal.per_sample_gradients(model, images, labels)
    torch.testing.assert_close(rows, loop(model, images, labels, list(rows)))


def test_what_is_left_out_is_counted():
    model = vit()
    found = left_out(model, select_parameters(model))
    kept = sum(p.numel() for p in select_parameters(model).values())
    assert found.total == sum(p.numel() for p in model.parameters())
    assert found.weights == found.total - kept == sum(found.kinds.values())
    assert set(found.kinds) == {"biases", "normalization", "other parameters"}
    assert "pos" in found.names
    assert "head.weight" not in found.names
    assert str(found) == (
        f"left out: {len(found.names)} parameters, {found.weights} of {found.total:,} weights "
        f"({100 * found.weights / found.total:.1f} %): {', '.join(found.kinds)}"
    )


def test_kinds_of_what_is_left_out():
    model = nn.Sequential(
        nn.Embedding(5, 4), nn.Linear(4, 4), weight_norm(nn.Linear(4, 4)), nn.LSTM(4, 2),
        nn.ConvTranspose1d(4, 4, 2), nn.MultiheadAttention(4, 1), nn.Conv1d(4, 4, 1),
    )  # fmt: skip
    found = left_out(model, ["6.weight"])
    assert found.kinds == {
        "biases": 4 + 4 + 16 + 4 + 12 + 4 + 4, "embeddings": 20, "linear layers": 16 + 16,
        "parametrized weights": 20, "recurrent layers": 32 + 16, "transposed convolutions": 32,
        "attention projections": 48,
    }  # fmt: skip
    assert list(found.kinds.values()) == sorted(found.kinds.values(), reverse=True)
    assert str(left_out(nn.Linear(2, 2, bias=False), ["weight"])) == "left out: nothing"


def test_the_line_of_a_large_model():
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224")
    assert str(left_out(model, select_parameters(model))) == (
        "left out: 102 parameters, 0.275 M of 86.6 M weights (0.3 %): other parameters, biases, "
        "normalization"
    )


def test_prune_tells_what_it_left_out():
    model = vit()
    result = fastsal.prune(model, [data()], 0.5, parameters="!*proj*", damping=1e-3)
    assert "encoder.layers.0.self_attn.in_proj_weight" in result.left_out.names
    assert set(result.left_out.names) | set(result.masks) == {
        n for n, _ in model.named_parameters()
    }
    assert str(result.left_out) in repr(result)
