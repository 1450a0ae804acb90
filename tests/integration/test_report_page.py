"""`fastsal report`: the command, and its page as a browser sees it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from fastsal.study.report import html
from fastsal.study.report.findings import sections
from fastsal.study.report.results import read_results
from fastsal.study.report.wording import bounds

from ..unit.study.report.study_folder import read_table, write_study
from .commands import failed, run

VOID = {"meta", "link", "input", "br", "hr", "img"}
BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome")
     if (path := shutil.which(name))), None,
)  # fmt: skip
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="needs chromium or google-chrome on the path"
)
needs_jinja = pytest.mark.usefixtures("_jinja")

NASTY = '<script>alert("x")</script> & a very long name that goes on, and on, and on'
WAYS = {
    "everything": dict(diagnostics=True, failed=[("magnitude", 0.9, 1)]),
    "one seed, criterion and sparsity": dict(
        seeds=(0,), criteria=("obs-greedy",), sparsities=(0.7,)
    ),
    "two seeds, ten criteria": dict(seeds=(0, 1), criteria=tuple(f"c{i}" for i in range(10))),
    "no tuning": dict(tuned=False),
    "thirty tasks": dict(transfer=tuple(f"task {i}" for i in range(30)), seeds=(0, 1)),
    "several models and sources": dict(models=("a", "b"), sources=("x", "y"), rounds=(1, 4)),
    "nasty names": dict(models=(NASTY,), sources=(NASTY,), criteria=(NASTY,),
                        transfer=(NASTY + "2",), name=NASTY, diagnostics=True),
    "no transfer task": dict(transfer=()),
    "every cell failed": dict(criteria=("a",), sparsities=(0.5,), seeds=(0,),
                              failed=[("a", 0.5, 0)]),
}  # fmt: skip


@pytest.fixture
def _jinja():
    pytest.importorskip("jinja2", reason="needs the report extra")


class Outline(HTMLParser):
    """Checks that elements close in order; keeps what the tests ask for."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.ids, self.links, self.headings, self.text = [], [], [], [], []
        self.elements = []

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.elements.append((tag, found, self.open[-1] if self.open else None))
        self.ids += [found["id"]] if "id" in found else []
        self.links += [(tag, k, found[k]) for k in ("href", "src", "xlink:href") if k in found]
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), self.open[-1]))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append((self.open[-1] if self.open else None, data))


def parsed(text):
    outline = Outline()
    outline.feed(text)
    outline.close()
    assert outline.open == []
    return outline


@needs_jinja
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_page_is_whole_and_stands_alone(tmp_path, way):
    text = html.page(read_results(write_study(tmp_path, **way)))
    outline = parsed(text)
    assert len(outline.ids) == len(set(outline.ids))
    known = set(outline.ids)
    for tag, attribute, target in outline.links:
        if target.startswith("#"):
            assert target[1:] in known, target
        else:  # a link that a reader may follow; nothing that the page loads
            assert (tag, attribute) == ("a", "href")
    assert "url(" not in text
    assert "@import" not in text
    assert {tag for tag, *_ in outline.elements} & {"img", "link", "iframe", "object"} == set()
    assert sum(tag == "script" for tag, *_ in outline.elements) == 1
    pictures = [found for tag, found, _ in outline.elements if tag == "svg"]
    titles = [found["id"] for tag, found, parent in outline.elements
              if tag == "title" and parent == "svg"]  # fmt: skip
    assert len(titles) == len(pictures)
    for found in pictures:
        assert found["role"] == "img"
        assert set(found["aria-labelledby"].split()) <= known
    assert outline.headings[0] == 1
    assert outline.headings.count(1) == 1
    for before, after in zip(outline.headings, outline.headings[1:]):
        assert after <= before + 1


@needs_jinja
@pytest.mark.parametrize("part", [0, 1, 2])
def test_page_holds_every_change_and_every_row(tmp_path, part):
    folder = write_study(tmp_path, models=("a", "b", "c"), noise=0.02)
    results = read_results(folder)
    text = html.page(results)
    for finding in [*sections(results)[part].p1, *sections(results)[part].p2]:
        assert bounds(finding.change.source) in text
        assert bounds(finding.change.transfer) in text
    rows = text[text.index('id="all"') :].count("<tr>") - 1
    assert rows == len(read_table(folder / "results.csv"))


