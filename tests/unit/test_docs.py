"""The docs agree with the package: names, links, Python blocks, commands and options."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
import subprocess
from pathlib import Path
from urllib.parse import unquote

import click
import pytest

import fastsal
import fastsal.distributed
from fastsal.cli import main

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "studies" / "README.md",
    ROOT / "benches" / "results" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
# A changelog also names what was removed.
CURRENT = [p for p in PAGES if p.name != "CHANGELOG.md"]
# Files with commands in comments or docstrings, one per line.
COMMENTED = [*sorted((ROOT / "studies").glob("*.toml")), *sorted((ROOT / "examples").glob("*.py"))]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def fences(page: Path, language: str) -> list[str]:
    """Code blocks of one language."""
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(
        r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )


# ---------------------------------------------------------------------------------- public names


def described() -> set[str]:
    """Names in the first column of the tables of the API page."""
    return set(re.findall(r"^\| `([\w.]+)` \|", prose(ROOT / "docs" / "api.md"), re.MULTILINE))


def public() -> set[str]:
    names = set(fastsal.__all__) - {"__version__", "distributed"}
    return names | {f"distributed.{name}" for name in fastsal.distributed.__all__}


def test_every_public_name_is_on_the_api_page():
    assert public() - described() == set()


def test_the_api_page_names_nothing_else():
    assert described() - public() == set()


def test_every_line_of_the_api_page_says_where_a_name_is_described():
    rows = [r for r in prose(ROOT / "docs" / "api.md").splitlines() if r.startswith("| `")]
    assert len(rows) == len(described())
    for row in rows:
        _, description, page = (cell.strip() for cell in row.strip("|").split("|"))
        assert len(description) > 10, row
        assert "](" in page, row


# ----------------------------------------------------------------------------------------- links


def tracked() -> set[str] | None:
    """Files under version control, or None outside of a repository."""
    try:
        done = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return set(done.stdout.split("\0")) - {""}


def anchors(page: Path) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    found = re.findall(r"^#{1,6} (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in found}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_lead_to_tracked_files(page: Path):
    files = tracked()
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = unquote(target).partition("#")
        there = (page.parent / path).resolve() if path else page
        name = there.relative_to(ROOT).as_posix()
        assert there.exists(), f"{name_of(page)}: {target} leads to no file"
        if files is not None and there.is_dir():
            assert any(f.startswith(f"{name}/") for f in files), f"{name_of(page)}: {target}"
        elif files is not None:
            assert name in files, f"{name_of(page)}: {target} is not tracked"
        if anchor:
            assert anchor in anchors(there), f"{name_of(page)}: {target} leads to no heading"


# --------------------------------------------------------------------------------- Python blocks


def python_blocks() -> list[tuple[str, str]]:
    return [
        (f"{name_of(page)}, block {i}", block)
        for page in PAGES
        for i, block in enumerate(fences(page, "python"), start=1)
    ]


@pytest.mark.parametrize(
    ("where", "block"), [pytest.param(*found, id=found[0]) for found in python_blocks()]
)
def test_python_blocks_call_what_exists(where: str, block: str):
    compile(block, where, "exec")
    for call in [n for n in ast.walk(ast.parse(block)) if isinstance(n, ast.Call)]:
        path = ast.unparse(call.func)
        if path.startswith("fastsal."):
            check_keywords(where, path.removeprefix("fastsal."), call)


def check_keywords(where: str, path: str, call: ast.Call) -> None:
    """The function at a path below `fastsal` takes the keywords of a call."""
    function = fastsal
    for part in path.split("."):
        function = getattr(function, part)
    accepted = inspect.signature(function).parameters
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values()):
        for keyword in call.keywords:
            assert keyword.arg in accepted, f"{where}: {path}({keyword.arg}=...)"


def keywords() -> set[str]:
    """Arguments of the public functions, and of the methods of public classes."""
    functions = [getattr(fastsal, name) for name in fastsal.__all__]
    functions += [getattr(fastsal.distributed, name) for name in fastsal.distributed.__all__]
    for owner in [f for f in functions if inspect.isclass(f) and not issubclass(f, Exception)]:
        functions += [m for _, m in inspect.getmembers(owner, inspect.isroutine)]
    found: set[str] = set()
    for function in functions:
        try:
            found.update(inspect.signature(function).parameters)
        except (TypeError, ValueError):  # no function, or one of the interpreter
            continue
    return found


@pytest.mark.parametrize("page", CURRENT, ids=name_of)
def test_mentioned_arguments_exist(page: Path):
    """`argument=value` and `function(argument=value)` in code spans."""
    known = keywords()
    for span in re.findall(r"`([^`\n]+)`", prose(page)):
        if match := re.match(r"(\w+)=", span):
            assert match[1] in known, f"{name_of(page)}: no function takes {span}"
        if match := re.match(r"(?:fastsal\.)?(\w+)\(.*=.*\)$", span):
            call = ast.parse(span, mode="eval").body
            if match[1] in fastsal.__all__ and isinstance(call, ast.Call):
                check_keywords(name_of(page), match[1], call)


def test_there_are_python_blocks_in_the_readme():
    assert fences(ROOT / "README.md", "python")


# ---------------------------------------------------------------------------------- command lines


def shell_commands() -> list[tuple[str, str]]:
    """`fastsal ...` command lines of shell blocks and of comments, whole."""
    found = []
    for page in PAGES:
        for block in fences(page, "sh"):
            joined = re.sub(r"\\\n\s*", " ", block)
            found += [(name_of(page), line) for line in joined.splitlines()]
    for path in COMMENTED:
        text = re.sub(r"\\\n[#\s]*", " ", path.read_text(encoding="utf-8"))
        found += [(name_of(path), line.strip("# ")) for line in text.splitlines()]
    commands = []
    for where, line in found:
        for piece in line.split("&&"):
            words = re.search(r"(?:^|/|-m )(fastsal [a-z].*)$", piece.partition("   #")[0].strip())
            if words:
                commands.append((where, words[1].strip()))
    return commands


def mentioned_commands() -> list[tuple[str, str]]:
    """`fastsal ...` in code spans of the text: a command and perhaps some options."""
    return [
        (name_of(page), span)
        for page in PAGES
        for span in re.findall(r"`(fastsal [a-z][^`]*)`", prose(page))
    ]


def command_of(words: list[str]) -> click.Command:
    command = main.commands.get(words[1])
    assert command is not None, f"there is no command {words[1]!r}"
    return command


@pytest.mark.parametrize(("where", "line"), shell_commands())
def test_command_lines_can_be_parsed(where: str, line: str):
    words = shlex.split(line, comments=True)
    command = command_of(words)
    if words[-1] == "...":
        check_options(command, words)
    else:
        command.make_context(words[1], words[2:], parent=click.Context(main))


@pytest.mark.parametrize(("where", "span"), mentioned_commands())
def test_mentioned_commands_have_their_options(where: str, span: str):
    words = shlex.split(span)
    if words[1] == "COMMAND":
        return
    check_options(command_of(words), words)


def check_options(command: click.Command, words: list[str]) -> None:
    known = options_of(command)
    for word in words[2:]:
        if word.startswith("--"):
            assert word.partition("=")[0] in known, f"{' '.join(words)}: {word} is no option"


def options_of(command: click.Command) -> set[str]:
    named = {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
    return named | {"--help", "-h"}


@pytest.mark.parametrize("page", CURRENT, ids=name_of)
def test_mentioned_options_exist(page: Path):
    """An option in a code span of its own belongs to some command."""
    known = options_of(main).union(*map(options_of, main.commands.values()))
    for span in re.findall(r"`(--[a-z][^`]*)`", prose(page)):
        option = re.split(r"[ =]", span)[0]
        assert option in known, f"{name_of(page)}: no command has {option}"


def test_all_commands_are_on_the_command_line_page():
    text = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `fastsal ([a-z]+)` \|", text, re.MULTILINE))
    assert listed == set(main.commands)


def test_the_test_command_is_under_its_marker():
    """`.ci/run` takes the one line of the shell block that follows the marker."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"<!-- test-command -->\n```sh\n(.+)\n```\n", text)
    assert block is not None
    assert block[1].endswith("make test")
