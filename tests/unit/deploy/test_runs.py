"""Runs of smaller models: written, built again, and used by the commands."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fastsal
from fastsal.cli import main
from fastsal.errors import FileFormatError, InvalidArgument
from fastsal.models.widths import METADATA, widths_of

MLP = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.fc2(torch.relu(self.fc1(x)))


def net(num_classes=3, width=6):
    return nn.Sequential(
        nn.Conv2d(3, width, 4, stride=4),
        nn.Flatten(2),
        Mean(),
        Block(width),
        nn.Linear(width, num_classes),
    )


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(dim=2)


def other():
    return net(width=5)
"""


@pytest.fixture
def mlp_file(tmp_path):
    path = tmp_path / "mlp.py"
    path.write_text(MLP)
    return path


def run(*arguments):
    done = CliRunner().invoke(main, [str(a) for a in arguments], prog_name="fastsal")
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture
def folder(tmp_path, mlp_file, tiny_npz):
    out = tmp_path / "run"
    run(
        "prune", f"{mlp_file}:net", "--data", tiny_npz, "--structure", "mlp", "--sparsity", 0.5,
        "--num-classes", 3, "--out", out, "--test", tiny_npz, "--quiet",
    )  # fmt: skip
    return out


def test_the_model_of_a_run_is_smaller(folder, mlp_file):
    model = fastsal.load_run(folder)
    assert not model.training
    assert model[3].fc1.out_features == model[3].fc2.in_features == 12
    state = load_file(folder / "model.safetensors")
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    dense = fastsal.load_model(f"{mlp_file}:net")
    assert list(dense.state_dict()) == list(model.state_dict())
    report = json.loads((folder / "report.json").read_text())
    assert report["structure"]["widths"] == {"3.fc1": [24, 12]}
    assert {"before", "after"} <= report["accuracy"].keys()
    # The file alone is enough.
    again = fastsal.load_model(f"{mlp_file}:net", weights=folder / "model.safetensors")
    assert widths_of(again) == widths_of(model)
    # Loading the file again into the smaller model, too.
    fastsal.models.load_weights(again, folder / "model.safetensors")


def test_measurements_are_made_at_the_size_of_the_run(folder, mlp_file, tiny_npz, tmp_path):
    """The model takes images of any size, and says nothing about its own."""
    assert json.loads((folder / "report.json").read_text())["image_size"] == [8, 8]
    short = ("--batch", 1, "--seconds", 0.01, "--json")
    macs = [
        json.loads(run("measure", folder, *short, *more))["dense"]["macs"]
        for more in ([], ["--size", 32], ["--save"])
    ]
    assert macs[0] == macs[2] < macs[1]
    saved = json.loads((folder / "measurement.json").read_text())
    assert saved["dense"]["macs"] == macs[0]
    tuned = tmp_path / "tuned"
    run(
        "finetune", f"{mlp_file}:net", "--weights", folder, "--data", tiny_npz, "--epochs", 1,
        "--lr", 0.01, "--out", tuned, "--quiet",
    )  # fmt: skip
    assert json.loads(run("measure", tuned, *short))["dense"]["macs"] == macs[0]
    masked = tmp_path / "masked"
    run(
        "prune", f"{mlp_file}:net", "--data", tiny_npz, "--sparsity", 0.5, "--criterion",
        "magnitude", "--size", 16, "--out", masked, "--quiet",
    )  # fmt: skip
    assert json.loads((masked / "report.json").read_text())["image_size"] == [16, 16]


def test_commands_work_on_it(folder, mlp_file, tiny_npz, tmp_path):
    model = f"{mlp_file}:net"
    said = json.loads(run("eval", model, "--weights", folder, "--data", tiny_npz, "--json"))
    assert 0 <= said["accuracy"] <= 1
    assert "OK" in run("verify", folder)
    assert "mlp: 24 -> 12 units, " in run("inspect", folder)
    tuned = tmp_path / "tuned"
    run(
        "finetune", model, "--weights", folder, "--data", tiny_npz, "--epochs", 1, "--lr", 0.01,
        "--out", tuned, "--quiet",
    )  # fmt: skip
    assert fastsal.load_run(tuned)[3].fc1.out_features == 12
    again = tmp_path / "again"
    run(
        "prune", model, "--weights", folder, "--data", tiny_npz, "--structure", "mlp",
        "--sparsity", 0.5, "--out", again, "--quiet",
    )  # fmt: skip
    assert fastsal.load_run(again)[3].fc1.out_features == 6
    pytest.importorskip("pyarrow")
    run(
        "transfer", model, "--weights", folder, "--task", f"a={tiny_npz}", "--source", "a",
        "--sparsity", 0.5, "--out", tmp_path / "transfer", "--quiet",
    )  # fmt: skip
    masked = tmp_path / "masked"
    run(
        "prune", model, "--weights", folder, "--data", tiny_npz, "--sparsity", 0.5, "--criterion",
        "magnitude", "--out", masked, "--quiet",
    )  # fmt: skip
    assert fastsal.load_run(masked)[3].fc1.out_features == 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pattern", "2:4"], "--pattern must not be given with --structure"),
        (["--recalibrate"], "--recalibrate must not be given with --structure"),
        (["--criterion", "taylor"], "--criterion must not be given with --structure"),
        (["--scope", "erk"], "scope must be one of auto, global, layer with --structure"),
        (["--damping", "0.1"], "damping must be a multiple"),
        (["--structure", "heads"], "no units that can be removed as 'heads'"),
    ],
)
def test_options_that_do_not_fit(mlp_file, tiny_npz, tmp_path, options, message):
    given = ["prune", f"{mlp_file}:net", "--data", str(tiny_npz), "--structure", "mlp",
             "--sparsity", "0.5", "--out", str(tmp_path / "x"), "--quiet", *options]  # fmt: skip
    done = CliRunner().invoke(main, given)
    assert done.exit_code == 2
    assert message in done.stderr
    assert not (tmp_path / "x").exists()