@needs_jinja
def test_what_was_not_measured_is_not_shown(tmp_path):
    text = html.page(read_results(write_study(tmp_path, tuned=False)))
    assert "P2: not measured" in text
    assert 'id="failures"' not in text
    assert "Diagnostics" not in text
    assert 'type="radio"' not in text


@needs_jinja
def test_diagnostics_are_shown_where_there_are_any_unless_they_are_not_wanted(tmp_path):
    folder = write_study(tmp_path / "a", diagnostics=True)
    assert run("report", folder, "--out", tmp_path / "with.html").exit_code == 0
    assert run("report", folder, "--no-diagnostics", "--out", tmp_path / "no.html").exit_code == 0
    assert "Fisher overlap" in (tmp_path / "with.html").read_text(encoding="utf-8")
    assert "Fisher overlap" not in (tmp_path / "no.html").read_text(encoding="utf-8")
    plain = write_study(tmp_path / "b")
    failed(
        run("report", plain, "--diagnostics"), "--diagnostics requires loss_line.csv or overlap.csv"
    )


@needs_jinja
def test_the_gpu_of_a_study_is_named(tmp_path):
    folder = write_study(tmp_path)
    study = json.loads((folder / "study.json").read_text())
    for facts, text in (
        ({"device": "cuda:1", "gpu": "NVIDIA H200"}, "NVIDIA H200 (cuda:1), Linux"),
        ({"device": "mps"}, "memory, mps, Linux"),
        ({"device": "cpu"}, "memory, Linux"),
    ):
        machine = {**study["machine"], **facts}
        (folder / "study.json").write_text(json.dumps({**study, "machine": machine}))
        assert text in html.page(read_results(folder))


@needs_jinja
def test_failures_and_provenance_are_named(tmp_path):
    folder = write_study(tmp_path, failed=[("magnitude", 0.9, 1)])
    outline = parsed(html.page(read_results(folder)))
    text = " ".join(piece for _, piece in outline.text)
    assert "1 failed cell" in text
    assert "FactorizationError: <block 3> is not positive definite" in text
    assert json.loads((folder / "study.json").read_text(encoding="utf-8"))["command"] in text
    assert "torch 2.9.0" in text
    assert "Some Processor @ 2.10GHz, 4 threads, 16 GiB memory, Linux 6.1" in text


@needs_jinja
def test_command_writes_into_the_folder_and_replaces_only_by_force(tmp_path):
    folder = write_study(tmp_path / "study")
    result = run("report", folder)
    assert result.exit_code == 0, result.output
    page = folder / "report.html"
    assert result.stdout.strip() == str(page)
    first = page.read_text(encoding="utf-8")
    page.write_text("mine", encoding="utf-8")
    failed(run("report", folder), "already exists; give --force")
    assert page.read_text(encoding="utf-8") == "mine"
    assert run("report", folder, "--force").exit_code == 0
    assert page.read_text(encoding="utf-8") == first


def test_markdown_links_its_pictures(tmp_path):
    folder = write_study(tmp_path / "study", sources=("x y", "x/y"))
    out = tmp_path / "docs" / "results.md"
    result = run("report", folder, "--format", "md", "--out", out, "--figures", tmp_path / "pics")
    assert result.exit_code == 0, result.output
    text = out.read_text(encoding="utf-8")
    links = re.findall(r"^!\[.*\]\((.+)\)$", text, re.MULTILINE)
    assert len(set(links)) == 2
    for link in links:
        assert (out.parent / link).read_text(encoding="utf-8").startswith("<svg")


def test_markdown_needs_no_jinja_and_the_page_says_that_it_does(tmp_path, monkeypatch):
    monkeypatch.setattr("fastsal.study.report.rendering.find_spec", lambda name: None)
    folder = write_study(tmp_path)
    failed(run("report", folder), "pip install 'fastsal[report]'")
    assert not (folder / "report.html").exists()
    assert run("report", folder, "--format", "md").exit_code == 0


