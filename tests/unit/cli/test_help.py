"""Help pages: every option is explained and in a section, and torch is not imported."""

from __future__ import annotations

import re
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from fastsal.cli import main
from fastsal.cli.help import OTHER, SECTIONS, section_of

OPTIONS = [
    (name, param)
    for name, command in [("", main), *main.commands.items()]
    for param in command.params
    if isinstance(param, click.Option)
]
TEXTS = [(f"{name} {param.opts[0]}", param.help or "") for name, param in OPTIONS]
TEXTS += [(name, command.help or "") for name, command in main.commands.items()]
TEXTS += [(f"{name} in short", c.get_short_help_str(200)) for name, c in main.commands.items()]
# Phrases of texts that cannot be read alone, or that are not plain.
BANNED = ("as for", "the same.", "a pass.", "of it.", "stands", "takes")


def page(*arguments, width=100):
    result = CliRunner().invoke(
        main,
        [*arguments, "--help"],
        prog_name="fastsal",
        terminal_width=width,
        max_content_width=width,
    )
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize(("name", "text"), TEXTS, ids=[name for name, _ in TEXTS])
def test_every_text_is_made_of_sentences(name, text):
    first = text.split("\n\n")[0]
    assert first[:1].isupper(), name
    assert first.endswith("."), name
    for phrase in BANNED:
        assert phrase not in text.lower(), phrase


@pytest.mark.parametrize("name", main.commands)
def test_the_page_lists_every_option_with_its_text(name):
    lines = page(name, width=10_000).splitlines()
    for param in (param for command, param in OPTIONS if command == name):
        # An option, its text, and in brackets its default or that it is required.
        wanted = rf" *{param.opts[0]}\b.*  {re.escape(param.help)}(  \[(default: .+|required)\])?"
        text = "\n".join(lines)
        alone = wanted.replace(r"\b.*  ", r"\b.*\n +")  # a long first column has its own line
        assert re.search(f"^{wanted}$", text, re.M) or re.search(f"^{alone}$", text, re.M), wanted
        assert ("[required]" in text) or not param.required


def test_every_option_has_a_section():
    names = {param.name for name, param in OPTIONS if name}
    assert {name for name in names if section_of(name)[0] == OTHER} == set()
    listed = [name for names in SECTIONS.values() for name in names]
    assert len(set(listed)) == len(listed)
    assert set(listed) <= names


def test_the_pages_are_at_most_100_characters_wide():
    for name in main.commands:
        assert max(map(len, page(name).splitlines())) <= 100


def test_commands_are_listed_in_the_order_of_work():
    listed = re.findall(r"^  ([a-z]+) {2,}", page().partition("Commands:")[2], re.MULTILINE)
    assert listed == list(main.commands)
    assert listed[:3] == ["prune", "plan", "score"]


def test_no_help_imports_torch(python_env):
    code = (
        "import sys; from click.testing import CliRunner; from fastsal.cli import main\n"
        "pages = [[], *([name] for name in main.commands)]\n"
        "codes = [CliRunner().invoke(main, [*page, '--help']).exit_code for page in pages]\n"
        "found = {'torch', 'timm', 'numpy', 'rich', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'{codes} {found}' if any(codes) or found else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=python_env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
