from __future__ import annotations

from pathlib import Path

import pytest
import timm

from fastsal.errors import FileFormatError, InvalidArgument
from fastsal.study.cells import cells_of
from fastsal.study.settings.reading import load_study

SMALL = """
name = "small"
sparsities = [0.7, 0.5]
seeds = [0, 1]

[[models]]
model = "file.py:net"

[[tasks]]
name = "a"
data = "a.npz"

[[tasks]]
name = "b"
data = "b.npz"
classes = ["x", "y"]

[[sources]]
tasks = "a"

[[criteria]]
criterion = "obs-greedy"

[[criteria]]
criterion = "magnitude"
"""


@pytest.fixture
def write(tmp_path: Path):
    def written(text: str) -> Path:
        path = tmp_path / "small.toml"
        path.write_text(text)
        return path

    return written


def test_defaults_and_names(write):
    study = load_study(write(SMALL))
    assert study.sparsities == (0.5, 0.7)
    assert study.models[0].name == "file.py:net"
    assert study.sources[0].name == "a"
    assert dict(study.sources[0].tasks) == {"a": 1.0}
    assert [c.name for c in study.criteria] == ["obs-greedy", "magnitude"]
    assert [c.compensate for c in study.criteria] == [True, False]
    assert study.finetune is None
    assert (study.device, study.autocast) == ("auto", None)
    assert "device" not in study.settings()
    assert "autocast" not in study.settings()
    assert study.root == study.folder


@pytest.mark.parametrize(
    ("criterion", "compensate", "name"),
    [
        ("magnitude", "true", "magnitude + compensation"),
        ("obs-greedy", "false", "obs-greedy alone"),
        ("block-fisher", "true", "block-fisher"),
        ("taylor", "false", "taylor"),
    ],
)
def test_a_criterion_is_named_by_what_is_unusual_about_it(criterion, compensate, name, write):
    text = SMALL + f'\n[[criteria]]\ncriterion = "{criterion}"\ncompensate = {compensate}\n'
    text = text.replace('[[criteria]]\ncriterion = "obs-greedy"\n', "", 1)
    text = text.replace('[[criteria]]\ncriterion = "magnitude"\n', "", 1)
    assert load_study(write(text)).criteria[0].name == name


def test_root_is_below_the_file_and_can_be_another(write, tmp_path):
    path = write('root = "images"\n' + SMALL)
    assert load_study(path).root == tmp_path / "images"
    assert load_study(path, root=tmp_path / "b").root == tmp_path / "b"


def test_the_grid_is_every_combination_once(write):
    cells = cells_of(load_study(write(SMALL)))
    grid = {(c.criterion.name, c.seed, c.sparsity) for c in cells}
    assert len(cells) == len(grid) == 8
    assert len({c.key for c in cells}) == 8
    # Cells that share statistics stand together.
    assert [c.seed for c in cells] == [0] * 4 + [1] * 4


def test_a_key_depends_on_what_its_numbers_depend_on(write):
    before = {c.key for c in cells_of(load_study(write(SMALL)))}

    def keys(text, digests=None):
        return {c.key for c in cells_of(load_study(write(text)), digests)}

    assert keys(SMALL) == before
    assert keys(SMALL.replace('"small"', '"another"')) == before
    assert keys(SMALL.replace("[0.7, 0.5]", "[0.7, 0.5, 0.9]")) > before
    assert keys(SMALL, {"model": "1"}).isdisjoint(before)
    assert keys('device = "cuda:1"\n' + SMALL) == before  # recorded with the results
    for line in (
        "block_size = 32",
        'autocast = "float16"',
        "ridge = 0.2",
        "samples = 8",
        "[split]\nseed = 1",
    ):
        changed = SMALL + line if line.startswith("[") else line + "\n" + SMALL
        assert keys(changed).isdisjoint(before), line