def test_other_folders_get_one_line(tmp_path):
    failed(run("report", tmp_path / "absent"), "does not exist")
    (tmp_path / "masks.safetensors").touch()
    failed(run("report", tmp_path), "the output of `fastsal prune`")
    folder = write_study(tmp_path / "study")
    failed(run("report", folder, "--out", tmp_path), "out must be a file, got the folder")
    (folder / "study.json").write_text("[", encoding="utf-8")
    failed(run("report", folder), "not valid JSON")


def in_browser(tmp_path, page, script, width=1280):
    """Run a script at the end of a page; returns what it leaves as JSON in `data-found`."""
    path = tmp_path / "driven.html"
    path.write_text(page.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
               f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900",
               "--virtual-time-budget=2000", "--dump-dom", path.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    found = [dict(attrs) for tag, attrs, _ in parsed_dom(done.stdout).elements if tag == "body"]
    assert found, done.stderr[-2000:]
    assert "data-found" in found[0], done.stderr[-2000:]
    return json.loads(found[0]["data-found"])


def parsed_dom(text):
    class Loose(Outline):
        def handle_endtag(self, tag):
            pass

    outline = Loose()
    outline.feed(text)
    return outline


SORT = """
const table = [...document.querySelectorAll("table.sortable")].pop();
const heads = [...table.tHead.rows[0].cells];
const column = heads.findIndex((h) => h.textContent.startsWith("pruned"));
const read = () => [...table.tBodies[0].rows].map((r) => r.cells[column].textContent);
const button = heads[column].querySelector("button");
const before = read();
button.click();
const up = [heads[column].getAttribute("aria-sort"), read()];
button.click();
const down = [heads[column].getAttribute("aria-sort"), read()];
const form = document.querySelector(".filter input");
form.value = "MNIST 90";
form.dispatchEvent(new Event("input", { bubbles: true }));
const shown = [...table.tBodies[0].rows].filter((r) => !r.hidden).length;
document.querySelector(".legend button").click();
const hidden = document.querySelectorAll(".panels .off").length;
document.body.dataset.found = JSON.stringify({ before, up, down, shown, hidden });
"""


@needs_jinja
@needs_browser
def test_tables_sort_and_filter_by_click(tmp_path):
    folder = write_study(tmp_path / "study")
    found = in_browser(tmp_path, html.page(read_results(folder)), SORT)
    numbers = sorted(float(text) for text in found["before"])
    assert found["up"][0] == "ascending"
    assert [float(text) for text in found["up"][1]] == numbers
    assert found["down"][0] == "descending"
    assert [float(text) for text in found["down"][1]] == numbers[::-1]
    # "90" is also a part of accuracies such as 90.12: every word is looked for in the whole row.
    rows = read_table(folder / "results.csv")
    least = sum(r["task"] == "mnist" and r["sparsity"] == "0.9" for r in rows)
    assert least <= found["shown"] < len(rows)
    assert found["hidden"] > 0


WIDTH = """
document.querySelectorAll("details").forEach((d) => { d.open = true; });
const root = document.documentElement;
const out = [...document.querySelectorAll("main *")].filter((e) =>
  !e.closest(".scroll, pre, .switch ul, svg") && e.getBoundingClientRect().right > innerWidth + 1);
document.body.dataset.found = JSON.stringify({
  inner: innerWidth, scroll: root.scrollWidth, out: out.map((e) => e.outerHTML.slice(0, 80)),
});
"""


@needs_jinja
@needs_browser
@pytest.mark.parametrize("way", ["everything", "nasty names", "several models and sources"])
def test_nothing_is_wider_than_a_phone(tmp_path, way):
    page = html.page(read_results(write_study(tmp_path / "study", **WAYS[way])))
    # A window cannot be made as narrow everywhere; a frame can.
    script = (
        "const page = "
        + json.dumps(page).replace("</", "<\\/")
        + ";"
        + """
const frame = document.createElement("iframe");
frame.style = "width:320px;height:640px;border:0";
frame.srcdoc = page;
frame.onload = () => {
  frame.contentWindow.eval(INNER);
  document.body.dataset.found = frame.contentDocument.body.dataset.found;
};
document.body.append(frame);
""".replace("INNER", json.dumps(WIDTH))
    )
    found = in_browser(tmp_path, "<!doctype html><html><body></body></html>", script)
    assert found["inner"] == 320
    assert found["out"] == []
    assert found["scroll"] <= 320
