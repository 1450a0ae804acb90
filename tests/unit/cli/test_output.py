"""What commands print: names and paths as they are, also those that look like markup."""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from fastsal.cli import main
from fastsal.cli.output import console, drawn_bar, kept_table, reconstruction_summary
from fastsal.pruning.masks.in_use import InUse
from fastsal.pruning.masks.masks import Masks
from fastsal.pruning.reconstruction_result import Reconstruction

NAME = "a[/b] [red]:smile:"


def test_brackets_are_no_markup(capsys):
    screen = console()
    screen.print(NAME, style="bold")
    screen.print(kept_table({f"{NAME}.weight": 1}, {f"{NAME}.weight": (2, 1)}), width=120)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == NAME
    assert f"{NAME}.weight  2x1       1   2  50.0" in lines[-1]


@pytest.mark.parametrize("share", [0, 0.26, 0.999, 1])
def test_a_bar_has_one_length(share):
    assert len(drawn_bar(share)) == 20


def test_one_is_not_several():
    shown = (
        reconstruction_summary(Reconstruction(2.0, 1.0, True, 1, 1)),
        reconstruction_summary(Reconstruction(2.0, 1.0, True, 2, 1024)),
        str(InUse(0.5, {"a": 0.25})),
        str(InUse(0.5, {"a": 0.25, "b": 0.5})),
    )
    assert "of 1 layer on 1 image:" in shown[0]
    assert "of 2 layers on 1,024 images:" in shown[1]
    assert "as 1 layer computes its weight from the masked parameter, that of 'a'" in shown[2]
    assert "as 2 layers compute their weight from the masked parameter, such as that of" in shown[3]


def test_commands_say_where_they_wrote(tiny_file, tiny_npz, tmp_path):
    model = (f"{tiny_file}:tiny", "--data", tiny_npz, "--quiet")
    (tmp_path / NAME).mkdir(parents=True)  # a slash is in it
    paths = {
        name: tmp_path / NAME / name
        for name in ("run[/b]", "tuned[b]", "s[/b].safetensors", "m[red].safetensors",
                     "c[/b].safetensors", "layers[/b].svg")
    }  # fmt: skip
    folder, tuned, scores, masks, weights, figure = paths.values()
    commands = (
        ("prune", *model, "--sparsity", 0.5, "--criterion", "magnitude", "--out", folder),
        ("finetune", *model, "--weights", folder, "--epochs", 1, "--lr", 0.1, "--out", tuned),
        ("score", *model, "--out", scores),
        ("rank", scores, "--sparsity", 0.5, "--out", masks),
        ("compensate", *model, "--masks", masks, "--out", weights),
        ("inspect", folder, "--figure", figure),
    )
    for command, path in zip(commands, paths.values(), strict=True):
        result = CliRunner().invoke(main, [str(word) for word in command])
        assert result.exit_code == 0, (command, result.output, result.exception)
        assert f"ritten to {path}\n" in result.stdout
        assert path.exists()


@pytest.fixture
def folder(tmp_path):
    """A folder with weights and masks, as those of a run, of a name that is not ASCII."""
    from safetensors.torch import save_file

    path = tmp_path / "Läufe"
    path.mkdir()
    mask = torch.tensor([[True, False, True, False]])
    save_file({"fc.weight": torch.ones(1, 4) * mask}, path / "model.safetensors")
    Masks({"fc.weight": mask}).save(path / "masks.safetensors")
    return path


def test_an_output_without_blocks_and_accents_is_written(folder, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    monkeypatch.setattr(sys, "stdout", stream)
    figure = folder / "layers.svg"
    main.main(["inspect", str(folder), "--figure", str(figure)], standalone_mode=False)
    assert stream.errors == "strict"  # as before: the process may go on
    stream.flush()
    text = stream.buffer.getvalue().decode("ascii")
    assert "fc.weight  1x4       2    0.5000" in text
    assert "L?ufe" in text


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device of a full disk")
def test_a_full_disk_below_the_output_is_one_line(folder, monkeypatch, capsys):
    for words in ([], ["--json"]):
        with contextlib.suppress(OSError), open("/dev/full", "w", encoding="utf-8") as full:
            monkeypatch.setattr(sys, "stdout", full)
            with pytest.raises(SystemExit) as stop:
                main.main(["inspect", str(folder), *words], prog_name="fastsal")
            monkeypatch.undo()
        assert stop.value.code == 2
        line = "error: the output cannot be written: No space left on device\n"
        assert capsys.readouterr().err == line
