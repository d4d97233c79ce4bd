"""The suite's picture: how close ours and the best peer come to the device's limit, by shape."""

from __future__ import annotations

import io
from collections.abc import Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import PercentFormatter

from dsa_hal.cli.picture import COLOURS, INK, LINES, TITLE
from dsa_hal.cli.suites._tables import Shape

OWN, PEER = COLOURS["dsa"], COLOURS["fp8"]


def race(heading: str, shapes: Sequence[Shape]) -> bytes:
    """A line per shape with a dot for each side, joined; the ratio stands at the end."""
    figure = Figure((11, 1.4 + 0.27 * len(shapes)), layout=ConstrainedLayoutEngine(w_pad=0.15))
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_title(
        "Share of the device's own limit, measured in the same run",
        loc="left", fontsize=TITLE, color=INK, pad=22,
    )  # fmt: skip
    axes.text(0, 1.005, heading, transform=axes.transAxes, fontsize=8, color=INK, va="bottom")
    for at, shape in enumerate(shapes):
        sides = [
            (shape.floor_s / best[1], colour)
            for best, colour in ((shape.peer, PEER), (shape.own, OWN))
            if best is not None
        ]
        if len(sides) == 2:
            axes.plot([x for x, _ in sides], [at, at], color="#b8b8b8", linewidth=2, zorder=1)
        for x, colour in sides:
            axes.scatter(x, at, s=46, color=colour, zorder=2)
        if shape.ratio is not None:
            axes.text(1.01, at, f"{shape.ratio:.2f}x", fontsize=9, color=INK, va="center")
    names = [
        shape.label
        if at and shapes[at - 1].group == shape.group
        else f"{shape.group}: {shape.label}"
        for at, shape in enumerate(shapes)
    ]
    axes.set_yticks(range(len(shapes)), names)
    axes.set_ylim(len(shapes) - 0.4, -0.6)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.tick_params(colors=INK, length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.grid(axis="x", color=LINES)
    axes.set_axisbelow(True)
    for colour, label in ((OWN, "dsa_hal"), (PEER, "best peer")):
        axes.scatter([], [], s=46, color=colour, label=label)
    axes.legend(frameon=False, labelcolor=INK, fontsize=9, loc="upper right", ncols=2,
                bbox_to_anchor=(1, -0.02))  # fmt: skip
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
