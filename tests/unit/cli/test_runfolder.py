"""The folder of a run is written whole, replaced whole, and tried before the work."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import fastsal
from fastsal.cli import main, runfolder
from fastsal.cli.runfolder import check_model, check_target, write_run
from fastsal.errors import FileFormatError, InvalidArgument
from fastsal.pruning.rounds import find_statistics


def model_of(seed):
    torch.manual_seed(seed)
    return nn.Linear(4, 3)


def write(folder, seed=0, draw=None):
    model = model_of(seed)
    masks = fastsal.rank(fastsal.score(model, None, "magnitude"), 0.5)
    masks.apply(model)
    write_run(folder, model, masks, {}, {"seed": seed}, draw)


def figure(path):
    path.write_text("<svg/>")


def names(folder):
    return sorted(p.name for p in folder.iterdir())


WHOLE = ["masks.safetensors", "model.safetensors", "report.json"]


def test_no_file_of_an_older_run_is_left(tmp_path):
    out = tmp_path / "run"
    write(out, 0, figure)
    (out / "notes.txt").write_text("mine")
    assert names(out) == sorted([*WHOLE, "notes.txt", "safety.svg"])
    write(out, 1)
    assert names(out) == sorted([*WHOLE, "notes.txt"])
    assert json.loads((out / "report.json").read_text())["seed"] == 1
    assert names(tmp_path) == ["run"]


@pytest.mark.parametrize("number", range(6))
def test_a_failed_replacement_leaves_the_older_run(number, tmp_path, monkeypatch):
    out = tmp_path / "run"
    write(out, 0, figure)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    replace, calls = os.replace, []

    def failing(source, target):
        # Of the moves into and out of the folder, and not those of single files beside it.
        if out in (Path(source).parent, Path(target).parent) and not calls.count("failed"):
            calls.append("failed" if len(calls) == number else "moved")
            if calls[-1] == "failed":
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(target))
        return replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="Input/output error"):
        write(out, 1)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_a_folder_that_appears_during_the_work(tmp_path):
    out = tmp_path / "run"
    write(out, 0, lambda _: (out.mkdir(), (out / "notes.txt").write_text("mine")))
    assert names(out) == sorted([*WHOLE, "notes.txt"])


def test_a_folder_that_cannot_be_written_is_told_beforehand(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidArgument, match="^out: .* cannot be written"):
        check_target(tmp_path / "file" / "run", force=False)
    check_model(tmp_path / "run", nn.Linear(2, 2))
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 2**20})())
    with pytest.raises(InvalidArgument, match="^out: .* needs 1 MiB of free disk space, got 1 MiB"):
        check_model(tmp_path / "run", nn.Linear(2, 2))
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("name", ["/etc/hostname", "../other.txt", "notes.txt"])
def test_a_report_names_the_files_of_its_folder_only(name, tmp_path):
    out = tmp_path / "run"
    write(out)
    report = json.loads((out / "report.json").read_text())
    report["sha256"][name] = "0" * 64
    (out / "report.json").write_text(json.dumps(report))
    with pytest.raises(FileFormatError, match="has the digest of another file"):
        runfolder.recorded_digests(out)


EXTRA_MODEL = """
from torch import nn


class Extra(nn.Linear):
    def get_extra_state(self):
        return {"step": 7}

    def set_extra_state(self, state):
        assert state == {"step": 7}


