"""Studies from their file to their tables, on a model and images that take no time."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastsal
from fastsal.errors import InvalidArgument
from fastsal.models.inputs import input_spec
from fastsal.models.loading import load_model
from fastsal.study import load_study, run_study
from fastsal.utils import presence

from .commands import failed, run

pytestmark = pytest.mark.usefixtures("one_thread")

STUDY = """
name = "tiny"
sparsities = [0.0, 0.5, 0.75]
seeds = [0, 1]
samples = 16
block_size = 16
batch_size = 16

[[models]]
name = "tiny"
model = "tiny.py:tiny"

[[tasks]]
name = "colours"
data = "tiny.npz"

[[tasks]]
name = "bars"
data = "bars.npz"

[[sources]]
tasks = "colours"

[[criteria]]
criterion = "obs-greedy"

[[criteria]]
criterion = "magnitude"

[[criteria]]
criterion = "random"

[split]
prune = 0.4
fit = 0.3
tune = 0.3

[finetune]
epochs = 1
lr = 0.05
"""
TIMES = ("seconds_statistics", "seconds_prune", "seconds_evaluate", "seconds_finetune")


@pytest.fixture
def study_file(tmp_path: Path, tiny_file: Path, tiny_npz: Path) -> Path:
    """A study of two tasks; `tiny_file` and `tiny_npz` lie beside it."""
    assert tiny_file.parent == tiny_npz.parent == tmp_path
    rng = np.random.default_rng(1)
    y = np.arange(60) % 2
    x = rng.integers(0, 90, (60, 8, 8, 3))
    x[y == 0, :, ::2] += 100
    x[y == 1, ::2] += 100
    np.savez(tmp_path / "bars.npz", x=x.astype(np.uint8), y=y)
    path = tmp_path / "tiny.toml"
    path.write_text(STUDY)
    return path


def edited(path: Path, *changes: tuple[str, str]) -> Path:
    text = path.read_text()
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new, 1)
    path.write_text(text)
    return path


def rows_of(folder: Path, name: str = "results") -> list[dict[str, str]]:
    with (folder / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def but_for_times(folder: Path) -> list[list[str]]:
    return [
        [value for column, value in row.items() if column not in TIMES] for row in rows_of(folder)
    ]


def test_every_cell_is_measured_on_every_task(study_file, tmp_path):
    out = tmp_path / "out"
    result = run("sweep", study_file, "--out", out, "--quiet", "--json")
    assert result.exit_code == 0, result.stderr
    said = json.loads(result.stdout)
    assert (said["cells"], said["done_now"], said["failed"]) == (18, 18, {})
    rows = rows_of(out)
    assert len(rows) == 18 * 2
    assert {r["role"] for r in rows if r["task"] == "colours"} == {"source"}
    assert {r["role"] for r in rows if r["task"] == "bars"} == {"transfer"}
    for row in rows:
        assert row["status"] == "done"
        assert float(row["sparsity_reached"]) == pytest.approx(float(row["sparsity"]), abs=0.01)
        assert float(row["tuned"]) >= 0
        assert (row["damping"] == "") == (row["criterion"] != "obs-greedy")
        if float(row["sparsity"]) == 0:
            assert row["pruned"] == row["dense"]
            assert abs(float(row["measured_increase"])) < 1e-6
    # The classifier that the model came with is not pruned: tasks have heads of their own.
    assert {row["layer"] for row in rows_of(out, "layers")} == {"conv.weight"}
    assert (out / "report.html").stat().st_size > 1000
    facts = json.loads((out / "study.json").read_text())
    assert facts["cells"] == 18
    assert facts["models"]["tiny"]["prunable"] == 8 * 27


def test_one_set_of_statistics_serves_all_cells_of_a_seed(study_file, tmp_path, monkeypatch):
    import fastsal.pruning.process as process

    seen = []
    true_collected = process.collected

    def counted(model, batches, **more):
        seen.append(more["seed"])
        return true_collected(model, batches, **more)

    monkeypatch.setattr(process, "collected", counted)
    run_study(load_study(study_file), tmp_path / "out")
    # For each of two draws: what λ is chosen with, and what was held out for it.
    assert len(seen) == 4


def test_the_numbers_are_those_of_the_steps_taken_by_hand(study_file, tmp_path):
    edited(study_file, ('criterion = "magnitude"', 'criterion = "magnitude"\ndamping = 1e-3'))
    out = tmp_path / "out"
    run_study(load_study(study_file), out)
    from fastsal.study.images import open_tasks

    model = load_model(f"{tmp_path / 'tiny.py'}:tiny")
    tasks = list(open_tasks(load_study(study_file)).values())
    heads = fastsal.fit_heads(model, tasks, batch_size=16)
    dense = fastsal.evaluate(model, tasks, heads)
    scores = fastsal.score(model, None, "magnitude", parameters=["conv.weight"])
    fastsal.rank(scores, 0.75).apply(model)
    pruned = fastsal.evaluate(model, tasks, heads)
    found = {
        row["task"]: row
        for row in rows_of(out)
        if (row["criterion"], row["sparsity"], row["seed"]) == ("magnitude", "0.75", "1")
    }
    for name in dense:
        assert float(found[name]["dense"]) == dense[name]
        assert float(found[name]["pruned"]) == pruned[name]


def test_parts_share_no_image(study_file, tmp_path):
    run_study(load_study(study_file), tmp_path / "out")
    splits = json.loads((tmp_path / "out" / "splits.json").read_text())
    for parts in splits.values():
        assert set(parts) == {"prune", "fit", "tune", "test"}
        everything = [i for part in parts.values() for i in part]
        assert sorted(everything) == list(range(60))


def test_the_same_command_again_does_nothing_and_changes_nothing(study_file, tmp_path):
    out = tmp_path / "out"
    run_study(load_study(study_file), out)
    before = {p.name: p.read_bytes() for p in out.glob("*.csv")}
    done = run_study(load_study(study_file), out)
    assert (done.cells, done.done) == (18, 0)
    assert {p.name: p.read_bytes() for p in out.glob("*.csv")} == before


def test_a_study_that_grows_keeps_what_is_done(study_file, tmp_path):
    out = tmp_path / "out"
    run_study(load_study(study_file), out)
    before = but_for_times(out)
    edited(study_file, ("[0.0, 0.5, 0.75]", "[0.0, 0.5, 0.75, 0.9]"), ("[0, 1]", "[0, 1, 2]"))
    done = run_study(load_study(study_file), out)
    assert (done.cells, done.done) == (36, 18)
    after = but_for_times(out)
    assert all(row in after for row in before)


def test_a_sweep_that_was_killed_goes_on_to_the_same_table(study_file, tmp_path, python_env):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    command = [sys.executable, "-m", "fastsal", "sweep", str(study_file), "--quiet", "--threads=1"]
    subprocess.run([*command, "--out", str(whole)], check=True, env=python_env, timeout=300)
    process = subprocess.Popen([*command, "--out", str(cut)], env=python_env)
    deadline = time.monotonic() + 240
    while len(list(cut.glob("cells/*.json"))) < 5:
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    left = len(list(cut.glob("cells/*.json")))
    assert 5 <= left < 18, "killed in the middle"
    assert not (cut / "results.csv").exists()
    subprocess.run([*command, "--out", str(cut)], check=True, env=python_env, timeout=300)
    assert but_for_times(cut) == but_for_times(whole)
    for name in ("layers.csv", "layers.parquet", "splits.json"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()


def test_a_cell_that_fails_is_recorded_and_the_others_are_done(study_file, tmp_path):
    more = '\n[[sources]]\nname = "too many"\ntasks = "colours"\nsamples = 1000\n'
    edited(study_file, ("[[criteria]]", more + "\n[[criteria]]"))
    out = tmp_path / "out"
    result = run("sweep", study_file, "--out", out, "--quiet")
    assert result.exit_code == 1
    assert "18 failed" in result.stdout
    rows = rows_of(out)
    bad = [row for row in rows if row["status"] == "failed"]
    assert len(bad) == 18
    assert {row["source"] for row in bad} == {"too many"}
    assert all("images in split 'prune' of 'colours', got 1000" in row["error"] for row in bad)
    assert sum(row["status"] == "done" for row in rows) == 36
    # They are not tried again unless that is asked for.
    assert run_study(load_study(study_file), out).done == 0
    assert run_study(load_study(study_file), out, retry=True).done == 18


def test_sources_of_every_kind(study_file, tmp_path):
    kinds = """
