"""Exported files have the zeros and the outputs of the model."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import fastsal
from fastsal.cli import main
from fastsal.deploy.comparing import compare_outputs, output_array
from fastsal.deploy.staged import staged
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


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


@both
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"images": None}, "images must have at least two images .* got NoneType"),
        ({"images": [1, 2]}, "images must have at least two images .* got list"),
        ({"images": torch.zeros(1, 12)}, r"images must have at least two images .* got \[1, 12\]"),
        ({"tolerance": -1}, "tolerance must be .*, got -1"),
        ({"tolerance": "1e-3"}, "tolerance must be a number, got '1e-3'"),
        ({"tolerance": float("nan")}, "tolerance must be .*, got nan"),
    ],
)
def test_arguments_of_files(kind, how, message, tmp_path):
    with pytest.raises(InvalidArgument, match=message):
        fastsal.export(
            small(), tmp_path / f"m{SUFFIX[kind]}", kind, **{"images": torch.randn(2, 12), **how}
        )
    assert not list(tmp_path.iterdir())


@both
def test_types_that_a_file_cannot_have(kind, tmp_path):
    needs(kind)
    path, x = tmp_path / f"m{SUFFIX[kind]}", torch.randn(2, 12)
    with pytest.raises(InvalidArgument, match="model must have parameters in .* got bfloat16"):
        fastsal.export(small().to(torch.bfloat16), path, kind, images=x)
    with pytest.raises(InvalidArgument, match="model must have parameters in .* got no param"):
        fastsal.export(nn.ReLU(), path, kind, images=x)
    assert not list(tmp_path.iterdir())


@both
def test_a_model_in_16_bits_is_compared_in_16_bits(kind, tmp_path):
    needs(kind)
    path, x = tmp_path / f"m{SUFFIX[kind]}", torch.randn(4, 12)
    model = nn.Sequential(small()[0], nn.Linear(12, 512), nn.ReLU(), nn.Linear(512, 3)).half()
    found = fastsal.export(model, path, kind, images=x)
    assert 1e-4 < found.difference < 1e-2
    with pytest.raises(FastsalError, match="more than tolerance 0.0001"):
        fastsal.export(model, path, kind, images=x, tolerance=1e-4)


def test_a_packed_file_is_exact(vit, tmp_path):
    with pytest.raises(InvalidArgument, match="tolerance must be None for format 'packed', .* 0.1"):
        fastsal.export(vit, tmp_path / "p.safetensors", tolerance=0.1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["packed", "onnx", "openvino"])
def test_a_folder_is_not_written_to(kind, tmp_path):
    path = tmp_path / f"m{SUFFIX.get(kind, '.safetensors')}"
    path.mkdir()
    with pytest.raises(InvalidArgument, match="path must be a file, got the folder"):
        fastsal.export(small(), path, kind, images=torch.randn(2, 12))
    assert not list(path.iterdir())


def test_staged_folders_replace_those_of_before(tmp_path):
    path = tmp_path / "m.mlpackage"
    for text in ("one", "two"):
        with staged(path) as made:
            made.mkdir()
            (made / text).touch()
    assert [p.name for p in path.iterdir()] == ["two"]
    assert [p.name for p in tmp_path.iterdir()] == ["m.mlpackage"]


def test_outputs_that_are_not_finite():
    x = torch.randn(2, 12)
    model = small()
    wanted = output_array(model, x)
    with pytest.raises(FastsalError, match="differ from those of the model by nan"):
        compare_outputs(
            model, lambda x: output_array(model, torch.from_numpy(x)) * np.nan, x, 1, ""
        )
    with pytest.raises(FastsalError, match="outputs of the model on images are NaN"):
        compare_outputs(model, lambda x: wanted[: len(x)], x * torch.nan, 1, "")
    with torch.no_grad():
        model[3].bias[1] = -torch.inf  # such as those of a class that is masked
    masked = output_array(model, x)
    assert compare_outputs(model, lambda x: masked[: len(x)], x, 1e-5, "") < 1e-5
    with pytest.raises(FastsalError, match="differ from those of the model by inf"):
        compare_outputs(model, lambda x: wanted[: len(x)], x, 1, "")


class Merging(nn.Linear):
    """An adapter that is merged into the weight by `eval()`, and taken out again by `train()`."""

    def __init__(self):
        super().__init__(12, 8)
        self.adapter, self.is_merged = nn.Parameter(torch.randn(8, 12)), False

    def train(self, mode=True):
        if mode == self.is_merged:
            self.weight.data += -self.adapter if mode else self.adapter
            self.is_merged = not mode
        return super().train(mode)

    def forward(self, x):
        y = super().forward(x)
        return y if self.is_merged else y + nn.functional.linear(x, self.adapter)


@both
def test_adapters_are_not_merged(kind, tmp_path):
    needs(kind)
    torch.manual_seed(0)
    model = nn.Sequential(Merging(), nn.ReLU(), nn.Linear(8, 3))
    before = copy.deepcopy(model.state_dict())
    fastsal.export(model, tmp_path / f"m{SUFFIX[kind]}", kind, images=torch.randn(3, 12))
    assert model.training
    assert not model[0].is_merged
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())


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
    assert "equal in every bit after rounding to float16" in said
    said = run("export", tmp_path / "run", "--format", "packed", "--out",
               tmp_path / "p.safetensors", status=2)  # fmt: skip
    assert "already exists" in said
    for option in ("--tolerance", "--size"):
        said = run("export", tmp_path / "run", "--format", "packed", option, 1, "--out",
                   tmp_path / "q.safetensors", status=2)  # fmt: skip
        assert f"{option} must not be given with --format packed" in said
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
