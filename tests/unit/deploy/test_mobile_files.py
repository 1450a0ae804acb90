"""Files of ExecuTorch, Core ML and LiteRT, where these are installed."""

from __future__ import annotations

import copy
import json
import sys

import pytest
import torch
from click.testing import CliRunner

import fastsal
from fastsal.cli import main
from fastsal.errors import FastsalError

pytestmark = pytest.mark.usefixtures("one_thread")


def smaller(name, structure, kept=0.3):
    """Return a narrow model with many zeros, and images."""
    torch.manual_seed(0)
    size = 224 if "vit" in name else 64
    model = fastsal.load_model(name, num_classes=3)
    x = torch.randn(3, 3, size, size)
    fastsal.prune_structure(model, [x], 0.3, structure=structure)
    masks = fastsal.Masks(
        {n: torch.rand(p.shape) < kept for n, p in model.named_parameters() if p.ndim > 1}
    )
    masks.apply(model)
    return model, x, masks


CASES = [("test_resnet", "channels"), ("test_efficientnet", "channels")]
cases = pytest.mark.parametrize(("name", "structure"), CASES)


@cases
def test_executorch(name, structure, tmp_path):
    pytest.importorskip("executorch", reason="needs the extra 'executorch'")
    model, x, masks = smaller(name, structure)
    before = copy.deepcopy(model.state_dict())
    found = fastsal.export(model, tmp_path / "m.pte", "executorch", images=x)
    assert found.difference < 1e-4
    assert found.bytes == (tmp_path / "m.pte").stat().st_size
    # Some layers are stored in an order of XNNPACK's own; their weights are not counted.
    zeros = masks.total - sum(masks.kept.values())
    assert 0.5 * zeros < found.zeros <= zeros
    assert found.zeros < found.values
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())
    with pytest.raises(FastsalError, match="differ from those of the model"):
        fastsal.export(model, tmp_path / "other.pte", "executorch", images=x, tolerance=1e-12)
    assert [p.name for p in tmp_path.iterdir()] == ["m.pte"]


def test_executorch_has_the_weights_of_linear_layers(tmp_path):
    pytest.importorskip("executorch", reason="needs the extra 'executorch'")
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(48, 32), torch.nn.ReLU(), torch.nn.Linear(32, 5)
    ).eval()
    weights = {n: p for n, p in model.named_parameters() if p.ndim > 1}
    masks = fastsal.Masks({n: torch.rand(p.shape) < 0.2 for n, p in weights.items()})
    masks.apply(model)
    x = torch.randn(4, 3, 4, 4)
    found = fastsal.export(model, tmp_path / "m.pte", "executorch", images=x)
    assert found.values == 48 * 32 + 32 * 5
    assert found.zeros == sum(int((p == 0).sum()) for p in weights.values())


@cases
def test_coreml(name, structure, tmp_path):
    pytest.importorskip("coremltools", reason="needs the extra 'coreml'")
    model, x, masks = smaller(name, structure)
    found = fastsal.export(model, tmp_path / "sparse.mlpackage", "coreml", images=x)
    assert (found.difference is None) == (sys.platform != "darwin")
    assert found.zeros >= 0.9 * (masks.total - sum(masks.kept.values()))
    assert found.zeros <= found.values
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1e-3)
    dense = fastsal.export(model, tmp_path / "dense.mlpackage", "coreml", images=x)
    assert found.bytes < 0.75 * dense.bytes


@cases
def test_litert(name, structure, tmp_path):
    pytest.importorskip("litert_torch", reason="needs the extra 'litert'")
    model, x, masks = smaller(name, structure)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            # A new ResNet multiplies its branches by zero: the converter would leave them out.
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    before = copy.deepcopy(model.state_dict())
    found = fastsal.export(model, tmp_path / "m.tflite", "litert", images=x)
    assert found.difference < 1e-4
    assert found.bytes == (tmp_path / "m.tflite").stat().st_size
    assert found.zeros == masks.total - sum(masks.kept.values())
    assert found.values == masks.total
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())
    with pytest.raises(FastsalError, match="differ from those of the model"):
        fastsal.export(model, tmp_path / "other.tflite", "litert", images=x, tolerance=1e-12)
    assert [p.name for p in tmp_path.iterdir()] == ["m.tflite"]


def test_the_command(tmp_path):
    pytest.importorskip("executorch", reason="needs the extra 'executorch'")
    model, _, masks = smaller("test_resnet", "channels")
    fastsal.save_run(tmp_path / "run", model, masks, "test_resnet", num_classes=3)
    given = ["export", str(tmp_path / "run"), "--format", "executorch", "--size", "64",
             "--out", str(tmp_path / "m.pte"), "--json"]  # fmt: skip
    done = CliRunner().invoke(main, given)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["format"] == "executorch"