[[sources]]
name = "mixed"
tasks = { colours = 1.0, bars = 0.5 }
[[sources]]
name = "stream"
tasks = ["bars", "colours"]
decay = 0.5
[[sources]]
name = "rare"
tasks = "colours"
imbalance = 0.5
samples = 8
[[sources]]
name = "noisy"
tasks = "colours"
corruption = "gaussian-noise"
[[sources]]
name = "unlabelled"
tasks = "colours"
curvature = "sampled"
[[sources]]
name = "features"
tasks = "colours"
curvature = "features"
"""
    edited(study_file, ('[[sources]]\ntasks = "colours"\n', kinds), ("[0.0, 0.5, 0.75]", "[0.6]"))
    edited(study_file, ('[[criteria]]\ncriterion = "magnitude"\n', ""), ("[0, 1]", "[0]"))
    edited(study_file, ('[[criteria]]\ncriterion = "random"\n', ""))
    out = tmp_path / "out"
    done = run_study(load_study(study_file), out)
    assert done.failed == {}
    rows = {(r["source"], r["task"]): r for r in rows_of(out)}
    assert rows["mixed", "bars"]["role"] == "source"
    assert rows["rare", "bars"]["role"] == "transfer"
    assert len({r["predicted_increase"] for r in rows.values()}) == 6
    assert all(0 <= float(r["tuned"]) <= 1 for r in rows.values())


def test_a_criterion_may_have_statistics_of_its_own(study_file, tmp_path):
    more = '[[criteria]]\ncriterion = "obs-greedy"\ncurvature = "features"\n\n[[criteria]]'
    edited(study_file, ("[[criteria]]", more), ("[0.0, 0.5, 0.75]", "[0.75]"))
    out = tmp_path / "out"
    assert run_study(load_study(study_file), out).failed == {}
    rows = rows_of(out)
    names = {r["criterion"] for r in rows}
    assert names == {"obs-greedy, features", "obs-greedy", "magnitude", "random"}
    by_name = {r["criterion"]: r for r in rows if (r["task"], r["seed"]) == ("bars", "0")}
    assert by_name["obs-greedy"]["damping"] != by_name["obs-greedy, features"]["damping"]


def test_a_criterion_with_refitting_is_a_row_of_its_own(study_file, tmp_path):
    more = (
        '[[criteria]]\ncriterion = "magnitude"\n'
        "refit = {steps = 20, batch_size = 16, lr = 0.005}\n\n[[criteria]]"
    )
    edited(study_file, ("[[criteria]]", more), ("[0.0, 0.5, 0.75]", "[0.75]"), ("[0, 1]", "[0]"))
    out = tmp_path / "out"
    done = run_study(load_study(study_file), out)
    assert done.failed == {}
    rows = {(r["criterion"], r["task"]): r for r in rows_of(out)}
    plain, refitted = rows["magnitude", "bars"], rows["magnitude, refit", "bars"]
    assert plain["sparsity_reached"] == refitted["sparsity_reached"]
    assert plain["measured_increase"] != refitted["measured_increase"]
    # The cells after it start from the dense weights again.
    other = run_study(load_study(edited(study_file, (more, "[[criteria]]"))), tmp_path / "other")
    assert other.failed == {}
    again = {(r["criterion"], r["task"]): r for r in rows_of(tmp_path / "other")}
    for key, row in again.items():
        assert row["pruned"] == rows[key]["pruned"]
        assert row["measured_increase"] == rows[key]["measured_increase"]


def test_reconstruction_is_a_row_of_its_own(study_file, tmp_path):
    text = '[[criteria]]\ncriterion = "{}"\nreconstruct = true\n\n'
    more = text.format("magnitude") + text.format("obs-greedy") + "[[criteria]]"
    edited(study_file, ("[[criteria]]", more), ("[0.0, 0.5, 0.75]", "[0.75]"), ("[0, 1]", "[0]"))
    out = tmp_path / "out"
    assert run_study(load_study(study_file), out).failed == {}
    rows = {(r["criterion"], r["task"]): r for r in rows_of(out)}
    for name in ("magnitude", "obs-greedy"):
        plain, other = rows[name, "bars"], rows[f"{name}, reconstructed", "bars"]
        assert plain["sparsity_reached"] == other["sparsity_reached"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('reconstruct = "yes"', "reconstruct must be true or false, got 'yes'"),
        ('refit = "layers"', "refit must be 'blocks' or 'whole', got 'layers'"),
        ("refit = {steps = 0}", "steps must be"),
        ("refit = {step = 5}", "step"),
        ("refit = true", "refit"),
    ],
)
def test_wrong_settings_of_stages_are_told(study_file, line, message):
    edited(study_file, ('criterion = "magnitude"', f'criterion = "magnitude"\n{line}'))
    with pytest.raises(InvalidArgument, match=message):
        load_study(study_file)


def test_rounds_collect_statistics_again(study_file, tmp_path):
    edited(study_file, ("[0.0, 0.5, 0.75]", "[0.75]"), ("[0, 1]", "[0]\nrounds = [1, 3]"))
    out = tmp_path / "out"
    assert run_study(load_study(study_file), out).failed == {}
    rows = [r for r in rows_of(out) if r["criterion"] == "obs-greedy" and r["role"] == "source"]
    one, three = sorted(rows, key=lambda r: r["rounds"])
    assert (one["rounds"], three["rounds"]) == ("1", "3")
    assert one["predicted_increase"] != three["predicted_increase"]
    assert one["sparsity_reached"] == three["sparsity_reached"]


def test_models_are_kept_where_asked_for(study_file, tmp_path):
    edited(study_file, ('name = "tiny"', 'save = "models"\nname = "tiny"'))
    out = tmp_path / "out"
    run_study(load_study(study_file), out)
    for row in rows_of(out):
        masks = fastsal.Masks.load(out / "masks" / f"{row['cell']}.safetensors")
        weights = out / "models" / f"{row['cell']}.safetensors"
        model = load_model(f"{tmp_path / 'tiny.py'}:tiny", weights=weights)
        masks.verify(model)
        assert masks.sparsity == float(row["sparsity_reached"])


def test_loss_lines_end_where_the_table_says(study_file, tmp_path):
    edited(
        study_file, ("[finetune]", "[diagnostics]\npoints = 3\nsparsities = [0.5]\n\n[finetune]")
    )
    out = tmp_path / "out"
    run_study(load_study(study_file), out)
    table = {(r["cell"], r["task"]): r for r in rows_of(out)}
    points = rows_of(out, "loss_line")
    assert {p["t"] for p in points} == {"0.0", "0.5", "1.0"}
    for point in points:
        row = table[point["cell"], point["task"]]
        assert (row["sparsity"], row["seed"]) == ("0.5", "0")
        start, end = point["path"].split("-")
        if point["t"] != "0.5":
            # All test images are measured, so the ends are the table's own numbers.
            assert float(point["accuracy"]) == float(row[start if point["t"] == "0.0" else end])
    overlaps = rows_of(out, "overlap")
    assert {r["task"] for r in overlaps} == {"colours", "bars"}
    assert all(0 <= float(r["diagonal"]) <= 1 + 1e-9 for r in overlaps)


def test_dry_run_says_what_a_study_needs_and_writes_nothing(study_file, tmp_path):
    out = tmp_path / "out"
    result = run("sweep", study_file, "--out", out, "--dry-run")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].startswith("tiny: 18 cells, 2 tasks each (3 criteria x 2 seeds x 3 sparsities)")
    assert lines[1] == "done: 0 of 18 cells"
    assert lines[2] == "images: 36 to prune, 27 to fit heads, 26 to fine-tune, 31 to test"
    assert [line.split(":")[0] for line in lines[3:]] == ["time", "memory"]
    result = run("sweep", study_file, "--out", out, "--dry-run", "--no-time", "--json")
    said = json.loads(result.stdout)
    assert (len(said["cells"]), said["missing"], "seconds" in said) == (18, [], False)
    assert not out.exists()


def test_dry_run_says_what_is_missing_and_exits_with_one(study_file, tmp_path):
    (tmp_path / "bars.npz").unlink()
    result = run("sweep", study_file, "--out", tmp_path / "out", "--dry-run", "--no-time")
    assert result.exit_code == 1
    missing = [line for line in result.stdout.splitlines() if line.startswith("missing: ")]
    assert missing == [f"missing: data {tmp_path / 'bars.npz'} does not exist (tasks bars)"]
    assert "unknown for 2 tasks" in result.stdout
    assert not (tmp_path / "out").exists()


def grey_cube(folder: Path) -> None:
    np.savez(folder / "bars.npz", x=np.zeros((60, 8, 8, 5), np.uint8), y=np.arange(60) % 2)


def lone_class(folder: Path) -> None:
    y = np.r_[np.zeros(58, int), 1, 1]
    np.savez(folder / "bars.npz", x=np.zeros((60, 8, 8, 3), np.uint8), y=y)


def other_classes(folder: Path) -> None:
    with np.load(folder / "bars.npz") as file:
        np.savez(folder / "test.npz", x=file["x"][:30], y=np.zeros(30, int))


BAD = [
    ([("seeds", "seed")], None, "line 4: seed is an unknown key; did you mean 'seeds'"),
    ([("bars.npz", "bar.npz")], None, "task 'bars': data: there is no file or folder"),
    ([('data = "bars.npz"', 'data = "bars.npz"\nclasses = [0, 7]')], None, "has no class 7"),
    ([], lone_class, "class '1'"),
    ([('"bars.npz"', '"bars.npz"\ntest = "test.npz"')], other_classes, "task 'bars'"),
    ([('"tiny.py:tiny"', '"tiny.py:tiny"\nweights = "w.safetensors"')], None, "w.safetensors"),
]


@pytest.mark.parametrize(("changes", "spoil", "message"), BAD)
def test_bad_input_is_one_line_and_nothing_is_lost(changes, spoil, message, study_file, tmp_path):
    edited(study_file, *changes)
    if spoil:
        spoil(tmp_path)
    failed(run("sweep", study_file, "--out", tmp_path / "out", "--quiet"), message)
    assert not list(tmp_path.glob("out/cells/*.json"))


def two_sizes(folder: Path) -> None:
    for name in "ab":
        (folder / "bars" / name).mkdir(parents=True)
        for i in range(20):
            size = (8, 8) if i else (9, 9)
            Image.new("RGB", size, (10 * i, 0, 0)).save(folder / "bars" / name / f"{i:02}.png")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (grey_cube, "must have 3 channels for this model, got 5"),
        (two_sizes, "size must be given for images of different sizes"),
    ],
)
def test_images_that_the_model_does_not_take_are_said_once(spoil, message, study_file, tmp_path):
    spoil(tmp_path)
    if (tmp_path / "bars").is_dir():
        edited(study_file, ('"bars.npz"', '"bars"'))
    result = run("sweep", study_file, "--out", tmp_path / "out", "--quiet")
    assert result.exit_code == 1
    assert result.stdout.count(message) == 1
    assert "18 cells: DataError: " in result.stdout
    assert {row["status"] for row in rows_of(tmp_path / "out")} == {"failed"}


def test_the_results_of_another_study_are_left_alone(study_file, tmp_path):
    out = tmp_path / "out"
    run_study(load_study(study_file), out)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    edited(study_file, ("epochs = 1", "epochs = 2"))
    failed(
        run("sweep", study_file, "--out", out),
        "another study (different settings: finetune.epochs)",
    )
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_transfer_is_a_study_of_one_model(study_file, tmp_path):
    del study_file
    out = tmp_path / "out"
    result = run(
        "transfer", f"{tmp_path / 'tiny.py'}:tiny", "--task", f"colours={tmp_path / 'tiny.npz'}",
        "--task", f"bars={tmp_path / 'bars.npz'}", "--source", "colours", "--sparsity", "0.5",
        "--epochs", "1", "--quiet", "--out", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.stdout + result.stderr
    assert {r["samples"] for r in rows_of(out)} == {"0", "15"}
    assert {r["criterion"] for r in rows_of(out)} == {"obs-greedy", "magnitude"}
    assert "report.html" in result.stdout


def test_classes_are_names_before_they_are_numbers(tiny_file, tmp_path):
    """Folders are numbered in the order of their names: 0, 1, 10, 2."""
    rng = np.random.default_rng(0)
    for name in ("0", "1", "10", "2"):
        (tmp_path / "digits" / name).mkdir(parents=True)
        for i in range(8):
            pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "digits" / name / f"{i}.png")
    result = run(
        "transfer", f"{tiny_file}:tiny", "--task", f"a={tmp_path / 'digits'}", "--classes", "a=1,2",
        "--source", "a", "--criterion", "magnitude", "--sparsity", 0.5, "--quiet",
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    splits = json.loads((tmp_path / "out" / "splits.json").read_text())["a"]
    assert sorted(i for part in splits.values() for i in part) == [*range(8, 16), *range(24, 32)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "colours", "--source", "colours"], "task must be NAME=VALUE, got 'colours'"),
        (["--task", "a=x.npz", "--source", "b"], "sources[0].tasks must be among a, got 'b'"),
        (
            ["--task", "a=x.npz", "--source", "a", "--test", "b=y"],
            "test must name one of the tasks a, got 'b'",
        ),
        (["--task", "a=sklearn:digits", "--source", "a", "--classes", "a=²,1"], "no class '²'"),
    ],
)
def test_transfer_says_what_it_takes(arguments, message, tmp_path, tiny_file):
    failed(run("transfer", f"{tiny_file}:tiny", *arguments, "--out", tmp_path / "out"), message)


def test_the_models_own_classifier_is_a_head_too(study_file, tmp_path):
    edited(study_file, ('data = "tiny.npz"', 'data = "tiny.npz"\nhead = "own"\nclasses = [2, 0]'))
    edited(study_file, ("seeds = [0, 1]", "seeds = [0]"), ("samples = 16", "samples = 8"))
    out = tmp_path / "out"
    assert run_study(load_study(study_file), out).failed == {}
    model = load_model(f"{tmp_path / 'tiny.py'}:tiny")
    whole = fastsal.open_images(tmp_path / "tiny.npz")
    places = json.loads((out / "splits.json").read_text())["colours"]["test"]
    test = whole.subset(places)
    right = 0
    for x, y in test.batches(input_spec(model)):
        with torch.no_grad():
            right += int((model(x)[:, [2, 0]].argmax(1) == (y == 0).long()).sum())
    rows = [r for r in rows_of(out) if r["task"] == "colours"]
    assert {r["head"] for r in rows} == {"own"}
    assert {r["dense"] for r in rows} == {str(right / len(places))}
    # The classifier stays as it is.
    assert {row["layer"] for row in rows_of(out, "layers")} == {"conv.weight"}


def test_paths_may_be_strings_and_the_summary_is_short(study_file, tmp_path):
    edited(study_file, ("[0.0, 0.5, 0.75]", "[0.5]"), ("[0, 1]", "[0]"))
    done = run_study(load_study(str(study_file), root=str(tmp_path)), str(tmp_path / "out"))
    assert repr(done).startswith("Summary(cells=3, done=3, failed=0, rows=6, warned=0, seconds=")
    assert run_study(load_study(study_file, root=tmp_path), tmp_path / "out").done == 0


FAULTS = {
    "model": ("def tiny", "def tiny(num_classes=3):\n    raise KeyError('deep')\n\n\ndef _tiny"),
    "pass": ("return torch.relu", "x.no_such_thing()\n        return torch.relu"),
    "memory": ("return torch.relu", "raise MemoryError('no room')\n        return torch.relu"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_cell_that_raises_anything_is_recorded(name, study_file, tmp_path):
    """Of two models one fails in its own code; the cells of the other are done."""
    old, new = FAULTS[name]
    whole = (tmp_path / "tiny.py").read_text()
    (tmp_path / "faulty.py").write_text(whole.replace(old, new, 1))
    edited(
        study_file,
        ("[[models]]", '[[models]]\nname = "faulty"\nmodel = "faulty.py:tiny"\n\n[[models]]'),
        ("[0.0, 0.5, 0.75]", "[0.5]"),
        ("[0, 1]", "[0]"),
    )
    out = tmp_path / "out"
    result = run("sweep", study_file, "--out", out, "--quiet")
    assert result.exit_code == 1, result.output
    rows = rows_of(out)
    assert {r["model"] for r in rows if r["status"] == "failed"} == {"faulty"}
    assert {r["model"] for r in rows if r["status"] == "done"} == {"tiny"}
    kinds = {"model": "KeyError", "pass": "AttributeError", "memory": "MemoryError"}
    assert all(r["error"].startswith(kinds[name]) for r in rows if r["status"] == "failed")
    (first, *_) = [p for p in (out / "cells").iterdir() if p.name.startswith("faulty")]
    assert "faulty.py" in "".join(json.loads(first.read_text())["traceback"])
    (tmp_path / "faulty.py").write_text(whole)
    done = run_study(load_study(study_file), out)  # another file of the model: other cells
    assert (done.done, done.failed) == (3, {})


def test_a_cell_whose_files_cannot_be_written_is_recorded(study_file, tmp_path, monkeypatch):
    import fastsal.study.runner as runner

    edited(study_file, ('name = "tiny"', 'save = "models"\nname = "tiny"'))
    edited(study_file, ("[0.0, 0.5, 0.75]", "[0.5]"), ("[0, 1]", "[0]"))
    save, calls = runner.save_weights, []

    def once(model, path):
        calls.append(path)
        if len(calls) == 1:
            raise PermissionError(13, "Permission denied", str(path))
        save(model, path)

    monkeypatch.setattr(runner, "save_weights", once)
    done = run_study(load_study(study_file), tmp_path / "out")
    assert (done.cells, len(done.failed)) == (3, 1)
    assert run_study(load_study(study_file), tmp_path / "out", retry=True).failed == {}


def test_a_second_sweep_of_a_folder_takes_the_other_cells(study_file, tmp_path, monkeypatch):
    import fastsal.study.runner as runner

    whole, shared = tmp_path / "whole", tmp_path / "shared"
    run_study(load_study(study_file), whole)
    compute, joined = runner._result, []

    def meanwhile(store, source, cell):
        if not joined:
            joined.append(None)
            second = run("sweep", study_file, "--out", shared, "--quiet", "--no-wait")
            joined[0] = second
        return compute(store, source, cell)

    monkeypatch.setattr(runner, "_result", meanwhile)
    done = run_study(load_study(study_file), shared)
    assert (done.cells, done.done, done.failed, done.elsewhere) == (18, 1, {}, 0)
    assert joined[0].exit_code == 0, joined[0].output
    assert "18 cells, 17 finished in this run" in joined[0].stdout
    assert "1 cell still computed by other processes" in joined[0].stdout
    assert not (shared / "report.html").exists()  # the last one writes it, here from Python
    assert but_for_times(shared) == but_for_times(whole)
    assert (shared / "layers.csv").read_bytes() == (whole / "layers.csv").read_bytes()
    assert not list(shared.rglob(".*"))
    assert run_study(load_study(study_file), shared).done == 0


def test_the_cell_of_a_process_that_was_taken_for_gone_is_not_stored_twice(
    study_file, tmp_path, monkeypatch
):
    """A machine that slept: others took the cell over and finished it meanwhile."""
    import fastsal.study.runner as runner

    edited(study_file, ("[0.0, 0.5, 0.75]", "[0.5]"), ("[0, 1]", "[0]"))
    out, compute, second = tmp_path / "out", runner._result, []
    tokens = []

    def meanwhile(store, source, cell):
        if not second:
            second.append(None)
            tokens.extend(presence.tokens_in(out / "cells"))
            second[0] = run_study(load_study(study_file), out)
        return compute(store, source, cell)

    alive = presence.Watch.is_alive
    monkeypatch.setattr(runner, "_result", meanwhile)
    monkeypatch.setattr(
        presence.Watch, "is_alive", lambda self, token: token not in tokens and alive(self, token)
    )
    first = run_study(load_study(study_file), out)
    assert (first.done, second[0].done) == (0, 3)
    assert len(list(out.glob("cells/*.json"))) == 3
    assert not list(out.rglob(".*.claim"))


def worker(study_file, out, python_env, *more):
    command = [sys.executable, "-m", "fastsal", "sweep", str(study_file), "--threads=1", "--out"]
    return subprocess.Popen(
        [*command, str(out), *more],
        env=python_env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_two_processes_write_the_table_of_one(study_file, tmp_path, python_env):
    run_study(load_study(study_file), tmp_path / "one")
    out = tmp_path / "two"
    both = [worker(study_file, out, python_env, "--json") for _ in range(2)]
    said = [json.loads(process.communicate(timeout=240)[0]) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum(each["done_now"] for each in said) == 18
    assert said[0]["rows"] == said[1]["rows"]
    assert but_for_times(out) == but_for_times(tmp_path / "one")
    for name in ("layers.csv", "layers.parquet", "splits.json"):
        assert (out / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    assert (out / "report.html").is_file()
    assert not list(out.rglob(".*"))


def test_under_torchrun_every_process_takes_cells_and_the_first_prints(
    study_file, tmp_path, monkeypatch
):
    edited(study_file, ("[0.0, 0.5, 0.75]", "[0.5]"), ("[0, 1]", "[0]"))
    for rank, out in (("1", tmp_path / "out"), ("0", tmp_path / "again")):
        monkeypatch.setenv("RANK", rank)
        result = run("sweep", study_file, "--out", out)
        assert result.exit_code == 0
        assert ("3 cells, 3 finished in this run" in result.output) == (rank == "0")
        assert (out / "report.html").is_file()


STUCK = """

