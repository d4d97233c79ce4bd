"""`dsa-hal report cost`: what a token costs by its position, with sparse attention and without,
from one measured layer."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

import dsa_hal
from dsa_hal.cli import choose, output
from dsa_hal.cli.layers import Kind, Layer, Measured, Phase, Work
from dsa_hal.cli.machine import versions
from dsa_hal.errors import BadInput, ConfigError
from dsa_hal.model.builtin import builtin_checkpoint
from dsa_hal.model.checkpoint import Checkpoint
from dsa_hal.model.config import ModelConfig
from dsa_hal.model.precision import page_size
from dsa_hal.model.synthetic import PUBLISHED, RandomWeights
from dsa_hal.model.weights import Source
from dsa_hal.selection import selection

FARTHEST = 131072
"""Default positions end here, or where the model's do."""

SHARE = 32
"""A prefill step's share of the farthest position, unless said otherwise."""

BATCH = 32


@dataclass(frozen=True)
class Unit:
    """What a second of a layer per token counts as, and its name."""

    name: str
    factor: float

    def of(self, seconds: float) -> str:
        return output.number(self.factor * seconds)


@dataclass(frozen=True)
class Point:
    """Seconds per token of one layer at a position: of all its parts, and of attention alone."""

    phase: Phase
    position: int
    dsa: float
    dense: float
    dsa_attend: float
    dense_attend: float


def arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("cost").add_argument
    add("--published", action="store_true",
        help="a layer of DeepSeek-V3.2 at its full width, with random weights")  # fmt: skip
    add("--layer", type=choose.whole(0), metavar="N", help="default: the first with experts")
    add("--positions", type=choose.numbers(1), metavar="N,...",
        help=f"default: a sixteenth to all of the model's, at most {FARTHEST}")  # fmt: skip
    add("--prefill", type=choose.whole(1), metavar="N",
        help=f"tokens of a prefill step; default 1/{SHARE} of the farthest position")  # fmt: skip
    add("--decode", type=choose.whole(1), default=BATCH, metavar="N",
        help=f"requests that decode together; default {BATCH}")  # fmt: skip
    add("--gpu-hour", type=choose.real(0, above=True), metavar="PRICE",
        help="count in money: per million tokens, all layers like this one, at this price of the"
        " device's hour")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    if args.published and args.model is not None:
        raise ConfigError("--published measures random weights; leave --model out")
    if args.backend is not None and len(args.backend) > 1:
        raise ConfigError("a cost is of one device; name one backend")
    draw = choose.picture("cost_picture", "cost") if args.plot is not None else None
    with choose.backend(args.backend[0] if args.backend else None):
        device = torch.device(selection().target.device)
        with _source(args, device) as source:
            layer, measured = _measured(args, source, device)
        record = _record(args, source, layer, measured)
    found = points(measured)
    unit = _unit(args, source.config)
    print(f"{record['heading']}\n{unit.name}\n")
    print(table(found, unit))
    if args.json is not None:
        output.write_atomically(args.json, output.as_json(record))
    if draw is not None:
        output.write_atomically(args.plot, draw(record["heading"], found, unit))
    for path in filter(None, (args.json, args.plot)):
        output.note(f"written to {path}")
    return 0


@contextmanager
def _source(args: argparse.Namespace, device: torch.device) -> Iterator[Source]:
    if args.published:
        yield RandomWeights(PUBLISHED, device)
    else:
        with Checkpoint.open(args.model or builtin_checkpoint()) as checkpoint:
            yield checkpoint


def _measured(
    args: argparse.Namespace, source: Source, device: torch.device
) -> tuple[Layer, list[Measured]]:
    """The layer at every position, in both phases and both forms."""
    c = source.config
    number = _number(args.layer, c)
    limit = min(c.max_position_embeddings, FARTHEST)
    positions = args.positions or [limit >> shift for shift in (4, 3, 2, 1, 0)]
    if max(positions) > c.max_position_embeddings:
        raise BadInput(
            f"position {max(positions)} lies beyond this model's {c.max_position_embeddings}"
        )
    step = args.prefill or max(1, max(positions) // SHARE)
    works = [Work("prefill", min(step, position), position) for position in positions]
    works += [Work("decode", args.decode, position) for position in positions]
    with output.progress("making the layer") as progress:
        layer = Layer(
            source,
            number,
            device,
            tokens=args.decode * (max(positions) + page_size(selection().target.limits)),
            progress=progress,
        )
    measured: list[Measured] = []
    kinds: tuple[Kind, ...] = ("dsa", "dense")
    with output.progress("timing the layer") as progress:
        for at, work in enumerate(works):
            measured += [layer.measure(kind, work) for kind in kinds]
            progress(at + 1, len(works))
    return layer, measured


def _number(wish: int | None, c: ModelConfig) -> int:
    if wish is None:
        layers = range(c.num_hidden_layers)
        return next((layer for layer in layers if c.is_moe(layer)), 0)
    if wish >= c.num_hidden_layers:
        raise BadInput(f"there is no layer {wish}; this model has {c.num_hidden_layers}")
    return wish


def points(measured: Sequence[Measured]) -> list[Point]:
    """Costs per token, in the order measured."""
    found = {(m.kind, m.work): m for m in measured}
    made = []
    for work in dict.fromkeys(m.work for m in measured):
        own, dense = found["dsa", work], found["dense", work]
        times = (own.whole, dense.whole, own.attend, dense.attend)
        made.append(Point(work.phase, work.context, *(t / work.tokens for t in times)))
    return made


def table(found: Sequence[Point], unit: Unit) -> str:
    columns = ("phase", "position", "DSA", "dense", "ratio", "attention alone", "dense ", "ratio ")
    rows = [
        (
            p.phase, f"{p.position:,}", unit.of(p.dsa), unit.of(p.dense),
            f"{p.dense / p.dsa:.2f}x", unit.of(p.dsa_attend), unit.of(p.dense_attend),
            f"{p.dense_attend / p.dsa_attend:.2f}x",
        )
        for p in found
    ]  # fmt: skip
    return output.render(columns, rows, right=columns[1:])


def _unit(args: argparse.Namespace, c: ModelConfig) -> Unit:
    if args.gpu_hour is None:
        return Unit("microseconds per token and layer", 1e6)
    layers = c.num_hidden_layers
    return Unit(
        f"price of a million tokens in {layers} such layers, at {args.gpu_hour:g} per device hour",
        args.gpu_hour / 3600 * 1e6 * layers,
    )


def _record(
    args: argparse.Namespace, source: Source, layer: Layer, measured: Sequence[Measured]
) -> dict[str, Any]:
    target = selection().target
    named = args.model.name if args.model is not None else "the built-in model"
    model = "DeepSeek-V3.2, random weights" if args.published else named
    where = f"{target} {target.name}".strip()
    return {
        "report": "cost",
        "heading": f"A layer of {model} on {where}",
        "device": where,
        **versions(target),
        "dsa_hal": dsa_hal.__version__,
        "formats": str(layer.formats),
        "served": layer.served,
        "points": [asdict(p) for p in points(measured)],
        "results": [asdict(m) for m in measured],
    }
