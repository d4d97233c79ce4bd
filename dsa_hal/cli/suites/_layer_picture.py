"""The suite's picture: what a layer's parts take, with sparse attention and without."""

from __future__ import annotations

import io
from collections.abc import Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from dsa_hal.cli.layers import Measured
from dsa_hal.cli.picture import COLOURS, INK, LINES, TITLE

PARTS = (
    ("attention itself", COLOURS["dsa"]),
    ("its projections", COLOURS["recent"]),
    ("experts", COLOURS["fp8"]),
)
TITLES = {"dsa": "DSA", "dense": "dense"}


def layer(heading: str, measured: Sequence[Measured]) -> bytes:
    """A panel per phase and size; in it two bars per context, each stacked of its parts."""
    sizes = list(dict.fromkeys((m.work.phase, m.work.tokens) for m in measured))
    figure = Figure((4.0 * len(sizes), 4.2), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    FigureCanvasAgg(figure)
    figure.suptitle(heading, fontsize=13, color=INK, fontweight="bold")
    for axes, (phase, tokens) in zip(
        figure.subplots(1, len(sizes), squeeze=False)[0], sizes, strict=True
    ):
        here = [m for m in measured if (m.work.phase, m.work.tokens) == (phase, tokens)]
        here.sort(key=lambda m: (m.work.context, m.kind == "dense"))
        base = [0.0] * len(here)
        for (label, colour), part in zip(PARTS, zip(*map(_parts, here), strict=True), strict=True):
            axes.bar(range(len(here)), part, 0.72, bottom=base, color=colour, label=label)
            base = [b + p for b, p in zip(base, part, strict=True)]
        axes.set_xticks(
            range(len(here)), [f"{TITLES[m.kind]}\n{m.work.context // 1024}K" for m in here]
        )
        title = f"Prefill of {tokens}" if phase == "prefill" else f"Decode, batch {tokens}"
        axes.set_title(title, loc="left", fontsize=TITLE, color=INK, pad=10)
        axes.set_ylabel("ms per layer", color=INK)
        axes.tick_params(colors=INK, length=0)
        axes.grid(axis="y", color=LINES)
        axes.set_axisbelow(True)
        for side in axes.spines.values():
            side.set_visible(False)
    figure.axes[0].legend(frameon=False, labelcolor=INK, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _parts(m: Measured) -> tuple[float, float, float]:
    """Milliseconds of the parts, together the layer without stamps."""
    factor = 1e3 * m.whole / m.stamped
    rest = m.stamped - m.attend - m.feed_forward
    return factor * m.attend, factor * rest, factor * m.feed_forward
