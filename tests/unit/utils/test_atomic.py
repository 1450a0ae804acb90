from __future__ import annotations

import errno

import pytest

from fastsal.utils.atomic import atomic_path, write_text


def test_a_file_appears_whole(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    write_text(path, "one")
    write_text(path, "two")
    assert path.read_text() == "two"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt()])
def test_a_file_stays_what_it_was_where_the_block_fails(error, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("before")

    def half_written():
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(type(error)):
        half_written()
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("name", [None, "temporary", "other"])
def test_a_full_disk_is_said_by_the_name_of_the_file(name, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("before")

    def full():
        with atomic_path(path) as temporary:
            filename = {None: None, "temporary": str(temporary), "other": "b.txt"}[name]
            raise OSError(errno.ENOSPC, "Error writing bytes", filename)

    with pytest.raises(OSError, match="b.txt" if name == "other" else "No space left") as caught:
        full()
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == ("b.txt" if name == "other" else str(path))
    assert path.read_text() == "before"


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        write_text(tmp_path / "file" / "a.txt", "x")
