"""A folder for the hub is read by timm, and its card states what the report has."""

from __future__ import annotations

import json
import math

import pytest
import timm
import torch
from click.testing import CliRunner
from torch import nn

import fastsal
from fastsal.cli import main
from fastsal.deploy.hub_folder import wilson_interval, write_hub_folder
from fastsal.errors import InvalidArgument

pytestmark = pytest.mark.usefixtures("one_thread")
ACCURACY = {
    "before": {"accuracy": 0.75, "loss": 1.0, "samples": 100},
    "after": {"accuracy": 0.5, "loss": 2.0, "samples": 100},
}


@pytest.fixture
def vit():
    return fastsal.load_model("test_vit", num_classes=3)


@pytest.fixture
def run(vit, tmp_path):
    masks = fastsal.rank(fastsal.score(vit, None, "magnitude"), 0.5)
    masks.apply(vit)
    report = {"accuracy": ACCURACY, "command": ["fastsal", "prune", "/home/me/secret"]}
    fastsal.save_run(tmp_path / "run", vit, masks, "test_vit", num_classes=3, report=report)
    return tmp_path / "run"


def test_timm_reads_it(vit, run, tmp_path):
    folder = write_hub_folder(run, tmp_path / "hub")
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md", "config.json", "model.safetensors",
    ]  # fmt: skip
    assert len({p.stat().st_mode for p in folder.iterdir()}) == 1  # whoever may read one reads all
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        assert torch.equal(again(images), vit(images))
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: timm\npipeline_tag: image-classification\n")
    assert "# test_vit, 50.0 % of the weights pruned" in card
    nonzero = sum(int((p != 0).sum()) for p in vit.parameters())
    assert f"| parameters that are not zero | {nonzero:,} |" in card
    assert "accuracy of this model, 100 test images, 95 % interval | 0.5000 (0.4038 to" in card
    assert "secret" not in card
    assert "\nlicense: other\n" in card
    assert "base_model" not in card


def test_the_license_is_that_of_the_weights_of_timm(run, tmp_path):
    report = json.loads((run / "report.json").read_text())
    report["arguments"]["weights"] = "pretrained"
    (run / "report.json").write_text(json.dumps(report))
    card = (write_hub_folder(run, tmp_path / "hub") / "README.md").read_text()
    config = timm.get_pretrained_cfg("test_vit")
    assert f"\nlicense: {config.license}\n" in card
    assert f"\nbase_model: {config.hf_hub_id}" in card


def test_the_command(run, tmp_path):
    def invoke(*arguments):
        return CliRunner().invoke(main, ["export", str(run), "--format", "hub", *arguments])

    done = invoke("--out", str(tmp_path / "hub"))
    assert done.exit_code == 0, done.output
    assert "timm.create_model" in done.output
    done = invoke("--out", str(tmp_path / "hub"))
    assert done.exit_code == 2
    assert "folder must be new or empty" in done.output
    for option, value in (("dtype", "float16"), ("tolerance", "1e-3"), ("size", "64")):
        done = invoke("--out", str(tmp_path / "other"), f"--{option}", value)
        assert f"--{option} must not be given with --format hub" in done.output
    assert not (tmp_path / "other").exists()


def test_what_timm_cannot_build_is_refused(vit, tmp_path):
    images = torch.randn(2, 3, 160, 160)
    result = fastsal.prune_structure(vit, [images], 0.5)
    fastsal.save_run(tmp_path / "narrow", vit, result.masks, "test_vit", num_classes=3)
    with pytest.raises(InvalidArgument, match="with all of its units for the hub"):
        write_hub_folder(tmp_path / "narrow", tmp_path / "hub")
    (tmp_path / "net.py").write_text(
        "from torch import nn\n\n\ndef net():\n    return nn.Sequential(nn.Linear(4, 3))\n"
    )
    model = nn.Sequential(nn.Linear(4, 3))
    masks = fastsal.rank(fastsal.score(model, None, "magnitude"), 0.5)
    masks.apply(model)
    fastsal.save_run(tmp_path / "own", model, masks, f"{tmp_path / 'net.py'}:net")
    with pytest.raises(InvalidArgument, match="run must have a model of timm"):
        write_hub_folder(tmp_path / "own", tmp_path / "hub")
    assert not (tmp_path / "hub").exists()


@pytest.mark.parametrize(("share", "samples"), [(0.0, 5), (0.3, 40), (0.9, 1000), (1.0, 7)])
def test_the_interval_solves_its_equation(share, samples):
    """Bounds p of Wilson's interval have |share - p| = z sqrt(p (1 - p) / n)."""
    for bound in wilson_interval(share, samples, z=1.5):
        wanted = 1.5 * math.sqrt(max(0.0, bound * (1 - bound)) / samples)
        assert abs(share - bound) == pytest.approx(wanted, abs=1e-6)


def test_a_full_disk_is_no_fault_of_the_model(run, tmp_path, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("Error while serializing: I/O error: No space left (os error 28)")

    monkeypatch.setattr("timm.models.save_for_hf", full)
    with pytest.raises(OSError, match="No space left on device"):
        write_hub_folder(run, tmp_path / "hub")
    assert not (tmp_path / "hub").exists()
