"""Pictures of reports, as PNG. Needs matplotlib, so this file is imported only to draw."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter, ScalarFormatter

from dsa_hal.model.quality.report import Quality
from dsa_hal.model.quality.selectors import label

INK, LINES = "#222222", "#ececec"
TITLE = 11
COLOURS = {
    "dense": "#b8b8b8", "dsa": "#0072b2", "fp8": "#e69f00", "recent": "#009e73",
    "random": "#d55e00",
}  # fmt: skip
"""Told apart by the colour-blind as well."""

STEEP = 3.0
"""Above this ratio of the highest to the lowest perplexity a linear axis hides the low ones."""


def quality(heading: str, results: Sequence[Quality], topk: int) -> bytes:
    """A row per backend: perplexity by position, attention mass by layer, needles by depth and
    length; what was not measured has no panel."""
    rows = [_panels(result) for result in results]
    columns = max(map(len, rows))
    size = 0.6 + 5.2 * columns, 0.7 + 4.4 * len(rows)
    figure = Figure(size, layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.1))
    FigureCanvasAgg(figure)
    figure.suptitle(heading, fontsize=13, color=INK, fontweight="bold")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, panels, result in zip(axes, rows, results, strict=True):
        for at, (place, panel) in enumerate(zip(line, panels, strict=False)):
            panel(place, result, topk)
            if at == 0 and len(results) > 1:
                title = f"{place.get_title('left')}, {result.target}"
                place.set_title(title, loc="left", fontsize=TITLE, color=INK, pad=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _panels(result: Quality) -> list[Callable[[Axes, Quality, int], None]]:
    measured = (
        (_perplexity, result.perplexity), (_mass, result.recall), (_needles, result.needles)
    )  # fmt: skip
    return [panel for panel, found in measured if found]


def _style(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=TITLE, color=INK, pad=10)
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.tick_params(which="both", colors=INK, length=0)
    for side in axes.spines.values():
        side.set_visible(False)


def _perplexity(axes: Axes, result: Quality, topk: int) -> None:
    _style(axes, "Perplexity by position", "position in the window", "perplexity")
    highest, lowest = 0.0, float("inf")
    for line in result.perplexity:
        look = line.weights if line.weights == "fp8" else line.selector
        parts = len(line.positions)
        at = [(part + 0.5) / parts for part in range(parts)]
        axes.plot(
            at, line.positions, label=label(line.selector, topk) + (" in FP8" * (look == "fp8")),
            color=COLOURS[look], linewidth=6 if look == "dense" else 2,
            linestyle=(0, (3, 2)) if look == "fp8" else "solid", marker="o",
            markersize=0 if look == "dense" else 4, solid_capstyle="round",
        )  # fmt: skip
        highest, lowest = max(highest, *line.positions), min(lowest, *line.positions)
    if highest > STEEP * lowest:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlim(0, 1)
    axes.grid(axis="y", color=LINES)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, labelcolor=INK, fontsize=9)


def _mass(axes: Axes, result: Quality, topk: int) -> None:
    held = result.recall
    assert held is not None
    _style(axes, "Attention mass that keys hold, by layer", "layer", "share of dense attention")
    layers = range(len(held.layers))
    width = 0.36
    for side, name, colour in ((-1, "selected", COLOURS["dsa"]), (1, "recent", COLOURS["recent"])):
        shares = [getattr(mass, name) for mass in held.layers]
        text = f"{topk} {'selected' if name == 'selected' else 'latest'}: {_mean(held.whole, name)}"
        at = [layer + side * width / 2 for layer in layers]
        bars = axes.bar(at, shares, width, color=colour, label=text)
        if len(layers) <= 8:
            numbers = [f"{100 * share:.0f}" for share in shares]
            axes.bar_label(bars, numbers, label_type="center", fontsize=9, color="white")
    best = [mass.best for mass in held.layers]
    edges = [(layer - width, layer + width) for layer in layers]
    axes.hlines(best, *zip(*edges, strict=True), color=INK, linewidth=1.5,
                label=f"best {topk}: {_mean(held.whole, 'best')}")  # fmt: skip
    axes.set_xticks(list(layers) if len(layers) <= 12 else list(layers)[::10])
    axes.set_ylim(0, 1.08)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(axis="y", color=LINES)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, labelcolor=INK, fontsize=9, loc="upper center", ncols=3,
                bbox_to_anchor=(0.5, -0.14), columnspacing=1.2, handlelength=1.4)  # fmt: skip


def _mean(mass: object, name: str) -> str:
    return f"{100 * getattr(mass, name):.1f}%"


def _needles(axes: Axes, result: Quality, topk: int) -> None:
    own = result.needles[0]
    totals = ", ".join(f"{label(n.selector, topk)} {100 * n.share:.0f}%" for n in result.needles)
    _style(axes, f"Needles found: {totals}", "tokens in the haystack", "depth of the needle")
    shares = [[n / own.samples for n in counts] for counts in zip(*own.found, strict=True)]
    axes.imshow(shares, vmin=0, vmax=1, cmap="YlGnBu", aspect="auto")
    for row, line in enumerate(shares):
        for column, share in enumerate(line):
            axes.text(
                column, row, f"{round(share * own.samples)}/{own.samples}", ha="center",
                va="center", fontsize=9, color="white" if share > 0.55 else INK,
            )  # fmt: skip
    axes.set_xticks(range(len(own.lengths)), [f"{length:,}" for length in own.lengths])
    axes.set_yticks(range(len(own.depths)), [f"{depth}%" for depth in own.depths])
    for at in range(1, len(own.lengths)):
        axes.axvline(at - 0.5, color="white", linewidth=2)
    for at in range(1, len(own.depths)):
        axes.axhline(at - 0.5, color="white", linewidth=2)
