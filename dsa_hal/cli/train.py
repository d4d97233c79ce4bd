"""Trains a model by the paper's stages: dense, then the indexer's warm-up, then sparse.

Everything is in the YAML file; a run is a folder. Run the same line again to go on where it
stopped, or after it was interrupted.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import yaml

from dsa_hal.cli import choose, output
from dsa_hal.errors import BadInput
from dsa_hal.model.training import curves
from dsa_hal.model.training.export import export, quantized
from dsa_hal.model.training.settings import Settings
from dsa_hal.model.training.trainer import Trainer
from dsa_hal.selection import use

SHOWN = ("loss", "index_loss", "best", "latest", "heldout", "heldout_sparse")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("settings", type=Path, metavar="FILE.yaml", help="model, text and stages")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR",
                        help="the run's folder: checkpoints, losses, finished model")  # fmt: skip
    parser.add_argument("--backend", default="cpu", metavar="NAME",
                        help="device to train on: cpu (default) or cuda")  # fmt: skip
    parser.add_argument("--start", type=Path, metavar="DIR",
                        help="begin with the weights of this unquantised checkpoint")  # fmt: skip
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE",
                        help="override a setting, as in --set dense.steps=100")  # fmt: skip
    parser.add_argument("--minutes", type=float, default=math.inf, metavar="N",
                        help="stop after so long, resumably; run again to go on")  # fmt: skip
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the losses")
    parser.add_argument("--shard-mb", type=choose.whole(0), default=0, metavar="N",
                        help="cut the finished bf16 model into files of at most N MB")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    settings = Settings.load(args.settings, _changes(args.set))
    with use(backend=args.backend):
        trainer = Trainer(settings, args.out, start=args.start)
        if trainer.position.windows:
            at = trainer.position
            output.note(f"going on after step {at.step} of stage {at.stage}")
        finished = trainer.run(_Lines(settings), minutes=args.minutes)
        if args.plot is not None:
            curves.draw(trainer.records, args.plot)
        if not finished:
            output.note(f"stopped after {args.minutes:g} minutes; the same line goes on")
            return 0
        _finish(trainer, args.out, args.shard_mb)
    return 0


def _finish(trainer: Trainer, out: Path, shard_mb: int) -> None:
    """The trained model in both published forms, once."""
    plain, fp8 = out / "model-bf16", out / "model-fp8"
    if not plain.exists():
        export(trainer.network, trainer.tokenizer_path, plain, "bf16", shard_mb)
    output.note(f"finished: {plain}")
    if not fp8.exists():
        quantized(plain, fp8)
    output.note(f"the same in FP8: {fp8}")


class _Lines:
    """A line on stderr for every record: text that also reads well in a log file."""

    def __init__(self, settings: Settings) -> None:
        self._settings, self._began = settings, time.monotonic()

    def __call__(self, record: dict[str, Any]) -> None:
        stage = self._settings.stage(record["stage"])
        parts = [f"{record['stage']} {record['step']}/{stage.steps}"]
        parts += [
            f"{name.replace('_', ' ')} {record[name]:.4f}" for name in SHOWN if name in record
        ]
        parts.append(f"rate {record['lr']:.2e}")
        parts.append(f"norm {record['norm']:.2f}")
        output.note(f"{'  '.join(parts)}  {output.duration(time.monotonic() - self._began)}")


def _changes(words: list[str]) -> dict[str, Any]:
    """NAME=VALUE words; values as YAML reads them."""
    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise BadInput(f"--set {word} is no NAME=VALUE, as in --set dense.steps=100")
        found[name] = yaml.safe_load(value)
    return found
