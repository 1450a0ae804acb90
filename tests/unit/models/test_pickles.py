from __future__ import annotations

import os
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from fastsal.errors import FileFormatError
from fastsal.models.pickles import read_pickle
from fastsal.models.weights import read_weights
from fastsal.utils.plain_text import first_line, plain_line


class Executed:
    """An object whose file runs a command when it is read without care."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("where", ["beside", "in a number", "in an array", "in the weights"])
def test_nothing_in_a_file_is_executed(tmp_path, zipped, where):
    made = tmp_path / "made"
    evil = Executed(f"touch {made}")
    state = {"a": torch.ones(2)}
    content = {
        "beside": {"state_dict": state, "args": evil},
        "in a number": {"state_dict": state, "args": np.array([evil], dtype=object)},
        "in an array": {"state_dict": state, "args": np.array([[evil]], dtype=object)},
        "in the weights": {"state_dict": {**state, "b": evil}},
    }[where]
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(FileFormatError, match="cannot be read as plain tensors") as error:
        read_weights(tmp_path / "w.pth")
    assert not made.exists()
    text = str(error.value)
    assert "\x1b" not in text
    assert "\n" not in text
    assert len(text) < 400


def test_objects_that_are_refused_are_named_with_the_cure(tmp_path):
    torch.save({"state_dict": {"a": torch.ones(2)}, "b": Fraction(1)}, tmp_path / "w.pth")
    message = (
        r"\(it contains fractions.Fraction\); where it was made, save model.state_dict\(\) alone "
        r"with torch.save, and pass that file$"
    )
    with pytest.raises(FileFormatError, match=message):
        read_weights(tmp_path / "w.pth")
    torch.save(nn.Linear(2, 2), tmp_path / "w.pth")
    with pytest.raises(FileFormatError, match=r"it contains .*torch.nn.modules.linear.Linear"):
        read_weights(tmp_path / "w.pth")


@pytest.mark.parametrize(
    "content",
    [
        b"", b"text", b"\x80\x02.", b"PK\x03\x04", pickle.dumps({"a": 1}), b"\x80\x02}q\x00X",
        pickle.dumps({"a": np.ones(2)}, protocol=4), b"\x1b[1mbold\x1b[0m\n",
    ],
)  # fmt: skip
def test_other_files_are_refused_in_one_line(tmp_path, content):
    (tmp_path / "w.bin").write_bytes(content)
    with pytest.raises(
        FileFormatError, match=r"^checkpoint: .*w.bin cannot .* \(.+\); do this$"
    ) as e:
        read_pickle(tmp_path / "w.bin", "checkpoint", "do this")
    assert "\x1b" not in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a\x1b[1mb\x1b[0m c", "ab c"),
        ("\x1b[38;5;196mred\x1b[m\nnext\tword", "red next word"),
        ("\x1b]0;title\x07shown \x1b]8;;http://a\x1b\\link\x1b]8;;\x1b\\", "shown link"),
        ("bell\x07 and\x00zero\x9b", "bell and zero"),
        ("Erdős–Rényi λ", "Erdős–Rényi λ"),
        ("word " * 100, "word " * 60 + "..."),
    ],
)
def test_a_plain_line(text, line):
    assert plain_line(text) == line


def test_the_first_line_of_an_error():
    assert first_line(ValueError("\n\x1b[1m\x1b[0m\n first \n second")) == "first"
    assert first_line(KeyError()) == "KeyError"
