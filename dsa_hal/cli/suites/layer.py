"""One MoE layer of DeepSeek-V3.2 at its full width on one device, random FP8 weights: prefill and
decode at long contexts, with sparse attention and without, and what each op takes.

The layer is the model's own, with caches of random content; without sparse attention it caches bf16
latents, expands them to keys and values per head in prefill, and decodes in the absorbed form.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import torch

import dsa_hal
from dsa_hal.cli import choose, output
from dsa_hal.cli.bench import commit
from dsa_hal.cli.layers import Layer, Measured, Work, works
from dsa_hal.cli.machine import versions
from dsa_hal.errors import Absent, ConfigError
from dsa_hal.model.synthetic import PUBLISHED, RandomWeights
from dsa_hal.selection import selection

CONTEXTS = (8192, 32768, 131072)
PREFILL, DECODE = (4096,), (1, 32, 128)

NEEDED = 96e9
"""Bytes of device memory: weights, caches of the largest work in both formats, expanded keys."""


def run(options: argparse.Namespace) -> int:
    """Measure, print the tables, write the record and the picture that were asked for."""
    if options.op is not None:
        raise ConfigError("the suite layer times a whole layer; leave the op out")
    draw = choose.picture("suites._layer_picture", "layer") if options.plot else None
    for path in filter(None, (options.output, options.plot)):
        output.must_be_writable(path)
    with choose.backend(options.backend):
        device = torch.device(selection().target.device)
        _must_fit(device)
        chosen = works(CONTEXTS, prefill=PREFILL, decode=DECODE)
        layer, measured = measure(chosen, device)
        record = as_record(layer, measured)
    print(tables(record["heading"], measured))
    if options.output is not None:
        output.write_atomically(options.output, output.as_json(record))
    if draw is not None:
        output.write_atomically(options.plot, draw(record["heading"], measured))
    for path in filter(None, (options.output, options.plot)):
        output.note(f"written to {path}")
    return 0


def _must_fit(device: torch.device) -> None:
    if device.type == "cpu":
        raise Absent("the suite layer needs an accelerator; a processor would take hours")
    free, _ = torch.accelerator.get_memory_info(device)
    if free < NEEDED:
        raise Absent(
            f"the suite layer needs {NEEDED / 1e9:.0f} GB of device memory, {free / 1e9:.0f} GB are"
            " free"
        )


def measure(chosen: Sequence[Work], device: torch.device) -> tuple[Layer, list[Measured]]:
    """The published model's first MoE layer at each work, with sparse attention and without."""
    source = RandomWeights(PUBLISHED, device)
    room = max(w.context * (w.tokens if w.phase == "decode" else 1) for w in chosen)
    with output.progress("making the layer") as step:
        layer = Layer(source, PUBLISHED.first_k_dense_replace, device, tokens=room, progress=step)
    measured = []
    with output.progress("timing the layer") as step:
        for at, work in enumerate(chosen):
            for kind in ("dsa", "dense"):
                measured.append(layer.measure(kind, work))
                gc.collect()  # what was recorded holds the memory that the next needs
            step(at + 1, len(chosen))
    return layer, measured


def as_record(layer: Layer, measured: Sequence[Measured]) -> dict[str, Any]:
    target = selection().target
    heading = f"One layer of DeepSeek-V3.2 on {target} {target.name}".strip()
    return {
        "suite": "layer",
        "heading": heading,
        "device": f"{target} {target.name}".strip(),
        **versions(target),
        "dsa_hal": dsa_hal.__version__,
        "commit": commit(),
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "formats": str(layer.formats),
        "served": layer.served,
        "results": [asdict(m) for m in measured],
    }


# -- telling -----------------------------------------------------------------------------------


def tables(heading: str, measured: Sequence[Measured]) -> str:
    """Both forms side by side, then what each op takes with sparse attention, then without."""
    parts = [heading, "", sides(measured)]
    for kind, title in (("dsa", "with sparse attention"), ("dense", "without")):
        some = [m for m in measured if m.kind == kind]
        for phase in ("prefill", "decode"):
            here = [m for m in some if m.work.phase == phase]
            if here:
                parts += ["", f"{phase}, {title}: each op", "", _by_op(here)]
    if not all(m.recorded for m in measured):
        names = [f"{m.work} ({m.kind})" for m in measured if not m.recorded]
        parts += ["", f"launched by the host, not replayed: {', '.join(names)}"]
    return "\n".join(parts)


def sides(measured: Sequence[Measured]) -> str:
    """A line per work: the whole layer, and attention alone, dense over DSA."""
    found = {(m.kind, m.work): m for m in measured}
    columns = ("work", "layer", "dense", "ratio", "attention", "dense ", "ratio ", "experts")
    rows = []
    for work in dict.fromkeys(m.work for m in measured):
        own, other = found["dsa", work], found["dense", work]
        rows.append((
            str(work), output.duration(own.whole), output.duration(other.whole),
            f"{other.whole / own.whole:.2f}x", output.duration(own.attend),
            output.duration(other.attend), f"{other.attend / own.attend:.2f}x",
            output.duration(own.feed_forward),
        ))  # fmt: skip
    return output.render(columns, rows, right=columns[1:])


def _by_op(measured: Sequence[Measured]) -> str:
    labels = list(dict.fromkeys(label for m in measured for label in m.ops))
    heads = [str(m.work) for m in measured]
    rows = [
        (label, *(output.duration(m.ops[label]) if label in m.ops else "" for m in measured))
        for label in labels
    ]
    rest = [m.stamped - sum(m.ops.values()) for m in measured]
    rows.append(("between the ops", *(output.duration(max(0.0, left)) for left in rest)))
    rows.append(("all, with stamps", *(output.duration(m.stamped) for m in measured)))
    return output.render(("op", *heads), rows, right=heads)
