"""Commands on models whose layers differ from what their parameters or their order suggest."""

from __future__ import annotations

import json

import pytest
import torch

import fastsal
from fastsal.models.loading import load_model

from .commands import failed, run

MODELS = """
import torch
from timm.layers import StdConv2d
from torch import nn


class HeadFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(2, 3)
        self.conv = nn.Conv2d(3, 6, 3)
        self.embed = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(torch.relu(self.embed(torch.relu(self.conv(x)).mean((2, 3)))))


def first():
    return HeadFirst()


def standardized():
    return nn.Sequential(StdConv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(6, 3))


def transposed():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 4, 3), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(4, 3))
"""


@pytest.fixture
def models(tmp_path):
    path = tmp_path / "models.py"
    path.write_text(MODELS)
    return path


def test_labels_fit_the_layer_that_produces_the_output(models, tiny_npz, tmp_path):
    spec = f"{models}:first"
    done = run("eval", spec, "--data", tiny_npz, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["samples"] == 60
    base = ["--data", tiny_npz, "--quiet", "--json"]
    pruned = tmp_path / "pruned"
    done = run("prune", spec, *base, "--sparsity", 0.5, "--curvature", "features", "--out", pruned)
    assert done.exit_code == 0, done.output
    assert list(json.loads(done.stdout)["parameters"]) == ["conv.weight", "embed.weight"]
    train = ["finetune", spec, "--weights", pruned, *base, "--epochs", 1, "--lr", 0.1]
    for name, head in (("found", ()), ("named", ("--head", "embed"))):
        done = run(*train, *head, "--out", tmp_path / name)
        assert done.exit_code == 0, done.output
        before = load_model(spec, weights=pruned / "model.safetensors").state_dict()
        after = load_model(spec, weights=tmp_path / name / "model.safetensors").state_dict()
        frozen = {key for key, value in after.items() if torch.equal(value, before[key])}
        still = "embed" if head else "head"
        assert {f"{still}.weight", f"{still}.bias"} <= frozen
        assert ("head.bias" in frozen) == (not head)
    failed(run(*train, "--head", "haed", "--out", tmp_path / "none"), "head must name a layer")


def test_zeros_of_weights_in_use_are_told(models, tiny_npz, tmp_path):
    spec, out = f"{models}:standardized", tmp_path / "run"
    done = run(
        "prune", spec, "--data", tiny_npz, "--sparsity", 0.7, "--criterion", "magnitude",
        "--no-compensate", "--quiet", "--out", out,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert done.stderr.count("zeros of the parameter are not zeros of the weight in use") == 1
    assert "left out: 1 parameter, 3 of 183 weights (1.6 %): biases" in done.stdout
    assert "weights in use: sparsity 0." in done.stdout
    report = json.loads((out / "report.json").read_text())
    assert report["in_use"]["sparsity"] < 0.3
    assert list(report["in_use"]["computed"]) == ["0.weight"]
    assert report["left_out"]["names"] == ["4.bias"]
    weights = ["--weights", out / "model.safetensors", "--masks", out]
    for target in ([out], [spec, *weights]):
        done = run("verify", *target)
        assert done.exit_code == 0, done.output
        assert "weights in use: sparsity 0." in done.stdout
        found = json.loads(run("verify", *target, "--json").stdout)
        assert found["in_use"] == report["in_use"]


def test_patterns_of_files_of_scores_lie_along_the_input_axis(models, tmp_path):
    spec, scores, masks = (
        f"{models}:transposed",
        tmp_path / "s.safetensors",
        tmp_path / "m.safetensors",
    )
    done = run(
        "score", spec, "--criterion", "magnitude", "--parameters", "*.weight", "--parameters",
        "1.weight", "--out", scores,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "left out: 3 parameters" in done.stdout
    assert run("rank", scores, "--pattern", "2:4", "--out", masks).exit_code == 0
    found = fastsal.Masks.load(masks)
    assert found.recipe["input_axes"] == {"1.weight": [1, 8, 36]}
    kept = found["1.weight"].reshape(2, 4, -1).sum(1)
    assert int(kept.min()) == int(kept.max()) == 2
    model = load_model(spec)
    expected = fastsal.prune(
        model, None, pattern="2:4", criterion="magnitude", compensate=False, parameters=list(found)
    )
    assert expected.masks == found
