"""How well the built-in model predicts held-out text on the emulated NPU, against the processor's
own backend.

    python -m ci.ascend.quality [--context N] [--windows N] [--write]

--write puts the table into ci/notes/ascend/quality.md.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from ci.ascend.emulated import emulated
from dsa_hal import use
from dsa_hal.model import Precision, Transformer
from dsa_hal.model.builtin import HELDOUT, builtin_checkpoint
from dsa_hal.model.quality import heldout
from dsa_hal.model.quality.perplexity import Perplexity, perplexity
from dsa_hal.model.tokenizer import Tokenizer
from dsa_hal.selection import Selection

NOTE = Path(__file__).parents[1] / "notes" / "ascend" / "quality.md"


@dataclass(frozen=True)
class Way:
    """One way to hold the model on one backend. `against` is the way it is compared with."""

    name: str
    arch: str | None
    precision: Precision
    w8a8: bool = False
    against: str | None = None

    def chosen(self) -> AbstractContextManager[Selection]:
        if self.arch is None:
            return use(backend="cpu")
        return emulated(self.arch, **({"pack_weight": "w8a8"} if self.w8a8 else {}))


BF16, FP8 = Precision(weights="bf16"), Precision(weights="fp8")
INT8 = {"index_cache": "int8", "latent_cache": "int8"}

WAYS = (
    Way("cpu, bf16", None, BF16),
    Way("cpu, FP8", None, FP8),
    Way("npu, bf16", "a2", BF16, against="cpu, bf16"),
    Way("npu, bf16, int8 caches", "a2", Precision("bf16", **INT8), against="cpu, bf16"),
    Way("npu, W8A8", "a2", FP8, w8a8=True, against="cpu, FP8"),
    Way("npu, W8A8, int8 caches", "a2", Precision("fp8", **INT8), True, "cpu, FP8"),
)
"""FP8 weights are the built-in model's, rounded on loading; W8A8 is made of them."""


def measured(context: int, windows: int, ways: Sequence[Way] = WAYS) -> Iterator[Perplexity]:
    """The perplexity of each way on the same windows of held-out text."""
    folder = builtin_checkpoint()
    for way in ways:
        with way.chosen():
            model = Transformer.from_pretrained(folder, precision=way.precision)
            text = heldout.tokens(folder / HELDOUT, Tokenizer.load(folder, model.config))
            cut = heldout.windows(text, context, windows, 0, model.config.bos_token_id)
            yield perplexity(model, cut, weights=way.name, selector="dsa")


def note(context: int, windows: int) -> str:
    """The table, as Markdown."""
    found = {line.weights: line for line in measured(context, windows)}
    lines = [
        "# The built-in model on the emulated NPU",
        "",
        f"Made by `python -m ci.ascend.quality --context {context} --windows {windows} --write`."
        " Perplexity on held-out text, whole and in the last quarter of the windows; `times` is of"
        " the line named beside it. The ops are emulated from their documentation: what an NPU's"
        " own kernels lose or gain is not in these numbers.",
        "",
        "| weights and caches | whole | late | times | times, late | of |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for way in WAYS:
        line = found[way.name]
        whole, late = line / found[way.against] if way.against else (1.0, 1.0)
        lines.append(
            f"| {way.name} | {line.whole:.4f} | {line.late:.4f} | {whole:.4f} | {late:.4f} |"
            f" {way.against or ''} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ci.ascend.quality", description=__doc__)
    parser.add_argument("--context", type=int, default=2048, metavar="N")
    parser.add_argument("--windows", type=int, default=2, metavar="N")
    parser.add_argument("--write", action="store_true", help=f"into {NOTE.name}")
    args = parser.parse_args(arguments)
    text = note(args.context, args.windows)
    if args.write:
        NOTE.parent.mkdir(parents=True, exist_ok=True)
        draft = NOTE.with_suffix(".part")
        draft.write_text(text)
        os.replace(draft, NOTE)
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
