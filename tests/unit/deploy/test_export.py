"""Exported files have the zeros and the outputs of the model."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import fastsal
from fastsal.cli import main
from fastsal.errors import FastsalError, InvalidArgument

pytestmark = pytest.mark.usefixtures("one_thread")


def sparse(model, kept=0.1, seed=0):
    draw = torch.Generator().manual_seed(seed)
    masks = fastsal.Masks(
        {
            name: torch.rand(p.shape, generator=draw) < kept
            for name, p in model.named_parameters()
            if p.dim() > 1
        }
    )
    masks.apply(model)
    return masks


@pytest.fixture
def vit():
    return fastsal.load_model("test_vit", num_classes=3)


@pytest.fixture
def images():
    return torch.randn(3, 3, 160, 160, generator=torch.Generator().manual_seed(0))


SUFFIX = {"onnx": ".onnx", "openvino": ".xml"}


def needs(kind):
    if kind == "openvino":
        pytest.importorskip("openvino", reason="needs the extra 'openvino'")
        return
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason="needs the extra 'export'")


both = pytest.mark.parametrize("kind", ["onnx", "openvino"])


def test_packed(vit, tmp_path):
    sparse(vit)
    path = tmp_path / "model.safetensors"
    found = fastsal.export(vit, path)
    assert found.ratio < 0.15
    assert found.bytes == path.stat().st_size
    assert found.zeros == sum(int((t == 0).sum()) for t in vit.state_dict().values())
    again = fastsal.load_model("test_vit", weights=path, num_classes=3)
    for name, value in vit.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    assert fastsal.export(vit, path, dtype="float16").bytes < 0.65 * found.bytes


def test_packed_and_narrow(vit, images, tmp_path):
    fastsal.prune_structure(vit, [images], 0.5)
    sparse(vit)
    fastsal.export(vit, tmp_path / "model.safetensors")
    again = fastsal.load_model("test_vit", weights=tmp_path / "model.safetensors", num_classes=3)
    assert torch.equal(again(images), vit(images))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("m.onnx", "packed"), "path must end in .safetensors"),
        (("m.safetensors", "onnx"), "path must end in .onnx"),
        (("m.onnx", "openvino"), "path must end in .xml"),
        (("m.onnx", "executorch"), "path must end in .pte"),
        (("m.onnx", "coreml"), "path must end in .mlpackage"),
        (("m.onnx", "litert"), "path must end in .tflite"),
        (("m.safetensors", "gguf"), "format must be 'packed', 'onnx', 'openvino'"),
        (("m.onnx", "onnx"), "images must have at least two"),
        (("m.xml", "openvino"), "images must have at least two"),
    ],
)
def test_arguments(vit, tmp_path, arguments, message):
    name, kind = arguments
    with pytest.raises(InvalidArgument, match=message):
        fastsal.export(vit, tmp_path / name, kind)
    with pytest.raises(InvalidArgument, match="dtype must be one of"):
        fastsal.export(vit, tmp_path / "m.safetensors", dtype="int8")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_told(vit, images, tmp_path, monkeypatch, missing):
    monkeypatch.setattr(
        "fastsal.deploy.onnx_files.find_spec", lambda name: None if name == missing else object()
    )
    with pytest.raises(InvalidArgument, match=rf"requires {missing}: pip install"):
        fastsal.export(vit, tmp_path / "m.onnx", "onnx", images=images)


def test_a_missing_openvino_is_told(vit, images, tmp_path, monkeypatch):
    monkeypatch.setattr("fastsal.deploy.openvino_files.find_spec", lambda name: None)
    with pytest.raises(InvalidArgument, match=r"requires openvino: pip install 'fastsal\[openvino"):
        fastsal.export(vit, tmp_path / "m.xml", "openvino", images=images)


@pytest.mark.parametrize(
    ("kind", "suffix", "package"),
    [
        ("executorch", ".pte", "executorch"),
        ("coreml", ".mlpackage", "coremltools"),
        ("litert", ".tflite", "litert_torch"),
    ],
)
def test_a_missing_mobile_package_is_told(
    vit, images, tmp_path, monkeypatch, kind, suffix, package
):
    monkeypatch.setattr(f"fastsal.deploy.{kind}_files.find_spec", lambda name: None)
    with pytest.raises(InvalidArgument, match=rf"requires {package}: pip install 'fastsal\[{kind}"):
        fastsal.export(vit, tmp_path / f"m{suffix}", kind, images=images)


@both
@pytest.mark.parametrize(
    ("name", "structure", "size"),
    [("test_vit", "mlp", 160), ("test_vit", "heads", 160), ("test_efficientnet", "channels", 64),
     ("test_resnet", "channels", 64), ("test_convnext", "mlp", 64)],
)  # fmt: skip
def test_files_of_smaller_models(name, structure, size, kind, tmp_path):
    needs(kind)
    model = fastsal.load_model(name, num_classes=3)
    x = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1))
    result = fastsal.prune_structure(model, [x], 0.3, structure=structure)
    masks = sparse(model, 0.5)
    before = copy.deepcopy(model.state_dict())
    path = tmp_path / f"m{SUFFIX[kind]}"
    found = fastsal.export(model, path, kind, images=x)
    assert found.difference < 1e-4
    assert found.zeros >= masks.total - sum(masks.kept.values())
    assert found.values > 0.9 * result.after.parameters
    files = sorted(p.name for p in tmp_path.iterdir())
    assert files == (["m.onnx"] if kind == "onnx" else ["m.bin", "m.xml"])
    assert found.bytes == sum(p.stat().st_size for p in tmp_path.iterdir())
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())


@both
def test_other_outputs_are_an_error(vit, images, kind, tmp_path):
    needs(kind)
    path = tmp_path / f"m{SUFFIX[kind]}"
    with pytest.raises(FastsalError, match="more than tolerance 1e-30"):
        fastsal.export(vit, path, kind, images=images, tolerance=1e-30)
    assert not list(tmp_path.iterdir())


class Loop(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x):
        if x.sum() > 0:  # depends on the values
            x = x.flip(0)
        return self.fc(x.mean(dim=(2, 3)))


def test_zeros_that_openvino_lost_are_told(vit, images, tmp_path, monkeypatch):
    needs("openvino")
    import openvino

    masks = sparse(vit, 0.5)
    pruned = copy.deepcopy(vit)
    with torch.no_grad():
        for block in vit.blocks:  # both have as many weights
            block.mlp.fc1.weight.add_(1e-9)
            block.mlp.fc2.weight.add_(1e-9)
    convert = openvino.convert_model
    monkeypatch.setattr("openvino.convert_model", lambda _, **how: convert(vit, **how))
    masks.verify(pruned)
    with pytest.raises(FastsalError, match="lacks zeros of the model in 'blocks.0.mlp.fc1"):
        fastsal.export(pruned, tmp_path / "m.xml", "openvino", images=images)
    assert not list(tmp_path.iterdir())


def test_a_model_that_cannot_be_exported_is_one_line(tmp_path):
    needs("onnx")
    with pytest.raises(FastsalError, match="torch.onnx cannot export Loop") as caught:
        fastsal.export(Loop(), tmp_path / "m.onnx", "onnx", images=torch.randn(2, 3, 4, 4))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_the_commands(vit, images, tmp_path):
    result = fastsal.prune_structure(vit, [images], 0.5)
    fastsal.save_run(tmp_path / "run", vit, result.masks, "test_vit", num_classes=3)

    def run(*arguments, status=0):
        done = CliRunner().invoke(main, [str(a) for a in arguments])
        assert done.exit_code == status, done.output
        return done.output

    said = run("export", tmp_path / "run", "--format", "packed", "--out",
               tmp_path / "p.safetensors", "--json")  # fmt: skip
    assert json.loads(said)["bytes"] == (tmp_path / "p.safetensors").stat().st_size
    said = run("export", tmp_path / "run", "--format", "packed", "--dtype", "float16", "--out",
               tmp_path / "h.safetensors")  # fmt: skip
    assert "equal in every bit" in said
    said = run("export", tmp_path / "run", "--format", "packed", "--out",
               tmp_path / "p.safetensors", status=2)  # fmt: skip
    assert "already exists" in said
    said = run("measure", tmp_path / "run", "--batch", 1, "--batch", 2, "--seconds", 0.01, "--json")
    found = json.loads(said)
    assert found["pruned"]["parameters"] == result.after.parameters
    assert found["dense"]["parameters"] == result.before.parameters
    assert found["pruned"]["macs"] == result.after.macs
    assert [t["batch"] for t in found["timings"]] == [1, 2]
    said = run("measure", tmp_path / "run", "--batch", 1, "--seconds", 0.01)
    assert "no parameter is zero" in said or "are zero" in said
    assert "times as fast" in said


@both
def test_the_command_for_files(vit, images, kind, tmp_path):
    needs(kind)
    path = tmp_path / f"m{SUFFIX[kind]}"
    runtime = {"onnx": "onnxruntime"}.get(kind, kind)
    masks = sparse(vit, 0.5)
    fastsal.save_run(tmp_path / "run", vit, masks, "test_vit", num_classes=3)
    done = CliRunner().invoke(
        main,
        ["export", str(tmp_path / "run"), "--format", kind, "--out", str(path)],
    )
    assert done.exit_code == 0, done.output
    assert "outputs equal within" in done.output
    done = CliRunner().invoke(
        main, ["measure", str(tmp_path / "run"), "--runtime", runtime, "--batch", "1",
               "--seconds", "0.01", "--json"],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["runtime"] == runtime
