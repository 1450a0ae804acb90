"""`fastsal report`: the results of a study as a page."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from fastsal.cli import options


@click.command(short_help="The results of a study as a page.")
@click.argument("folder", type=options.PATH, metavar="DIR")
@click.option(
    "--format",
    "kind",
    type=click.Choice(["html", "md"]),
    default="html",
    show_default=True,
    help="One self-contained page, or Markdown.",
)
@click.option(
    "--out",
    type=options.PATH,
    metavar="FILE",
    help="Where to write. [default: report.html or report.md in DIR]",
)
@click.option(
    "--figures",
    type=options.PATH,
    metavar="FOLDER",
    help="Also write accuracy against sparsity as SVG files; the Markdown links them.",
)
@click.option(
    "--margin",
    type=click.FloatRange(0, 100),
    default=1.0,
    show_default=True,
    help="Points that accuracy may lose and still count as kept.",
)
@click.option(
    "--diagnostics/--no-diagnostics",
    default=None,
    help="Show loss lines and Fisher overlaps. [default: if DIR has them]",
)
@options.force_option
def report(**given: Any) -> None:
    """Write what a study found: DIR is the folder of `fastsal transfer` or `fastsal sweep`.

    The page says what was done, which predictions held with what confidence, and shows every
    number. It needs the extra: pip install "fastsal[report]"; Markdown does not.
    """
    from fastsal.errors import InvalidArgument
    from fastsal.study.report import html, markdown
    from fastsal.study.report.findings import sections
    from fastsal.study.report.overview import write_pictures
    from fastsal.study.report.results import read_results
    from fastsal.utils.atomic import write_text

    folder, kind, margin = given["folder"], given["kind"], given["margin"]
    results = read_results(folder)
    if given["diagnostics"] and not (results.loss_lines or results.overlaps):
        raise InvalidArgument(
            f"diagnostics: {folder} has neither loss_line.csv nor overlap.csv; add [diagnostics] "
            "to the study to measure them"
        )
    out = given["out"] or folder / f"report.{kind}"
    if out.is_dir():
        raise InvalidArgument(f"out: {out} is a folder; takes a file")
    if out.exists() and not given["force"]:
        raise InvalidArgument(f"out: {out} is there already; give --force to replace it")
    pictures = {}
    if given["figures"]:
        pictures = write_pictures(sections(results, margin), given["figures"])
    if kind == "html":
        text = html.page(results, diagnostics=given["diagnostics"] is not False, margin=margin)
    else:
        links = {key: _link(path, out) for key, path in pictures.items()}
        text = markdown.page(results, margin=margin, pictures=links)
    write_text(out, text)
    for path in (*pictures.values(), out):
        click.echo(str(path))


def _link(path: Path, page: Path) -> str:
    """Return the link from a page to a picture."""
    from urllib.parse import quote

    relative = os.path.relpath(path.absolute(), page.absolute().parent)
    return quote(Path(relative).as_posix())