import os, signal
from pathlib import Path

if os.environ.get("STOPS"):
    from fastsal.study import runner

    compute, cells = runner._result, []

    def _result(store, source, cell):
        cells.append(cell)
        if len(cells) == 4:
            print("in the middle", flush=True)
            signal.pause()
        return compute(store, source, cell)

    runner._result = _result
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_the_cell_of_a_killed_process_is_taken_up(how, study_file, tmp_path, python_env):
    """Killed in the middle of a cell, while another process waits for this cell."""
    run_study(load_study(study_file), tmp_path / "one")
    out = tmp_path / "two"
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(STUCK)
    path = os.pathsep.join([str(hook), python_env["PYTHONPATH"]])
    first = worker(study_file, out, {**python_env, "PYTHONPATH": path, "STOPS": "1"}, "--quiet")
    assert first.stdout.readline() == "in the middle\n"
    assert len(list(out.glob("cells/*.json"))) == 3
    second = worker(study_file, out, python_env)
    line = second.stderr.readline()
    while line and not line.startswith("waiting for"):
        line = second.stderr.readline()
    assert line.startswith("waiting for 1 cell of other processes: tiny-colours-")
    assert f"(process {first.pid} on " in line
    assert len(list(out.glob("cells/*.json"))) == 17
    os.kill(first.pid, how)
    _, last = first.communicate(timeout=240)
    if how == signal.SIGTERM:
        assert first.returncode == 143
        assert last.startswith("interrupted: finished cells are saved")
    said, _ = second.communicate(timeout=240)
    assert second.returncode == 0
    assert "18 cells, 15 finished in this run" in said
    assert but_for_times(out) == but_for_times(tmp_path / "one")
    assert not list(out.rglob(".*"))


