"""The picture of a safe threshold says what its report says."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree

import pytest

from fastsal.pruning.limits.limit import Limit, SafetyReport

pytest.importorskip("matplotlib", reason="needs the report extra")

CURVE = [
    {
        "sparsity": s,
        "increase": s / 50,
        "upper": s / 50 + 0.01,
        "predicted": s**4,
        "loss_increase": s**3,
        "loss_error": 0.01,
    }
    for s in (0.2, 0.4, 0.6, 0.8)
]


def text_of(path):
    root = ElementTree.parse(path).getroot()
    return " ".join("".join(e.itertext()) for e in root.iter())


@pytest.mark.parametrize("kind", ["accuracy", "loss"])
@pytest.mark.parametrize("predicts", [True, False])
def test_the_picture_says_what_the_report_says(tmp_path, kind, predicts):
    from fastsal.cli.safety_figure import draw

    curve = [p | ({} if predicts else {"predicted": None}) for p in CURVE]
    trusted = 0.4 if predicts else None
    report = SafetyReport(Limit(kind, 0.02, 0.9), 0.6, 500, None, curve, trusted)
    text = text_of(draw(report, tmp_path / "safety.svg"))
    assert "Safe up to 60 %" in text
    assert "confidence 0.9" in text
    assert "500 held-out images" in text
    assert ("predicted" in text) is predicts
    assert ("within the error, up to 40 %" in text) is predicts
    assert ("top-1 accuracy" in text) is (kind == "accuracy")


@pytest.mark.parametrize("trusted", [0.0, 0.2, 0.4, 0.8])
def test_no_text_is_cut_off_or_lies_over_another(tmp_path, monkeypatch, trusted):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from fastsal.cli.safety_figure import draw

    def keep(figure, path, **_):
        Path(path).touch()
        drawn.append(figure)

    drawn = []
    monkeypatch.setattr(Figure, "savefig", keep)
    draw(SafetyReport(Limit("loss", 0.02), 0.6, 500, None, CURVE, trusted), tmp_path / "s.svg")
    (figure,) = drawn
    FigureCanvasAgg(figure).draw()
    axes = figure.axes[0]
    texts = [*figure.texts, *axes.texts, *axes.get_legend().get_texts()]
    assert any("within the error" in text.get_text() for text in texts)
    boxes = [text.get_window_extent() for text in texts]
    assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))


def test_the_command_draws_it(tmp_path, tiny_file, tiny_npz):
    from click.testing import CliRunner

    from fastsal.cli import main

    out = tmp_path / "run"
    options = ["--block-size", "8", "--max-accuracy-drop", "0.3", "--confidence", "0.8"]
    result = CliRunner().invoke(
        main,
        ["prune", f"{tiny_file}:tiny", "--data", str(tiny_npz), *options, "--out", str(out)],
        prog_name="fastsal",
    )
    assert result.exit_code == 0, result.output
    assert "held-out images" in text_of(out / "safety.svg")
