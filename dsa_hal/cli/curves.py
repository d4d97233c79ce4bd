"""The losses of a training run as a picture, PNG. Needs matplotlib, so this file is imported only
to draw."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dsa_hal.model.training.settings import STAGES

_TITLES = {
    "dense": "Dense pre-training",
    "focus": "Dense, concentrating",
    "warmup": "Indexer warm-up",
    "sparse": "Sparse training",
}
_LINES = (
    ("loss", "training text", "#9db8d9", 0.8),
    ("heldout", "held-out, dense attention", "#1f4e8c", 1.8),
    ("heldout_sparse", "held-out, sparse attention", "#c8553d", 1.8),
)


def losses(records: Sequence[dict[str, Any]]) -> bytes:
    """A column a stage: the loss on text above; below, the indexer's, or in stage focus the
    attention mass that keys hold."""
    stages = [name for name in STAGES if any(r["stage"] == name for r in records)]
    figure = Figure(figsize=(4.2 * max(1, len(stages)), 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, max(1, len(stages)), squeeze=False, sharex="col")
    for column, stage in enumerate(stages):
        here = [r for r in records if r["stage"] == stage]
        text, index = grid[0][column], grid[1][column]
        for key, label, colour, width in _LINES:
            _line(text, here, key, label, colour, width)
        _line(index, here, "index_loss", "KL of indexer and attention", "#5b8c5a", 0.9)
        _line(index, here, "best", "mass of the best keys", "#1f4e8c", 1.2)
        _line(index, here, "latest", "mass of the latest keys", "#c8553d", 1.2)
        text.set_title(_TITLES[stage], loc="left", fontsize=11)
        index.set_xlabel("step")
        index.set_ylim(bottom=0)
        for axes in (text, index):
            axes.grid(alpha=0.25, linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
            if axes.lines:
                axes.legend(frameon=False, fontsize=8)
            else:
                axes.text(0.5, 0.5, "not trained here", ha="center", va="center",
                          transform=axes.transAxes, color="#888888", fontsize=9)  # fmt: skip
    grid[0][0].set_ylabel("nats per token")
    grid[1][0].set_ylabel("nats per token and layer, or share")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140)
    return buffer.getvalue()


def _line(
    axes: Axes, records: Sequence[dict[str, Any]], key: str, label: str, colour: str, width: float
) -> None:
    points = [(r["step"], r[key]) for r in records if key in r]
    if points:
        marker = "o" if len(points) < 30 else ""  # a lone judgement is a point
        axes.plot(
            *zip(*points, strict=True), label=label, color=colour, linewidth=width,
            marker=marker, markersize=3,
        )  # fmt: skip