def write_folder(folder: Path) -> None:
    rng = np.random.default_rng(1)
    for i in range(60):
        name = folder / "ab"[i % 2] / f"{i:02}.bmp"
        name.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 90, (8, 8, 3))
        pixels[:, :, i % 2] += 100
        Image.fromarray(pixels.astype(np.uint8)).save(name)


def test_cells_of_images_with_other_content_are_computed_again(study_file, tmp_path):
    write_folder(tmp_path / "bars")
    edited(study_file, ('"bars.npz"', '"bars"'), ("[0.0, 0.5, 0.75]", "[0.5]"), ("[0, 1]", "[0]"))
    out = tmp_path / "out"
    assert run_study(load_study(study_file), out).done == 3
    assert run_study(load_study(study_file), out).done == 0
    file = tmp_path / "bars" / "a" / "04.bmp"
    status = file.stat()
    Image.fromarray(255 - np.asarray(Image.open(file))).save(file)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    assert run_study(load_study(study_file), out).done == 3


CRITERION = """

from fastsal.pruning.criteria import criterion


@criterion("{0}", needs_fisher=False)
def mine(inputs):
    return {{name: {1} * weights.abs() for name, weights in inputs.weights.items()}}
"""


@pytest.fixture
def own_criterion(tmp_path, tiny_file):
    """A file of a model that registers a criterion."""
    names = []

    def write(factor=1):
        names.append("mine")
        (tmp_path / "own.py").write_text(tiny_file.read_text() + CRITERION.format("mine", factor))
        return f"{tmp_path / 'own.py'}:tiny"

    yield write
    for name in names:
        fastsal.CRITERIA.pop(name, None)


