"""A target selects the layers whose zeros it uses, and refuses what does not pay there."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import fastsal
from fastsal.cli import main
from fastsal.errors import InvalidArgument
from fastsal.pruning.targets import target_parameters, target_ranking
from fastsal.utils.choices import TARGETS


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.point = nn.Conv2d(8, 8, 1)
        self.depth = nn.Conv2d(8, 8, 1, groups=8)
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(self.norm(self.depth(self.point(self.stem(x)))).mean((2, 3)))


@pytest.mark.parametrize(
    ("target", "names"),
    [
        ("xnnpack", ["point"]),
        ("coreml", ["stem", "point", "depth", "fc"]),
        ("openvino", ["fc"]),
        ("tensorrt", ["point", "fc"]),
        ("torch", ["point", "fc"]),
    ],
)
def test_layers(target, names):
    assert target_parameters(target, Net()) == [f"{name}.weight" for name in names]


def test_a_model_without_such_layers_is_refused():
    with pytest.raises(InvalidArgument, match="model must have convolutions of kernel size 1"):
        target_parameters("xnnpack", nn.Sequential(nn.Linear(4, 4)))


@pytest.mark.parametrize(
    ("target", "given", "found"),
    [
        ("xnnpack", (0.7, None), (0.7, None)),
        ("xnnpack", (None, None), (None, None)),
        ("coreml", (0.75, None), (0.75, None)),
        ("coreml", (None, "1:4"), (None, "1:4")),
        ("coreml", (None, "8:16"), (None, "8:16")),
        ("openvino", (0.8, None), (0.8, None)),
        ("tensorrt", (None, None), (None, "2:4")),
        ("torch", (None, "2:4"), (None, "2:4")),
    ],
)
def test_what_pays(target, given, found):
    assert target_ranking(target, *given) == found


@pytest.mark.parametrize(
    ("target", "given", "message"),
    [
        ("xnnpack", (0.5, None), "sparsity must be at least 0.67 for target xnnpack"),
        ("xnnpack", (None, "2:4"), "pattern must be None for target xnnpack, got 2:4"),
        ("coreml", (0.7, None), "sparsity must be at least 0.75 for target coreml"),
        ("coreml", (None, "3:4"), "M a divisor of 16 and N at most half of it, got 3:4"),
        ("coreml", (None, "1:5"), "M a divisor of 16"),
        ("coreml", (None, "1x4"), "pattern must be N:M"),
        ("openvino", (0.5, None), "sparsity must be at least 0.7 for target openvino"),
        ("tensorrt", (0.5, None), "pattern must be 2:4 for target tensorrt, got sparsity 0.5"),
        ("torch", (None, "1:4"), "pattern must be 2:4 for target torch, got 1:4"),
        ("tflite", (0.9, None), "target must be"),
    ],
)
def test_what_does_not_pay_is_refused(target, given, message):
    with pytest.raises(InvalidArgument, match=message):
        target_ranking(target, *given)


def test_the_command(tmp_path):
    def invoke(*arguments):
        how = ["prune", "test_efficientnet", "--criterion", "magnitude", "--no-compensate",
               "--quiet", "--json"]  # fmt: skip
        return CliRunner().invoke(main, [*how, *map(str, arguments)])

    done = invoke("--target", "xnnpack", "--sparsity", 0.8, "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["sparsity"] == pytest.approx(0.8, abs=1e-4)
    masks = fastsal.Masks.load(tmp_path / "run" / "masks.safetensors")
    shapes = [tuple(masks[name].shape[2:]) for name in masks]
    assert set(shapes) == {(1, 1)}
    done = invoke("--target", "torch", "--out", tmp_path / "semi")
    assert done.exit_code == 0, done.output
    masks = fastsal.Masks.load(tmp_path / "semi" / "masks.safetensors")
    for name in masks:
        groups = masks[name].movedim(1, -1).reshape(-1, 4)
        assert torch.equal(groups.sum(1), torch.full((len(groups),), 2))
    for wrong in (["--sparsity", 0.5], ["--sparsity", 0.9, "--parameters", "conv*"],
                  ["--sparsity", 0.9, "--structure", "mlp", "--data", tmp_path]):  # fmt: skip
        done = invoke("--target", "xnnpack", "--out", tmp_path / "no", *wrong)
        assert done.exit_code == 2, done.output
    assert not (tmp_path / "no").exists()


def test_every_target_has_a_use():
    for target in TARGETS:
        assert target_parameters(target, Net())
