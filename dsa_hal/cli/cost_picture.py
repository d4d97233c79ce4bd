"""What a token costs by its position, as PNG. Needs matplotlib, so this file is imported only to
draw."""

from __future__ import annotations

import io
from collections.abc import Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from dsa_hal.cli.cost import Point, Unit
from dsa_hal.cli.picture import COLOURS, INK, LINES, TITLE


def cost(heading: str, points: Sequence[Point], unit: Unit) -> bytes:
    """A panel per phase; whole lines are the layer, broken ones attention alone."""
    phases = list(dict.fromkeys(p.phase for p in points))
    figure = Figure((5.4 * len(phases), 4.6), layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.1))
    FigureCanvasAgg(figure)
    figure.suptitle(heading, fontsize=13, color=INK, fontweight="bold")
    for axes, phase in zip(figure.subplots(1, len(phases), squeeze=False)[0], phases, strict=True):
        here = sorted((p for p in points if p.phase == phase), key=lambda p: p.position)
        at = [p.position / 1024 for p in here]
        for kind, label, colour in (
            ("dense", "dense", "#7a7a7a"), ("dsa", "DSA", COLOURS["dsa"])
        ):  # fmt: skip
            for suffix, style, what in (("", "solid", "layer"), ("_attend", "dashed", "attention")):
                cost = [unit.factor * getattr(p, kind + suffix) for p in here]
                axes.plot(
                    at, cost, color=colour, linestyle=style, linewidth=2, marker="o", markersize=4,
                    label=f"{label}, {what}",
                )  # fmt: skip
        axes.set_title(phase.capitalize(), loc="left", fontsize=TITLE, color=INK, pad=10)
        axes.set_xlabel("position, thousands (1024) of tokens", color=INK)
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        axes.tick_params(colors=INK, length=0)
        axes.grid(axis="y", color=LINES)
        axes.set_axisbelow(True)
        for side in axes.spines.values():
            side.set_visible(False)
    first = figure.axes[0]
    first.set_ylabel(unit.name, color=INK)
    first.legend(frameon=False, labelcolor=INK, fontsize=9, handlelength=3.5)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