def test_a_criterion_of_the_model_file(own_criterion, tiny_npz, tmp_path):
    spec = own_criterion()
    common = ["--sparsity", 0.5, "--quiet", "--criterion", "mine"]
    result = run("prune", spec, *common, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    by_size = run("prune", spec, *common[:-1], "magnitude", "--out", tmp_path / "by-size")
    assert by_size.exit_code == 0, by_size.output
    masks = [fastsal.Masks.load(tmp_path / f / "masks.safetensors") for f in ("run", "by-size")]
    assert masks[0] == masks[1]
    result = run("prune", spec, *common, "--data", tiny_npz, "--out", tmp_path / "compensated")
    assert result.exit_code == 0, result.output
    scores = tmp_path / "scores.safetensors"
    result = run("score", spec, "--criterion", "mine", "--quiet", "--out", scores)
    assert result.exit_code == 0, result.output
    result = run("plan", spec, "--criterion", "mine", "--samples", 8, "--size", 8)
    assert result.exit_code == 0, result.output


def test_unknown_criteria_are_told(own_criterion, tmp_path):
    spec = own_criterion()
    common = ["--sparsity", 0.5, "--criterion", "min", "--out", tmp_path / "run"]
    failed(run("prune", spec, *common, "--quiet"), "--criterion must be one of magnitude, ")
    result = run("prune", "test_resnet", *common)
    failed(result, "--criterion must be one of magnitude, ")
    assert "weights are random" not in result.stderr  # before the model is built


def test_studies_with_a_criterion_of_the_model_file(own_criterion, study_file, tmp_path):
    own_criterion()
    fastsal.CRITERIA.pop("mine", None)
    edited(
        study_file,
        ('criterion = "magnitude"', 'criterion = "mine"'),
        ('"tiny.py:tiny"', '"own.py:tiny"'),
        ("[0.0, 0.5, 0.75]", "[0.5]"),
        ("[0, 1]", "[0]"),
    )
    out = tmp_path / "out"
    result = run("sweep", study_file, "--out", out, "--quiet")
    assert result.exit_code == 0, result.output
    assert "mine" in {r["criterion"] for r in rows_of(out)}
    edited(study_file, ('criterion = "mine"', 'criterion = "min"'))
    said = "'obs-greedy' or 'mine', got 'min'; did you mean 'mine'"
    failed(run("sweep", study_file, "--out", tmp_path / "other", "--quiet"), said)