def net():
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), Extra(3, 3))
"""


def invoke(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments], prog_name="fastsal")


def test_models_with_extra_state_are_pruned(tmp_path, tiny_npz):
    (tmp_path / "net.py").write_text(EXTRA_MODEL)
    spec, out = f"{tmp_path / 'net.py'}:net", tmp_path / "run"
    done = invoke("prune", spec, "--data", tiny_npz, "--sparsity", 0.5, "--quiet", "--out", out)
    assert done.exit_code == 0, done.output
    assert invoke("verify", out).exit_code == 0
    done = invoke("eval", spec, "--weights", out, "--data", tiny_npz, "--quiet")
    assert done.exit_code == 0, done.output


def test_what_cannot_be_saved_is_told_before_the_work(tmp_path, tiny_npz, monkeypatch):
    code = EXTRA_MODEL + "\n\ndef bad():\n    model = net()\n"
    code += "    model.register_buffer('__metadata__', 1 * model[2].bias.detach())\n"
    code += "    return model\n"
    (tmp_path / "net.py").write_text(code)
    monkeypatch.setattr(fastsal, "prune", lambda *_, **__: pytest.fail("work was done"))
    done = invoke(
        "prune", f"{tmp_path / 'net.py'}:bad", "--data", tiny_npz, "--sparsity", 0.5,
        "--out", tmp_path / "run",
    )  # fmt: skip
    assert done.exit_code == 2
    assert "error: model: the name '__metadata__' is reserved" in done.stderr
    assert not (tmp_path / "run").exists()


def interrupted(*_, **__):
    raise KeyboardInterrupt


def test_nothing_was_written_is_said_where_it_is_so(tmp_path, tiny_file, tiny_npz, monkeypatch):
    command = [
        "score",
        f"{tiny_file}:tiny",
        "--data",
        tiny_npz,
        "--out",
        tmp_path / "s.safetensors",
    ]
    with monkeypatch.context() as patch:
        patch.setattr(fastsal, "score", interrupted)
        done = invoke(*command)
    assert done.exit_code == 130
    assert "interrupted: nothing was written" in done.stderr
    # The scores are there when the statistics are interrupted.
    monkeypatch.setattr(fastsal.BlockFisher, "save", interrupted)
    done = invoke(*command, "--save-statistics", tmp_path / "f.safetensors")
    assert done.exit_code == 130
    assert "nothing was written" not in done.stderr
    assert "interrupted: " in done.stderr
    assert "s.safetensors written before" in done.stderr


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (("score", "--save-statistics"), "--save-statistics"),
        (("prune", "--sparsity", 0.5, "--checkpoint"), "--checkpoint"),
        (
            ("finetune", "--weights", "run", "--epochs", 1, "--lr", 0.1, "--checkpoint"),
            "--checkpoint",
        ),
    ],
    ids=["score", "prune", "finetune"],
)
def test_a_second_file_is_not_the_output(command, option, tmp_path, tiny_file, tiny_npz):
    out = tmp_path / "x.safetensors"
    name, *words = command
    done = invoke(name, f"{tiny_file}:tiny", "--data", tiny_npz, "--out", out, *words, out)
    assert done.exit_code == 2
    assert f"error: {option} must be another path than --out, got {out} for both" in done.stderr
    assert not out.exists()


def test_an_output_that_is_refused_is_named(tmp_path, tiny_file, tiny_npz):
    done = invoke(
        "score", f"{tiny_file}:tiny", "--data", tiny_npz, "--out", tmp_path / "s.safetensors",
        "--save-statistics", tmp_path,
    )  # fmt: skip
    assert f"error: save_statistics must be a file, got the folder {tmp_path}" in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_sigterm_leaves_no_temporary_files(tmp_path, tiny_file, tiny_npz, monkeypatch):
    def half_written(_, path):
        Path(path).write_text("half")
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(fastsal.BlockFisher, "save", half_written)
    out, before = tmp_path / "out", signal.getsignal(signal.SIGTERM)
    done = invoke(
        "score", f"{tiny_file}:tiny", "--data", tiny_npz, "--out", out / "s.safetensors",
        "--save-statistics", out / "f.safetensors",
    )  # fmt: skip
    assert done.exit_code == 143
    assert "interrupted: " in done.stderr
    assert names(out) == ["s.safetensors"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_interrupted_run_names_its_checkpoint(tmp_path, tiny_file, tiny_npz, monkeypatch):
    from fastsal.pruning import rounds

    find = rounds.find_statistics

    def second(job, count, number, **how):
        return interrupted() if number == 2 else find(job, count, number, **how)

    monkeypatch.setattr(rounds, "find_statistics", second)
    done = invoke(
        "prune", f"{tiny_file}:tiny", "--data", tiny_npz, "--sparsity", 0.5, "--rounds", 2,
        "--quiet", "--checkpoint", tmp_path / "state", "--out", tmp_path / "run",
    )  # fmt: skip
    assert done.exit_code == 130
    assert (tmp_path / "state").exists()
    assert f"{tmp_path / 'state'} written before" in done.stderr


def test_a_checkpoint_is_kept_until_the_run_is_written(tmp_path, tiny_file, tiny_npz, monkeypatch):
    command = [
        "prune", f"{tiny_file}:tiny", "--data", tiny_npz, "--sparsity", 0.5, "--rounds", 2,
        "--quiet", "--checkpoint", tmp_path / "state", "--out", tmp_path / "run",
    ]  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr("fastsal.cli.runfolder.write_run", lambda *_, **__: interrupted())
        assert invoke(*command).exit_code == 130
    assert (tmp_path / "state").exists()
    collected = []
    monkeypatch.setattr(
        "fastsal.pruning.rounds.find_statistics",
        lambda job, rounds, number, **how: (
            collected.append(number) or find_statistics(job, rounds, number, **how)
        ),
    )
    assert invoke(*command).exit_code == 0
    assert collected == [2]
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("command", ["prune", "finetune"])
def test_a_checkpoint_is_no_folder(command, tmp_path, tiny_file, tiny_npz):
    model = (f"{tiny_file}:tiny", "--data", tiny_npz, "--quiet")
    magnitude = ("--sparsity", 0.5, "--criterion", "magnitude", "--no-compensate")
    run = tmp_path / "run"
    assert invoke("prune", *model, *magnitude, "--out", run).exit_code == 0
    words = {
        "prune": ("--sparsity", 0.5),
        "finetune": ("--weights", run, "--epochs", 1, "--lr", 0.1),
    }[command]
    done = invoke(command, *model, *words, "--checkpoint", run, "--out", tmp_path / "out")
    assert done.exit_code == 2, done.output
    assert f"error: checkpoint must be a file, got the folder {run}\n" in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_command_leaves_the_warnings_of_the_process(tmp_path):
    import warnings

    before = warnings.showwarning
    invoke("verify", tmp_path)
    assert warnings.showwarning is before
