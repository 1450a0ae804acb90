"""Figure of the sparsity of the layers of a run."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastsal.cli.layer_zeros import LayerZeros
from fastsal.errors import FastsalError, InvalidArgument
from fastsal.utils.atomic import atomic_path

# Of Okabe and Ito's palette, safe for color-vision deficiency.
_PRUNED, _MEAN = "#0072B2", "#D55E00"
_INK = "#222222"
_ROW = 0.22  # inches
_LONGEST = 150  # rows; more layers share this height


def require_matplotlib() -> None:
    """Raise FastsalError if matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise FastsalError("--figure requires matplotlib: pip install 'fastsal[report]'")


def draw_layers(layers: Sequence[LayerZeros], mean: float, path: Path) -> None:
    """Draw the sparsity of each layer as a bar, in the order of the network.

    Args:
        layers: The layers.
        mean: Sparsity over all layers.
        path: File to write; its suffix is the format.

    Raises:
        InvalidArgument: matplotlib has no such format.
        OSError: The file cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kind = path.suffix.lstrip(".").lower()
    known = FigureCanvasAgg.get_supported_filetypes()
    if kind not in known:
        raise InvalidArgument(
            f"figure must be a file of one of the formats {', '.join(sorted(known))}, got {path}"
        )
    style: Any = {"font.size": 9, "font.family": "sans-serif", "svg.fonttype": "none"}
    height = 1.2 + _ROW * min(len(layers), _LONGEST)
    with rc_context(style):
        figure = Figure(figsize=(8.0, height), facecolor="white", layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        places = range(len(layers))
        axes.barh(places, [100 * s.sparsity for s in layers], color=_PRUNED, height=0.7)
        axes.axvline(100 * mean, color=_MEAN, linewidth=1.5, linestyle=(0, (4, 2)))
        axes.annotate(
            f"all {100 * mean:.1f} %", (100 * mean, 1), xycoords=("data", "axes fraction"),
            xytext=(3, 2), textcoords="offset points", color=_MEAN,
        )  # fmt: skip
        # Of more layers than fit, every n-th is named.
        step = -(-len(layers) // _LONGEST) or 1
        names = [layer.name for layer in layers[::step]]
        axes.set_yticks(places[::step], names, parse_math=False)
        axes.set_ylim(len(layers) - 0.5, -0.5)
        axes.set_xlim(0, 100)
        axes.set_xlabel("weights pruned, %", color=_INK)
        axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, labelcolor=_INK)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format=kind, dpi=150)
