"""`fastsal inspect`: zeros of each layer, of masks and of weights in use."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import fastsal
from fastsal.cli import main
from fastsal.cli.layer_zeros import layers_of
from fastsal.cli.runfolder import write_run


def run(*arguments):
    return CliRunner().invoke(main, ["inspect", *map(str, arguments)], prog_name="fastsal")


@pytest.fixture
def folder(tmp_path):
    """A run of a net whose first layer has lost an output, and its second one two inputs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(6, 5))
    first, second = torch.ones(4, 3, 3, 3, dtype=torch.bool), torch.ones(5, 6, dtype=torch.bool)
    first[2] = False
    first[0, 0, 0] = False
    second[:, [1, 4]] = False
    masks = fastsal.Masks({"0.weight": first, "2.weight": second}, {"criterion": "by hand"})
    masks.apply(model)
    with torch.no_grad():
        model[2].weight[0, 0] = 0  # a kept weight may be zero too
    report = {
        "command": ["fastsal", "prune", "a net"],
        "history": [{"round": 1, "sparsity": 0.3, "samples": 8, "seconds": {"a": 1, "b": 2.5}}],
        "accuracy": {"before": {"accuracy": 0.9}, "after": {"accuracy": 0.8}},
        "in_use": {"sparsity": 0.1, "computed": {"0.weight": 0.25}},
    }
    path = tmp_path / "run"
    write_run(path, model, masks, {}, report)
    return path


def test_zeros_are_counted_as_by_hand(folder):
    result = run(folder, "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    first, second = said["layers"]
    assert first == {
        "name": "0.weight", "shape": [4, 3, 3, 3], "kept": 78, "sparsity": 1 - 78 / 108,
        "effective": 0.25, "empty_outputs": 1, "empty_inputs": 0,
    }  # fmt: skip
    assert (second["kept"], second["empty_outputs"], second["empty_inputs"]) == (20, 0, 2)
    assert second["effective"] == 11 / 30
    assert said["effective_sparsity"] == pytest.approx((0.25 * 108 + 11) / 138)
    assert said["sparsity"] == pytest.approx(40 / 138)
    assert (said["values"], said["zeros"]) == (138 + 9, 30 + 11)
    assert said["history"][0]["round"] == 1


def test_the_page_has_layers_history_and_command(folder):
    result = run(folder)
    assert result.exit_code == 0, result.output
    for text in ("4x3x3x3", "1/0", "0/2", "accuracy 0.9000 -> 0.8000", "criterion by hand",
                 "fastsal prune 'a net'", "sparsity 0.2899"):  # fmt: skip
        assert text in result.stdout, result.stdout
    (row,) = [line for line in result.stdout.splitlines() if line.split()[:2] == ["1", "0.3000"]]
    assert row.split() == ["1", "0.3000", "8", "3.5"]


def test_a_run_without_a_report_is_shown_too(folder):
    (folder / "report.json").unlink()
    result = run(folder)
    assert result.exit_code == 0, result.output
    assert "0.weight" in result.stdout


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_the_figure_names_every_layer(kind, folder, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"layers.{kind}"
    result = run(folder, "--figure", path)
    assert result.exit_code == 0, result.output
    assert path.stat().st_size > 1000
    if kind == "svg":
        assert "2.weight" in path.read_text()
    assert "already exists" in run(folder, "--figure", path).stderr
    assert run(folder, "--figure", path, "--force").exit_code == 0


def test_what_is_no_run_is_refused(folder, tmp_path, monkeypatch):
    for given, message in [
        (tmp_path / "absent", "which does not exist"),
        (folder / "report.json", "which is a file"),
        (tmp_path, "is not the folder of a run"),
    ]:
        result = run(given)
        assert result.exit_code == 2
        assert message in result.stderr
    pytest.importorskip("matplotlib")
    result = run(folder, "--figure", tmp_path / "a.xyz")
    assert result.exit_code == 2
    assert "figure must be a file of one of the formats" in result.stderr
    monkeypatch.setattr("fastsal.cli.layer_figure.find_spec", lambda _: None)
    result = run(folder, "--figure", tmp_path / "a.png")
    assert (result.exit_code, "pip install" in result.stderr) == (2, True)


def test_a_vector_has_no_inputs():
    mask = torch.tensor([True, False])
    (found,) = layers_of({"scale": mask}, {"scale": torch.tensor([1.0, 0.0])}, {})
    assert (found.empty_outputs, found.empty_inputs, found.effective) == (1, None, 0.5)
