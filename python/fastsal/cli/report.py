"""`fastsal report`: write the results of a study or of runs as a page."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from fastsal.cli import options
from fastsal.cli.help import Command
from fastsal.cli.types import PATH, Number, choice


@click.command(cls=Command, short_help="Write the results of a study or of runs as a page.")
@click.argument("folder", type=PATH, metavar="DIR")
@click.option(
    "--format",
    "kind",
    type=choice(("html", "md")),
    default="html",
    show_default=True,
    help="Format of the report: one self-contained HTML page, or Markdown (md).",
)
@click.option(
    "--out",
    type=PATH,
    metavar="FILE",
    show_default="report.html or report.md in DIR",
    help="File for the report.",
)
@click.option(
    "--figures",
    type=PATH,
    metavar="DIR",
    help="Folder for SVG figures of accuracy over sparsity; a Markdown report links to them.",
)
@click.option(
    "--margin",
    type=Number(0, 100),
    default=1.0,
    show_default=True,
    help="Largest loss of accuracy, in percentage points, that counts as preserved.",
)
@click.option(
    "--diagnostics/--no-diagnostics",
    default=None,
    show_default="if DIR has them",
    help="Show the loss on lines between weights and the overlap of Fisher matrices.",
)
@options.force_option
def report(**given: Any) -> None:
    """Write a report on a study or on runs.

    DIR is the folder of `fastsal transfer` or `fastsal sweep`: the report describes the study,
    states which predictions hold and with what confidence, and shows all results. Or DIR has
    folders of `fastsal prune --test` in it: the report shows accuracy against latency and file
    size, as far as `fastsal measure --save` measured them, and names the fastest and the smallest
    run within --margin. HTML requires an extra: pip install "fastsal[report]"; Markdown does not.

    Example: fastsal report results/cifar
    """
    from fastsal.errors import InvalidArgument
    from fastsal.study.folder_format import STUDY_FILE
    from fastsal.study.report import html, markdown
    from fastsal.study.report.findings import sections
    from fastsal.study.report.overview import write_pictures
    from fastsal.study.report.results import read_results
    from fastsal.study.report.run_results import has_runs
    from fastsal.utils.atomic import write_text

    folder, kind, margin = given["folder"], given["kind"], given["margin"]
    if has_runs(folder) and not (folder / STUDY_FILE).exists():
        _report_on_runs(given)
        return
    results = read_results(folder)
    if given["diagnostics"] and not (results.loss_lines or results.overlaps):
        raise InvalidArgument(
            f"--diagnostics requires loss_line.csv or overlap.csv in {folder}; add [diagnostics] "
            "to the study to measure them"
        )
    out = _target(given)
    if given["figures"] is not None and given["figures"].is_file():
        raise InvalidArgument(f"figures must be a folder, got the file {given['figures']}")
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


def _report_on_runs(given: dict[str, Any]) -> None:
    from fastsal.errors import InvalidArgument
    from fastsal.study.report import run_page
    from fastsal.study.report.run_results import read_runs
    from fastsal.utils.atomic import write_text

    for name in ("figures", "diagnostics"):
        if given[name]:
            raise InvalidArgument(f"--{name} requires the folder of a study, got runs in DIR")
    results = read_runs(given["folder"])
    out = _target(given)
    render = run_page.html if given["kind"] == "html" else run_page.markdown
    write_text(out, render(results, given["margin"]))
    click.echo(str(out))


def _target(given: dict[str, Any]) -> Path:
    """Return the file to write, which can be written.

    Raises:
        InvalidArgument: It is a folder, exists without `--force`, or cannot be written.
    """
    from fastsal.errors import InvalidArgument
    from fastsal.utils.atomic import check_writable

    out: Path = given["out"] or given["folder"] / f"report.{given['kind']}"
    if out.is_dir():
        raise InvalidArgument(f"out must be a file, got the folder {out}")
    if out.exists() and not given["force"]:
        raise InvalidArgument(f"out: {out} already exists; give --force to overwrite it")
    check_writable(out, "out")
    return out


def _link(path: Path, page: Path) -> str:
    """Return the relative link from a page to a figure."""
    from urllib.parse import quote

    relative = os.path.relpath(path.absolute(), page.absolute().parent)
    return quote(Path(relative).as_posix())
