"""Trains a model by the paper's stages: dense, then the indexer's warm-up, then sparse. A stage of
our own, focus, may follow the dense one.

Everything is in the YAML file; a run is a folder. Run the same line again to go on where it
stopped, or after it was interrupted.
"""

from __future__ import annotations

import argparse
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from dsa_hal.cli import choose, output
from dsa_hal.errors import BadInput
from dsa_hal.model.training.export import export, quantized
from dsa_hal.model.training.settings import Settings
from dsa_hal.model.training.trainer import Trainer

SHOWN = ("loss", "index_loss", "best", "latest", "heldout", "heldout_sparse")
"""Of a record: losses in nats, and shares of the attention mass."""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("settings", type=Path, metavar="FILE.yaml", help="model, text and stages")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR",
                        help="the run's folder: checkpoints, losses, finished model")  # fmt: skip
    parser.add_argument("--backend", metavar="NAME",
                        help="instead of DSA_HAL_BACKEND's; cpu repeats its losses")  # fmt: skip
    parser.add_argument("--start", type=Path, metavar="DIR",
                        help="begin with the weights of this unquantised checkpoint")  # fmt: skip
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE",
                        help="override a setting, as in --set dense.steps=100")  # fmt: skip
    parser.add_argument("--minutes", type=choose.real(0), default=math.inf, metavar="N",
                        help="stop after so long, resumably; run again to go on")  # fmt: skip
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the losses")
    parser.add_argument("--shard-mb", type=choose.whole(0), default=0, metavar="N",
                        help="cut the finished bf16 model into files of at most N MB")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    settings = Settings.load(args.settings, _changes(args.set))
    draw = choose.picture("curves", "losses") if args.plot is not None else None
    with choose.backend(args.backend):
        trainer = Trainer(settings, args.out, start=args.start)
        if args.plot is not None:
            output.must_be_writable(args.plot)
        if trainer.position.windows:
            at = trainer.position
            unread = f"; --start {args.start} is not read" if args.start is not None else ""
            output.note(f"going on after step {at.step} of stage {at.stage}{unread}")
        finished = trainer.run(_Lines(settings), minutes=args.minutes)
    if finished:
        _finish(trainer, args.out, args.shard_mb)
    else:
        output.note(f"stopped after {args.minutes:g} minutes; the same line goes on")
    if draw is not None:
        output.write_atomically(args.plot, draw(trainer.records))
    return 0


def _finish(trainer: Trainer, out: Path, shard_mb: int) -> None:
    """The trained model in both published forms, in place of what an earlier finish left."""
    plain, fp8, settings = out / "model-bf16", out / "model-fp8", trainer.settings

    def unquantised(folder: Path) -> None:
        export(
            trainer.network, trainer.tokenizer_path, folder, "bf16", shard_mb, settings.generation
        )

    _replace(plain, unquantised)
    output.note(f"finished: {plain}")
    _replace(fp8, lambda folder: quantized(plain, folder))
    output.note(f"the same in FP8: {fp8}")


def _replace(folder: Path, write: Callable[[Path], None]) -> None:
    beside = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(beside, ignore_errors=True)
    write(beside)
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)


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
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            equals = ""
        if not equals or not name:
            raise BadInput(f"--set {word} is no NAME=VALUE, as in --set dense.steps=100")
    return found
