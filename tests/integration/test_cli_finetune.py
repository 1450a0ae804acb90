"""`fastsal finetune`: from the folder of a pruned model to one of a trained model, zeros kept."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import fastsal
from fastsal.models.loading import load_model
from fastsal.models.weights import read_weights, save_weights

from .commands import failed, run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model(tiny_file):
    return f"{tiny_file}:tiny"


@pytest.fixture
def pruned(model, tmp_path):
    """The folder of a run at half sparsity, of a model that was never trained."""
    weights, out = tmp_path / "dense.safetensors", tmp_path / "pruned"
    save_weights(load_model(model, seed=7), weights)
    result = run(
        "prune", model, "--weights", weights, "--criterion", "magnitude", "--sparsity", 0.5,
        "--quiet", "--out", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture
def command(model, pruned, tiny_npz, tmp_path):
    return [
        "finetune", model, "--weights", pruned, "--data", tiny_npz, "--batch-size", 16,
        "--lr", 0.1, "--epochs", 4, "--quiet", "--out", tmp_path / "tuned",
    ]  # fmt: skip


def test_a_run_folder_is_whole_and_verifies(command, pruned, model, tiny_npz, tmp_path):
    result = run(*command, "--held-out", tiny_npz, "--test", tiny_npz, "--train-head")
    assert result.exit_code == 0, result.output
    out = tmp_path / "tuned"
    assert sorted(p.name for p in out.iterdir()) == [
        "masks.safetensors", "model.safetensors", "report.json"
    ]  # fmt: skip
    assert run("verify", out).exit_code == 0
    assert fastsal.Masks.load(out / "masks.safetensors") == fastsal.Masks.load(
        pruned / "masks.safetensors"
    )
    recipe = fastsal.Masks.load(out / "masks.safetensors").recipe
    assert recipe["criterion"] == "magnitude"
    assert recipe["finetuned"]["epochs"] == 4
    report = json.loads((out / "report.json").read_text())
    assert report["samples"] == 60
    assert len(report["history"]) == 4
    assert report["history"][-1]["loss"] < report["history"][0]["loss"]
    assert (
        report["history"][report["kept_epoch"] - 1]["held_out_loss"]
        < (report["held_out_loss_before"])
    )
    before, after = (report["accuracy"][when]["loss"] for when in ("before", "after"))
    assert after < before
    assert f"epoch {report['kept_epoch']} kept" in result.stdout
    again = run("eval", model, "--weights", out, "--data", tiny_npz, "--json", "--quiet")
    assert json.loads(again.stdout)["loss"] == pytest.approx(after)


def test_head_and_normalisation_stay(command, pruned, tmp_path):
    result = run(*command, "--optimizer", "adamw", "--lr", 0.01, "--weight-decay", 0.1, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["out"] == str(tmp_path / "tuned")
    before = read_weights(pruned / "model.safetensors")
    after = read_weights(tmp_path / "tuned" / "model.safetensors")
    assert list(before) == list(after)
    assert {n for n in before if not torch.equal(before[n], after[n])} == {
        "conv.weight", "conv.bias"
    }  # fmt: skip


def test_images_come_in_a_new_order_each_epoch_and_a_seed_repeats_it(command, tmp_path):
    outs = [tmp_path / name for name in "abc"]
    for out, seed in zip(outs, (1, 1, 2)):
        assert run(*command[:-1], out, "--seed", seed, "--autocast", "bfloat16").exit_code == 0
    a, b, c = (load_file(out / "model.safetensors") for out in outs)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["conv.weight"], c["conv.weight"])


def test_shuffled_batches(tiny_npz, model):
    from fastsal.data.folders import load_images
    from fastsal.data.shuffled import Shuffled
    from fastsal.models.inputs import input_spec

    batches = load_images(tiny_npz).batches(input_spec(load_model(model)), 16)
    shuffled = Shuffled(batches)
    assert (shuffled.samples, len(shuffled)) == (60, 4)
    first, second = (torch.cat([x for x, _ in shuffled]).flatten(1) for _ in range(2))
    assert not torch.equal(first, second)
    want = torch.cat([x for x, _ in batches]).flatten(1)
    for found in (first, second):
        assert {tuple(row) for row in found.tolist()} == {tuple(row) for row in want.tolist()}
    order = [y for _, labels in shuffled for y in labels.tolist()]
    assert sorted(order) == sorted(y for _, labels in batches for y in labels.tolist())


def test_a_killed_command_goes_on(command, tmp_path, monkeypatch):
    assert run(*command).exit_code == 0
    path, out = tmp_path / "epoch.pt", tmp_path / "again"
    again = [*command[:-1], out, "--checkpoint", path]
    epoch = fastsal.finetuning.trainer.Trainer.epoch

    def until_third(self, number, report):
        if number == 3:
            raise KeyboardInterrupt
        return epoch(self, number, report)

    with monkeypatch.context() as patch:
        patch.setattr("fastsal.finetuning.trainer.Trainer.epoch", until_third)
        result = run(*again)
    assert result.exit_code == 130
    assert path.exists()
    assert not out.exists()
    failed(
        run(*again, "--lr", 0.2),
        "with other values of lr; pass the same arguments, or another path",
    )
    assert run(*again).exit_code == 0
    assert not path.exists()
    name = "model.safetensors"
    assert (out / name).read_bytes() == (tmp_path / "tuned" / name).read_bytes()


def test_masks_from_elsewhere(command, pruned, tmp_path):
    files = ["--weights", pruned / "model.safetensors"]
    failed(run(*command, *files), "--masks is required unless --weights is the folder of a run")
    assert run(*command, *files, "--masks", pruned).exit_code == 0
    masks = pruned / "masks.safetensors"
    assert run(*command, *files, "--masks", masks, "--force").exit_code == 0


def test_weights_that_break_their_masks(command, pruned, tmp_path):
    dense = tmp_path / "dense.safetensors"
    result = run(*command, "--weights", dense, "--masks", pruned)
    failed(result, "are not zero, the first at")
    failed(result, "must be those that were pruned with these masks")
    assert not (tmp_path / "tuned").exists()
    state = load_file(pruned / "model.safetensors")
    del state["fc.weight"]
    save_file(state, tmp_path / "w.safetensors")
    failed(run(*command, "--weights", tmp_path / "w.safetensors", "--masks", pruned), "fc.weight")


def test_bad_options_are_one_line(command, tiny_npz, tmp_path):
    for options, message in (
        (["--lr", "0"], "lr must be positive, got 0.0"),
        (["--patience", "2"], "patience must be None without held_out, got 2"),
        (["--optimizer", "best"], "optimizer must be 'sgd', 'adamw' or another name"),
        (["--frozen", "convv"], "frozen: 'convv' matches no parameter"),
        (["--frozen", "conv.*"], "frozen: no parameter is left to train"),
        (["--samples", "61"], "samples must be at most 60"),
        (["--lr", "1e38", "--schedule", "constant"], "use a lower lr than 1e+38"),
    ):
        failed(run(*command, *options), message)
        assert not (tmp_path / "tuned").exists()
    data = dict(np.load(tiny_npz))
    data["classes"] = data["classes"][::-1]
    np.savez(tmp_path / "other.npz", **data)
    other = tmp_path / "other.npz"
    failed(run(*command, "--held-out", other), "held_out must have the classes of --data")
    failed(run(*command, "--test", other), "test must have the classes of --data")
