"""Commands on weights that training writes, on models with names of wrappers, and on hub ids."""

from __future__ import annotations

import argparse
import json

import numpy as np
import pytest
import torch

from fastsal.models.loading import load_model

from .commands import failed, run

OWN_NAMES = """
from torch import nn


class Own(nn.Module):
    def __init__(self, num_classes=3):
        super().__init__()
        self.module = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(8, num_classes),
        )

    def forward(self, x):
        return self.module(x)


def own(num_classes=3):
    return Own(num_classes)
"""


@pytest.fixture
def checkpoint(tiny_file, tmp_path):
    """As the training script of timm writes it, with an average of the weights."""
    path = tmp_path / "model_best.pth.tar"
    models = [load_model(f"{tiny_file}:tiny", seed=seed) for seed in (1, 2)]
    torch.save(
        {
            "epoch": 3,
            "arch": "tiny",
            "args": argparse.Namespace(lr=0.1, opt="sgd"),
            "state_dict": {f"module.{n}": v for n, v in models[0].state_dict().items()},
            "state_dict_ema": {f"_orig_mod.{n}": v for n, v in models[1].state_dict().items()},
            "metric": np.float64(71.5),
        },
        path,
    )
    return path


def measured(*arguments):
    result = run("eval", *arguments, "--json", "--quiet")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout), result.stderr


def test_the_average_of_a_checkpoint_is_loaded_and_told(checkpoint, tiny_file, tiny_npz, tmp_path):
    model = f"{tiny_file}:tiny"
    found, told = measured(model, "--weights", checkpoint, "--data", tiny_npz)
    assert len([line for line in told.splitlines() if "state_dict_ema" in line]) == 1
    torch.save(load_model(model, seed=2).state_dict(), tmp_path / "ema.bin")
    torch.save(load_model(model, seed=1).state_dict(), tmp_path / "plain.ckpt")
    assert found == measured(model, "--weights", tmp_path / "ema.bin", "--data", tiny_npz)[0]
    chosen, told = measured(
        model, "--weights", checkpoint, "--weights-key", "state_dict", "--data", tiny_npz
    )
    assert told == ""
    assert chosen == measured(model, "--weights", tmp_path / "plain.ckpt", "--data", tiny_npz)[0]
    assert chosen != found


def test_another_key_is_an_error_in_one_line(checkpoint, tiny_file, tiny_npz):
    options = ("--weights", checkpoint, "--weights-key", "model", "--data", tiny_npz)
    failed(
        run("eval", f"{tiny_file}:tiny", *options),
        "weights_key must be one of state_dict, state_dict_ema for",
    )


def test_a_file_with_code_is_an_error_in_one_line(tiny_file, tiny_npz, tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pt")
    result = run(
        "eval", f"{tiny_file}:tiny", "--weights", tmp_path / "model.pt", "--data", tiny_npz
    )
    failed(result, "save model.state_dict() alone")
    assert "\x1b" not in result.output
    assert "weights_only" not in result.output


def test_a_study_loads_the_entry_that_it_names(checkpoint, tiny_file, tiny_npz, tmp_path):
    from fastsal.study import load_study
    from fastsal.study.backbones import open_backbone
    from fastsal.transfer.tasks import Task

    (tmp_path / "study.toml").write_text(
        f"""
        name = "s"
        sparsities = [0.5]
        [[models]]
        model = "{tiny_file}:tiny"
        weights = "{checkpoint.name}"
        weights_key = "state_dict"
        [[tasks]]
        name = "t"
        data = "{tiny_npz.name}"
        [[sources]]
        tasks = ["t"]
        [[criteria]]
        criterion = "magnitude"
        """
    )
    study = load_study(tmp_path / "study.toml")
    assert study.models[0].weights_key == "state_dict"
    from fastsal.data.folders import load_images

    task = Task.split("t", load_images(tiny_npz))
    backbone = open_backbone(study, study.models[0], {"t": task}, tmp_path / "heads")
    expected = load_model(f"{tiny_file}:tiny", seed=1)
    assert torch.equal(backbone.model.fc.weight, expected.fc.weight)


def test_a_model_whose_names_begin_with_module_is_pruned_verified_and_evaluated(tiny_npz, tmp_path):
    (tmp_path / "own.py").write_text(OWN_NAMES)
    model, out = f"{tmp_path / 'own.py'}:own", tmp_path / "run"
    result = run(
        "prune", model, "--data", tiny_npz, "--sparsity", 0.5, "--quiet", "--out", out, "--test",
        tiny_npz, "--size", "native",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    report = json.loads((out / "report.json").read_text())
    assert set(report["parameters"]) == {"module.0.weight", "module.4.weight"}
    result = run("verify", out)
    assert result.exit_code == 0, result.output
    found, _ = measured(model, "--weights", out, "--data", tiny_npz)
    assert found["accuracy"] == report["accuracy"]["after"]["accuracy"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm/resnet18.a1_in1k", "check the connection"),
        ("hf-hub:timm/resnet18.a1_in1k", "check the connection"),
        ("hf-hub:someone/a-model", "check the connection"),
        ("someone/a-model", "did you mean 'hf-hub:someone/a-model'?"),
        ("timm/resnet1b", "did you mean 'resnet1"),
        (
            "hf-hub:no owner",
            "model must be a timm name, hf-hub:OWNER/NAME or path/file.py:function",
        ),
    ],
)
def test_hub_ids_without_a_network(monkeypatch, name, message, tiny_npz, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    result = run("eval", name, "--weights", "pretrained", "--data", tiny_npz)
    failed(result, message)
    assert "\x1b" not in result.output
