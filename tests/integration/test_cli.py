from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import fastsal
from fastsal.cli import main
from fastsal.models.loading import load_model
from fastsal.models.weights import read_weights, save_weights

from .commands import failed, run

CRITERIA = ["magnitude", "random", "taylor", "diag-fisher", "block-fisher", "obs-greedy"]


@pytest.fixture
def model(tiny_file):
    return f"{tiny_file}:tiny"


@pytest.fixture
def weights(model, tmp_path):
    path = tmp_path / "dense.safetensors"
    save_weights(load_model(model, seed=7), path)
    return path


@pytest.fixture
def pruned(model, weights, tiny_npz, tmp_path):
    """The folder of a run at half sparsity."""
    out = tmp_path / "run"
    result = run(
        "prune", model, "--weights", weights, "--data", tiny_npz, "--sparsity", 0.5,
        "--block-size", 8, "--test", tiny_npz, "--quiet", "--out", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return out


# ------------------------------------------------------------------------------- what works


def test_refitting_is_a_stage_of_the_report(model, weights, tiny_npz, tmp_path):
    out = tmp_path / "refitted"
    result = run(
        "prune", model, "--weights", weights, "--data", tiny_npz, "--sparsity", 0.5,
        "--curvature", "features", "--refit", "whole", "--refit-steps", 20, "--quiet",
        "--out", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "Refit: " in result.stdout
    (entry,) = json.loads((out / "report.json").read_text())["history"]
    assert entry["refit"]["steps"] <= 20
    assert entry["refit"]["windows"] == []
    recipe = fastsal.Masks.load(out / "masks.safetensors").recipe
    assert recipe["refit"]["steps"] == 20


def test_reconstruction_is_a_stage_of_the_report(model, weights, tiny_npz, tmp_path):
    for criterion in ("magnitude", "obs-greedy"):
        out = tmp_path / criterion
        result = run(
            "prune", model, "--weights", weights, "--data", tiny_npz, "--sparsity", 0.5,
            "--criterion", criterion, "--reconstruct", "--quiet", "--out", out,
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        assert "Reconstruction of 2 layers" in result.stdout
        (entry,) = json.loads((out / "report.json").read_text())["history"]
        assert entry["reconstruction"]["layers"] == 2
        assert run("verify", out).exit_code == 0


def test_a_fraction_of_the_multiply_accumulates(model, weights, tiny_npz, tmp_path):
    out = tmp_path / "run"
    result = run(
        "prune", model, "--weights", weights, "--data", tiny_npz, "--sparsity", 0.5,
        "--budget", "macs", "--block-size", 8, "--quiet", "--out", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "million multiply-accumulates (" in " ".join(result.stdout.split())
    report = json.loads((out / "report.json").read_text())
    assert 0.45 < report["macs"]["after"] / report["macs"]["before"] < 0.55
    assert fastsal.Masks.load(out / "masks.safetensors").recipe["budget"] == "macs"
    result = run("verify", out)
    assert result.exit_code == 0, result.stderr
    for budget in ("units", "latency"):
        failed(
            run("prune", model, "--sparsity", 0.5, "--budget", budget, "--out", tmp_path / "x"),
            f"--budget {budget} requires --structure",
        )


def test_a_run_folder_is_whole_and_verifies(pruned, model, tiny_npz):
    assert sorted(p.name for p in pruned.iterdir()) == [
        "masks.safetensors", "model.safetensors", "report.json"
    ]  # fmt: skip
    report = json.loads((pruned / "report.json").read_text())
    assert report["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert set(report["parameters"]) == {"conv.weight", "fc.weight"}
    assert set(report["accuracy"]) == {"before", "after"}
    assert report["versions"]["torch"]
    assert report["samples"] == 60
    state = read_weights(pruned / "model.safetensors")
    zeros = sum(int((state[n] == 0).sum()) for n in report["parameters"])
    assert zeros == 216 + 24 - sum(p["kept"] for p in report["parameters"].values())
    result = run("verify", pruned)
    assert result.exit_code == 0, result.output
    assert "every pruned weight is zero" in result.stdout
    again = run("eval", model, "--weights", pruned, "--data", tiny_npz, "--json", "--quiet")
    measured = json.loads(again.stdout)
    assert measured["accuracy"] == report["accuracy"]["after"]["accuracy"]
    assert measured["loss"] == pytest.approx(report["accuracy"]["after"]["loss"])


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_prunes_and_prints_one_json_object(
    criterion, model, weights, tiny_npz, tmp_path
):
    result = run(
        "prune", model, "--weights", weights, "--data", tiny_npz, "--sparsity", 0.5,
        "--criterion", criterion, "--block-size", 8, "--samples", 40, "--json",
        "--out", tmp_path / "run",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert report["samples"] == 40
    assert run("verify", tmp_path / "run").exit_code == 0


@pytest.mark.parametrize("criterion", ["magnitude", "random"])
def test_criteria_of_the_weights_alone_need_no_data(criterion, model, weights, tmp_path):
    result = run(
        "prune", model, "--weights", weights, "--sparsity", 0.5, "--criterion", criterion,
        "--out", tmp_path / "run",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "kept" in result.stdout


def test_score_then_rank_then_apply_is_prune(model, weights, tiny_npz, tmp_path):
    scores, masks = tmp_path / "scores.safetensors", tmp_path / "masks.safetensors"
    common = ["--weights", weights, "--data", tiny_npz, "--block-size", 8, "--quiet"]
    common += ["--criterion", "block-fisher", "--damping", 1e-3]
    result = run("score", model, *common, "--out", scores, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["weights"] == 240
    assert {n: tuple(v.shape) for n, v in load_file(scores).items()} == {
        "conv.weight": (8, 3, 3, 3), "fc.weight": (3, 8)
    }  # fmt: skip
    result = run("rank", scores, "--sparsity", 0.5, "--out", masks, "--json")
    assert result.exit_code == 0, result.output
    result = run(
        "prune", model, *common, "--sparsity", 0.5, "--no-compensate", "--out", tmp_path / "run"
    )
    assert result.exit_code == 0, result.output
    import fastsal

    ours = fastsal.Masks.load(masks)
    theirs = fastsal.Masks.load(tmp_path / "run" / "masks.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_each_part_of_a_model_has_its_sparsity(model, weights, tiny_npz, tmp_path):
    common = ["--weights", weights, "--data", tiny_npz, "--block-size", 8, "--quiet"]
    sparsity = ["--sparsity", "conv.weight=0.25, *=0.5"]
    result = run("prune", model, *common, *sparsity, "--damping", 1e-3, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    import fastsal

    masks = fastsal.Masks.load(tmp_path / "run" / "masks.safetensors")
    assert masks.kept == {"conv.weight": 162, "fc.weight": 12}
    assert report["arguments"]["sparsity"] == {"conv.weight": 0.25, "*": 0.5}
    assert run("verify", tmp_path / "run").exit_code == 0
    assert run("inspect", tmp_path / "run").exit_code == 0


def test_saved_statistics_serve_another_criterion(model, weights, tiny_npz, tmp_path):
    statistics = tmp_path / "fisher.safetensors"
    common = ["--weights", weights, "--quiet", "--json"]
    first = run(
        "score", model, *common, "--data", tiny_npz, "--block-size", 8,
        "--save-statistics", statistics, "--out", tmp_path / "a.safetensors",
    )  # fmt: skip
    assert first.exit_code == 0, first.output
    second = run(
        "score", model, *common, "--statistics", statistics, "--criterion", "diag-fisher",
        "--out", tmp_path / "b.safetensors",
    )  # fmt: skip
    assert second.exit_code == 0, second.output
    assert json.loads(second.stdout)["samples"] == 60


@pytest.mark.skipif("compensate" not in main.commands, reason="no command compensate")
def test_compensate_writes_weights_that_keep_the_masks(model, weights, tiny_npz, pruned, tmp_path):
    out = tmp_path / "moved.safetensors"
    result = run(
        "compensate", model, "--weights", weights, "--masks", pruned, "--data", tiny_npz,
        "--block-size", 8, "--quiet", "--out", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert run("verify", "--weights", out, "--masks", pruned).exit_code == 0
    dense, moved = read_weights(weights), read_weights(out)
    kept = moved["conv.weight"] != 0
    assert not torch.equal(moved["conv.weight"][kept], dense["conv.weight"][kept])


def test_a_folder_of_images(model, weights, tiny_npz, tmp_path):
    data = np.load(tiny_npz)
    for i, (x, y) in enumerate(zip(data["x"], data["y"], strict=True)):
        folder = tmp_path / "images" / data["classes"][y]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(x).save(folder / f"{i}.png")
    result = run(
        "eval", model, "--weights", weights, "--data", tmp_path / "images", "--json", "--quiet"
    )
    assert json.loads(result.stdout)["samples"] == 60


def test_the_command_starts_without_torch(python_env):
    code = "import sys, fastsal.cli; sys.exit('torch' in sys.modules or 'timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=python_env, check=False).returncode == 0
    done = subprocess.run(
        [sys.executable, "-m", "fastsal", "--help"],
        env=python_env, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in ("prune", "score", "rank", "eval", "verify", "demo"):
        assert f"\n  {name} " in done.stdout


# -------------------------------------------------------------------------------- bad inputs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sparsity", "1.5"], "sparsity must be in [0, 1], got 1.5"),
        (["--sparsity", "-0.1"], "sparsity must be in [0, 1], got -0.1"),
        (["--sparsity", "nan"], "sparsity must be in [0, 1], got nan"),
        (["--sparsity", "0.5", "--floor", "2"], "floor must be in [0, 1], got 2.0"),
        (["--sparsity", "conv.weight=0.5,*=2"], "sparsity['*'] must be in [0, 1], got 2.0"),
        (["--sparsity", "conv.weight=half"], "must be a number, got 'half'"),
        (["--sparsity", "conv.weight=0.5,0.2"], "must be PATTERN=FRACTION,..., got"),
        (["--sparsity", "conf.weight=0.5"], "'conf.weight' matches no parameter"),
        (["--sparsity", "*=0.5", "--structure", "channels"], "sparsity must be a number with"),
        (["--sparsity", "*=0.5", "--target", "xnnpack"], "sparsity must be a number for target"),
        ([], "--sparsity or --pattern is required"),
        (["--sparsity", "0.5", "--samples", "61"], "samples must be at most 60"),
        (["--sparsity", "0.5", "--parameters", "convv.weight"], "convv.weight"),
        (["--sparsity", "0.5", "--pattern", "two:four"], "two:four"),
        (
            ["--sparsity", "0.5", "--size", "native", "--mean", "1,2"],
            "mean must have 1 value or one per channel",
        ),
        (["--sparsity", "0.5", "--weights", "none.pth"], "none.pth"),
        (["--sparsity", "0.5", "--num-classes", "2"], "must be in 0 to 1 for a model of 2 classes"),
    ],
)
def test_bad_options_are_one_line(options, message, model, tiny_npz, tmp_path):
    out = tmp_path / "run"
    failed(run("prune", model, "--data", tiny_npz, "--quiet", *options, "--out", out), message)
    assert not out.exists()
    assert not list(tmp_path.glob(".*"))


def test_a_criterion_without_its_data(model, tmp_path):
    result = run("prune", model, "--sparsity", 0.5, "--out", tmp_path / "run")
    failed(result, "--data is required by the criterion 'obs-greedy'")


def test_usage_errors(model, tmp_path):
    for options, message in (
        (["--damping", "-1"], "--damping must be a positive number, 'auto' or a multiple"),
        (["--size", "big"], "--size must be pixels as 96, height x width as 64x96, or native"),
        (["--rounds", "0"], "--rounds must be an integer of at least 1, got 0"),
        (["--rounds", "two"], "--rounds must be an integer of at least 1, got 'two'"),
        (["--floor", "low"], "--floor must be a number, got 'low'"),
        (["--mean", "1,b"], "--mean must be numbers separated by commas"),
        (["--sparsty", "0.5"], "no such option"),
    ):
        result = run("prune", model, *options, "--out", tmp_path / "run")
        failed(result, message)
        failed(result, "(see fastsal prune --help)")
    # A criterion may be registered by the file of the model.
    result = run("prune", model, "--criterion", "best", "--sparsity", 0.5, "--out", tmp_path / "r")
    failed(result, "--criterion must be one of magnitude, random, taylor")
    failed(run("prune", model), "--out is required (see fastsal prune --help)")
    failed(run("prune", "--out", tmp_path / "run"), "MODEL is required")
    failed(run("prun"), "no such command 'prun'")
    failed(run("--bug"), "(see fastsal --help)")


def test_bad_folders(model, tmp_path):
    folder = tmp_path / "images"
    (folder / "cats").mkdir(parents=True)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "cats" / "1.png")
    failed(
        run("eval", model, "--data", folder, "--quiet"),
        "must contain at least 2 class folders, got cats only",
    )
    (folder / "dogs").mkdir()
    failed(run("eval", model, "--data", folder, "--quiet"), "dogs contains no image file")
    (folder / "dogs" / "2.png").write_bytes(b"no image")
    failed(run("eval", model, "--data", folder, "--quiet"), "2.png cannot be read as an image")
    command = ["prune", model, "--data", folder, "--sparsity", 0.5, "--quiet"]
    failed(run(*command, "--out", tmp_path / "run"), "2.png cannot be read as an image")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("fc.bias"), "1 missing: fc.bias"),
        (lambda s: s.update(more=torch.zeros(1)), "1 unexpected: more"),
    ],
)
def test_weights_that_do_not_fit(change, message, model, weights, tiny_npz, tmp_path):
    state = load_file(weights)
    change(state)
    save_file(state, tmp_path / "w.safetensors")
    failed(run("eval", model, "--weights", tmp_path / "w.safetensors", "--data", tiny_npz), message)


def test_labels_out_of_range(model, tiny_npz, tmp_path):
    data = dict(np.load(tiny_npz))
    data["y"] = data["y"] + 1
    data.pop("classes")
    np.savez(tmp_path / "bad.npz", **data)
    failed(
        run("eval", model, "--data", tmp_path / "bad.npz"),
        "must be in 0 to 2 for a model of 3 classes, got 3",
    )


def test_test_images_of_other_classes(model, tiny_npz, tmp_path):
    data = dict(np.load(tiny_npz))
    data["classes"] = data["classes"][::-1]
    np.savez(tmp_path / "other.npz", **data)
    result = run(
        "prune", model, "--data", tiny_npz, "--test", tmp_path / "other.npz", "--sparsity", 0.5,
        "--out", tmp_path / "run",
    )  # fmt: skip
    failed(result, "test must have the classes of --data (red, green, blue), got ")


def test_a_run_is_not_overwritten_unless_forced(pruned, model, tiny_npz):
    before = (pruned / "report.json").read_bytes()
    (pruned / "notes.txt").write_text("mine")
    command = ["prune", model, "--data", tiny_npz, "--sparsity", 0.3, "--quiet", "--out", pruned]
    failed(run(*command), "is not empty; give --force")
    assert (pruned / "report.json").read_bytes() == before
    assert run(*command, "--force").exit_code == 0
    assert (pruned / "report.json").read_bytes() != before
    assert (pruned / "notes.txt").read_text() == "mine"
    assert run("verify", pruned).exit_code == 0


# ------------------------------------------------------------------------------ verification


def not_verified(result, message):
    assert result.exit_code == 1, result.output
    assert message in result.stdout, result.output
    assert "Traceback" not in result.output


def test_a_pruned_weight_that_lives(pruned):
    state = load_file(pruned / "model.safetensors")
    zero = (state["conv.weight"] == 0).nonzero()[0]
    state["conv.weight"][tuple(zero)] = 1e-30
    save_file(state, pruned / "model.safetensors")
    not_verified(run("verify", pruned), "conv.weight: 1 pruned weights are not zero")
    not_verified(run("verify", pruned), "model.safetensors does not match the checksum")
    answer = json.loads(run("verify", pruned, "--json").stdout)
    assert answer["ok"] is False
    assert len(answer["failures"]) == 2


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_masks_that_are_damaged(pruned, damage):
    path = pruned / "masks.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[:-3]
    else:
        content[-1] ^= 0x55
    path.write_bytes(bytes(content))
    not_verified(run("verify", pruned), "masks.safetensors")
    (pruned / "report.json").unlink()
    result = run("verify", pruned)
    assert result.exit_code == 1, result.output


def test_masks_of_another_model(pruned, tiny_file, tmp_path):
    wide = tmp_path / "wide.safetensors"
    save_weights(load_model(f"{tiny_file}:wide"), wide)
    not_verified(run("verify", "--weights", wide, "--masks", pruned), "but its mask has [8, 3, 3")
    save_weights(load_model("test_resnet"), wide)
    not_verified(
        run("verify", "--weights", wide, "--masks", pruned), "in the masks but not in the weights"
    )


def test_verify_with_a_model(pruned, model):
    weights, masks = pruned / "model.safetensors", pruned / "masks.safetensors"
    assert run("verify", model, "--weights", weights, "--masks", masks).exit_code == 0
    assert run("verify", "--weights", weights, "--masks", masks).exit_code == 0
    failed(run("verify"), "the folder of a run, or --weights and --masks, is required")
    failed(run("verify", pruned.parent), "model.safetensors is missing")


def test_rank_refuses_what_is_no_scores(weights, tmp_path):
    out = ["--sparsity", 0.5, "--out", tmp_path / "m.safetensors"]
    failed(run("rank", weights, *out), "is truncated or was not written by fastsal score")
    failed(run("rank", tmp_path / "none.safetensors", *out), "no such file")


# ------------------------------------------------------------------------ errors and signals


def test_debug_shows_the_traceback(model, monkeypatch):
    from fastsal.errors import DataError

    result = run("--debug", "eval", model, "--data", "nowhere")
    assert isinstance(result.exception, DataError)


def test_unexpected_errors_keep_their_traceback(tmp_path, tiny_npz):
    (tmp_path / "bad.py").write_text("def build():\n    return 1 / 0\n")
    result = run("eval", f"{tmp_path / 'bad.py'}:build", "--data", tiny_npz)
    assert isinstance(result.exception, ZeroDivisionError)


def test_an_interrupt_leaves_no_files(model, tiny_npz, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastsal.deploy.run_folder.file_digest", interrupted)
    out = tmp_path / "out" / "run"
    result = run(
        "prune", model, "--data", tiny_npz, "--criterion", "magnitude", "--sparsity", 0.5,
        "--quiet", "--out", out,
    )  # fmt: skip
    assert result.exit_code == 130
    assert "interrupted" in result.stderr
    assert not list((tmp_path / "out").iterdir())
