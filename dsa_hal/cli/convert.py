"""A Hugging Face checkpoint into the demo's format: a file per rank, config and tokenizer files.

Files appear only when whole. After an interruption run the same line again: finished files stay.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from dsa_hal.cli import choose, output
from dsa_hal.model.checkpoint import Checkpoint
from dsa_hal.model.convert import convert


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hf-ckpt-path", type=Path, required=True, metavar="DIR",
                        help="folder with config.json and *.safetensors")  # fmt: skip
    parser.add_argument("--save-path", type=Path, required=True, metavar="DIR",
                        help="folder to write to; made if absent")  # fmt: skip
    parser.add_argument("--n-experts", type=choose.whole(1), required=True, metavar="N",
                        help="routed experts of the checkpoint; published: 256")  # fmt: skip
    parser.add_argument("--model-parallel", type=choose.whole(1), required=True, metavar="N",
                        help="ranks to cut the model for")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    with Checkpoint.open(args.hf_ckpt_path) as checkpoint:
        for line in checkpoint.notes():
            output.note(line)
    began = time.monotonic()
    with output.progress("converting") as step:
        files = convert(
            args.hf_ckpt_path, args.save_path, args.n_experts, args.model_parallel, step
        )
    size = sum(file.stat().st_size for file in files)
    took = output.duration(time.monotonic() - began)
    count = "1 rank file" if len(files) == 1 else f"{len(files)} rank files"
    output.note(f"{count}, {size / 1e9:.3g} GB, in {args.save_path}, after {took}")
    return 0