BAD = [
    ('name = "small"', "nam = 1", "line 2: nam is an unknown key; did you mean 'name'?"),
    ('name = "small"', "", "small.toml: name is missing"),
    ("seeds = [0, 1]", "seeds = [0, 0]", "line 4: seeds must hold distinct values, got [0, 0]"),
    ("seeds = [0, 1]", "seeds = 3", "line 4: seeds must be a non-empty list, got 3"),
    ("[0.7, 0.5]", "[70]", "line 3: sparsities must be in [0, 1], got 70"),
    ("[0.7, 0.5]", "[true]", "line 3: sparsities must be a number, got True"),
    (
        'data = "a.npz"',
        'dat = "a.npz"',
        "line 11: tasks[0].dat is an unknown key; did you mean 'data'",
    ),
    (
        'classes = ["x", "y"]',
        'classes = ["x"]',
        "line 16: tasks[1].classes must be two or more distinct names or indices, got ['x']",
    ),
    (
        'name = "b"',
        'name = "a"',
        "line 14: tasks[1].name must be unique in [[tasks]], got 'a' twice",
    ),
    ('tasks = "a"', 'tasks = "c"', "line 19: sources[0].tasks must be among a, b, got 'c'"),
    ('tasks = "a"', "tasks = {a = 0}", "sources[0].tasks.a must be positive, got 0"),
    ('tasks = "a"', 'tasks = "a"\ndecay = 0.5', "line 20: sources[0].decay requires a list of two"),
    (
        'tasks = "a"',
        'tasks = "a"\ncurvature = "none"',
        "must be 'empirical', 'sampled' or 'features', got 'none'",
    ),
    ('tasks = "a"', 'tasks = "a"\ncorruption = "blurr"', "got 'blurr'; did you mean 'blur'?"),
    ('tasks = "a"', 'tasks = "a"\nseverity = 6', "severity must be in [1, 5], got 6"),
    ('"obs-greedy"', '"obs-gredy"', "or 'obs-greedy', got 'obs-gredy'; did you mean 'obs-"),
    ('"magnitude"', '"magnitude"\ndamping = 0', "criteria[1].damping must be a positive number"),
    ('"magnitude"', '"magnitude"\npattern = "5:4"', "criteria[1].pattern is invalid (pattern"),
    ('"magnitude"', '"magnitude"\n[finetune]\nlr = 0.1', "finetune.epochs is missing"),
    (
        '"magnitude"',
        '"magnitude"\n[finetune]\nepochs=1\nlr=0.1\npatience=2',
        "finetune.patience requires held_out",
    ),
    ('"magnitude"', '"magnitude"\n[split]\nprune = 0.5', "fit + tune = 1, got a sum of 1.2"),
    (
        '"magnitude"',
        '"magnitude"\n[diagnostics]\nsparsities = [0.6]',
        "must be among the study's [0.7, 0.5], got 0.6",
    ),
    ('"magnitude"', '"magnitude"\n[[finetune]]', "finetune must be a table, [finetune]"),
    (
        "[[models]]",
        'device = "gpu"\n[[models]]',
        "line 6: device must be auto, cpu, cuda, cuda:N or",
    ),
    ("[[models]]", 'autocast = "half"\n[[models]]', "must be 'bfloat16' or 'float16', got 'half'"),
    ("[[models]]", "[models]", "models must be an array of tables, [[models]]"),
]


@pytest.mark.parametrize(("old", "new", "message"), BAD)
def test_bad_settings_name_the_key_the_line_and_what_is_taken(old, new, message, write):
    assert SMALL.count(old) >= 1
    with pytest.raises(InvalidArgument) as caught:
        load_study(write(SMALL.replace(old, new, 1)))
    assert message in str(caught.value)
    assert str(caught.value).startswith("small.toml")


def test_a_file_that_is_no_toml_names_the_line(write, tmp_path):
    with pytest.raises(FileFormatError, match=r"not valid TOML.*line 3"):
        load_study(write('name = "a"\n\nseeds = [\n'.replace("[\n", "]")))
    with pytest.raises(InvalidArgument, match="does not exist"):
        load_study(tmp_path / "absent.toml")


def test_a_byte_order_mark_is_no_mistake(write):
    path = write(SMALL)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_study(path).name == "small"


def test_lines_are_right_within_strings_and_lists_of_many_lines(write):
    text = SMALL.replace(
        "seeds = [0, 1]",
        'save = """none"""\nseeds = [\n  0,  # save = 1\n  "x",\n]',
    )
    with pytest.raises(InvalidArgument, match="line 5: seeds must be an integer, got 'x'"):
        load_study(write(text))


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[3] / "studies").glob("*.toml")))
def test_the_studies_of_the_repository_are_right(path):
    study = load_study(path)
    assert cells_of(study)
    for model in study.models:
        file = model.model.rpartition(":")[0]
        assert (study.folder / file).is_file() if file else timm.get_pretrained_cfg(model.model)


def test_every_criterion_is_a_choice():
    from fastsal.pruning.criteria import CRITERIA
    from fastsal.utils.choices import CRITERION_NAMES

    assert set(CRITERIA) == set(CRITERION_NAMES)


def test_a_study_is_shown_in_one_line(write):
    study = load_study(write(SMALL))
    assert repr(study) == (
        "Study('small', models=1, tasks=2, sources=1, criteria=2, sparsities=2, seeds=2, rounds=1)"
    )