def test_options_of_units_need_a_structure(mlp_file, tiny_npz, tmp_path):
    done = CliRunner().invoke(
        main, ["prune", f"{mlp_file}:net", "--data", str(tiny_npz), "--sparsity", "0.5",
               "--budget", "units", "--out", str(tmp_path / "x")],
    )  # fmt: skip
    assert done.exit_code == 2
    assert "--budget units requires --structure" in done.stderr


def test_another_model_is_refused_and_unchanged(folder, mlp_file):
    model = fastsal.load_model(f"{mlp_file}:other")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(FileFormatError):
        fastsal.models.load_weights(model, folder / "model.safetensors")
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())
    assert model[3].fc1.out_features == 20
    assert widths_of(model) == {}


@pytest.mark.parametrize(
    "widths",
    ['{"3.fc1": {"out_features": -1}}', '{"3.fc1": {"forward": 3}}', "[1]", "{",
     '{"nothing": {"out_features": 12}}', '{"3.fc1": {"out_features": 1.5}}'],
)  # fmt: skip
def test_damaged_widths_are_file_errors(folder, mlp_file, widths):
    path = folder / "model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = {**file.metadata(), METADATA: widths}
    save_file(load_file(path), path, metadata)
    with pytest.raises(FileFormatError):
        fastsal.load_model(f"{mlp_file}:net", weights=path)


def test_save_run_from_python(tmp_path, mlp_file):
    spec = f"{mlp_file}:net"
    model = fastsal.load_model(spec, num_classes=4, seed=3)
    x = torch.randn(30, 3, 8, 8)
    result = fastsal.prune_structure(model, [x], 0.25)
    fastsal.save_run(tmp_path / "run", model, result.masks, spec, num_classes=4)
    again = fastsal.load_run(tmp_path / "run")
    assert torch.equal(again(x), model(x))
    with pytest.raises(InvalidArgument, match="folder must be empty"):
        fastsal.save_run(tmp_path / "run", model, result.masks, spec)
    fastsal.save_run(tmp_path / "run", model, result.masks, spec, num_classes=4, overwrite=True)


def test_a_run_of_timm(tmp_path):
    spec = "test_vit"
    model = fastsal.load_model(spec, num_classes=2)
    x = torch.randn(4, 3, 160, 160)
    result = fastsal.prune_structure(model, [x], 0.5, structure="heads")
    fastsal.save_run(tmp_path / "run", model, result.masks, spec, num_classes=2)
    again = fastsal.load_run(tmp_path / "run")
    torch.testing.assert_close(again(x), model(x))
    assert sum(p.numel() for p in again.parameters()) == result.after.parameters


SHARED = """
import torch
from torch import nn


class Attention(nn.Module):
    num_heads = 4

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        n, tokens, _ = x.shape
        shape = n, tokens, 3, self.num_heads, -1
        q, k, v = self.qkv(x).reshape(shape).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(n, tokens, -1))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared, self.stem, self.head = Attention(), nn.Linear(12, 16), nn.Linear(16, 3)
        self.blocks = nn.ModuleList([self.shared, self.shared])

    def forward(self, x):
        x = self.stem(x.reshape(len(x), -1, 12))
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean(dim=1))
"""


def test_a_run_with_a_shared_attention(tmp_path):
    """A file has a shared tensor under the first of its names, here not that of the group."""
    (tmp_path / "shared.py").write_text(SHARED)
    spec = f"{tmp_path}/shared.py:Net"
    model, x = fastsal.load_model(spec), torch.randn(10, 3, 8, 8)
    result = fastsal.prune_structure(model, [x], 0.5, structure="heads", reconstruct=False)
    assert result.widths == {"shared": (4, 2)}
    fastsal.save_run(tmp_path / "run", model, result.masks, spec)
    again = fastsal.load_run(tmp_path / "run")
    assert torch.equal(again(x), model(x))
    assert again.blocks[1].qkv is again.shared.qkv


def test_load_run_says_what_is_missing(tmp_path, folder, mlp_file):
    with pytest.raises(InvalidArgument, match="does not exist"):
        fastsal.load_run(tmp_path / "nothing")
    with pytest.raises(InvalidArgument, match="is missing"):
        fastsal.load_run(tmp_path)
    moved = mlp_file.rename(tmp_path / "moved.py")
    with pytest.raises(InvalidArgument, match="there is no file .*pass spec"):
        fastsal.load_run(folder)
    assert fastsal.load_run(folder, spec=f"{moved}:net")[3].fc1.out_features == 12
    (folder / "report.json").unlink()
    with pytest.raises(FileFormatError, match="pass spec"):
        fastsal.load_run(folder)
