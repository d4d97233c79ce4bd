"""What the sparse attention of a checkpoint costs: in quality, on text it was not trained on, and
in time, by position. And what was proved of the ops.

  dsa-hal report quality --plot quality.png --json quality.json
  dsa-hal report quality --model DeepSeek-V3.2-Exp --text mine.jsonl --parts perplexity,recall
  dsa-hal report cost --published --plot cost.png --json cost.json
  dsa-hal report proof

perplexity: of dense attention, of DSA, of DSA in FP8, and, to show what the indexer is worth, of
the latest and of random keys in place of those it selects. Unquantised weights are those of
--unquantised, or the FP8 checkpoint's own, multiplied out.

recall: the share of dense attention's mass, the mean over heads, that the selected keys hold;
beside it that of as many latest keys, and the most that as many keys can hold. Of queries that see
more keys than are selected.

needle: sentences with a code are hidden in the text, one at each depth, and each is asked for at
the end. None of the things asked for had a code in the built-in model's training.

Recall and needles are measured on the checkpoint as it is stored.

cost: one layer with its own weights (or, with --published, one of DeepSeek-V3.2 with random ones)
and caches of random content, at each position: a prefill step that ends there, and decoding of a
batch. Without sparse attention the layer expands its latents in prefill and decodes in the absorbed
form over bf16 latents.

proof: which ops were compared with their references on which target, on a device, in an interpreter
or by compilation alone, from the results kept in this checkout.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dsa_hal.cli import choose, cost, output, proof
from dsa_hal.errors import Absent, BadInput
from dsa_hal.model.builtin import HELDOUT, builtin_checkpoint
from dsa_hal.model.quality.perplexity import Perplexity
from dsa_hal.model.quality.recall import Mass
from dsa_hal.model.quality.report import PARTS, Plan, Quality, Subject, measure, plan, subject
from dsa_hal.model.quality.selectors import label
from dsa_hal.selection import Unsupported, current

REPORTS = ("quality", "cost", "proof")
CONTEXT, WINDOWS, SAMPLES = 4096, 3, 2
DEPTHS = (0, 25, 50, 75, 100)


def arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("report", choices=REPORTS)
    add("--model", type=Path, metavar="DIR", help="checkpoint folder; default: the built-in model")
    add("--backend", nargs="+", action="extend", metavar="NAME",
        help="measure on each of them (a cost: on one); default: DSA_HAL_BACKEND's")  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="write all results there")
    add("--plot", type=Path, metavar="FILE.png", help="draw them there; needs matplotlib")
    cost.arguments(parser)
    proof.arguments(parser)
    add = parser.add_argument_group("quality").add_argument
    add("--unquantised", type=Path, metavar="DIR",
        help="what to compare FP8 weights with; default: the same, multiplied out")  # fmt: skip
    add("--text", type=Path, metavar="FILE",
        help=f"plain, or .jsonl with a text per line; default: the model's {HELDOUT}")  # fmt: skip
    add("--parts", type=lambda text: text.split(","), default=PARTS, metavar="PART,...",
        help=f"default {','.join(PARTS)}")  # fmt: skip
    add("--context", type=choose.whole(2), default=CONTEXT, metavar="N",
        help=f"tokens per window of text; default {CONTEXT}")  # fmt: skip
    add("--windows", type=choose.whole(1), default=WINDOWS, metavar="N", help=f"default {WINDOWS}")
    add("--needle-lengths", type=choose.numbers(1), metavar="N,...",
        help="default: an eighth, a quarter, a half and the whole of the context")  # fmt: skip
    add("--needle-depths", type=choose.numbers(0, 100), default=DEPTHS, metavar="PERCENT,...",
        help=f"default {','.join(map(str, DEPTHS))}")  # fmt: skip
    add("--samples", type=choose.whole(1), default=SAMPLES, metavar="N",
        help=f"haystacks of each length; default {SAMPLES}")  # fmt: skip
    add("--seed", type=choose.whole(0, 2**62), default=0, metavar="N",
        help="of windows, needles and random keys; default 0")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    for path in filter(None, (args.json, args.plot)):
        output.must_be_writable(path)
    if args.report == "cost":
        return cost.run(args)
    if args.report == "proof":
        return proof.run(args)
    draw = choose.picture("picture", "quality") if args.plot is not None else None
    asked, wanted, text = _request(args)
    results = _on_each_backend(args.backend, asked, wanted)
    measured = {name: q for name, q in results.items() if isinstance(q, Quality)}
    if not measured:
        raise Absent("; ".join(map(str, results.values())))
    topk = asked.config.index_topk
    heading = _heading(args, asked, text)
    print(heading)
    for name, result in results.items():
        print()
        if isinstance(result, Quality):
            _tell(result, topk)
        else:
            print(f"{name}: not measured: {result}")
    if args.json is not None:
        record = {
            **_facts(args, asked, text),
            "results": [
                q.to_json() if isinstance(q, Quality) else {"backend": name, "not_measured": q}
                for name, q in results.items()
            ],
        }
        output.write_atomically(args.json, output.as_json(record))
    if draw is not None:
        output.write_atomically(args.plot, draw(heading, list(measured.values()), topk))
    for path in filter(None, (args.json, args.plot)):
        output.note(f"written to {path}")
    return 0


def _request(args: argparse.Namespace) -> tuple[Subject, Plan, Path]:
    """Model, plan and text of the command line, checked before any weight is read."""
    path = args.model or builtin_checkpoint()
    text = args.text or path / HELDOUT
    asked = subject(path, args.unquantised)
    if args.text is None and not text.is_file():
        raise BadInput(f"{path} has no {HELDOUT}; name a text it was not trained on with --text")
    lengths = args.needle_lengths or [max(1, args.context // part) for part in (8, 4, 2, 1)]
    wanted = plan(
        asked, text, parts=args.parts, context=args.context, windows=args.windows, seed=args.seed,
        lengths=lengths, depths=args.needle_depths, samples=args.samples,
    )  # fmt: skip
    return asked, wanted, text


def _on_each_backend(
    names: list[str] | None, asked: Subject, wanted: Plan
) -> dict[str, Quality | str]:
    """Results by the name asked for; the sentence why not where a backend is absent or cannot run
    the model."""
    results: dict[str, Quality | str] = {}
    wishes: list[str | None] = [*names] if names else [None]
    for name in wishes:
        try:
            with choose.backend(name), output.progress(f"measuring {name or ''}".strip()) as step:
                results[name or current().backend] = measure(asked, wanted, step)
        except (Absent, Unsupported) as error:
            if name is None:
                raise
            results[name] = str(error)
    return results


# -- telling -----------------------------------------------------------------------------------


def _facts(args: argparse.Namespace, asked: Subject, text: Path) -> dict[str, Any]:
    return {
        "model": str(asked.stored.path),
        "text": str(text),
        "context": args.context,
        "windows": args.windows,
        "selected_keys": asked.config.index_topk,
        "samples": args.samples,
        "seed": args.seed,
    }


def _heading(args: argparse.Namespace, asked: Subject, text: Path) -> str:
    model = "The built-in model" if args.model is None else asked.stored.path.name
    return (
        f"{model} on {text.name}: {args.windows} x {args.context} tokens,"
        f" {asked.config.index_topk} keys selected"
    )


def _tell(result: Quality, topk: int) -> None:
    print(f"on {result.target}, {output.duration(result.seconds)}")
    for name, origin in result.weights.items():
        print(f"{name}: {origin}")
    if result.perplexity:
        columns = ("attention", "weights", "perplexity", "last quarter", "of that of", "whole",
                   "last quarter")  # fmt: skip
        rows = [_line(result, line, topk) for line in result.perplexity]
        print()
        output.table(columns, rows, right=("perplexity", "last quarter", "whole"))
    if (held := result.recall) is not None:
        keys = (f"{topk} selected", f"{topk} latest", f"best {topk}")
        layers = [(f"layer {at}", *_shares(mass)) for at, mass in enumerate(held.layers)]
        print()
        output.table(("attention mass", *keys), [*layers, ("all", *_shares(held.whole))],
                     right=keys)  # fmt: skip
    if result.needles:
        lengths = [f"{length:,}" for length in result.needles[0].lengths]
        print()
        output.table(("needles found", *lengths), _needles(result, topk), right=lengths)
    for sentence in result.notes:
        print(f"\n{sentence}")


def _line(result: Quality, line: Perplexity, topk: int) -> tuple[str, ...]:
    row = (label(line.selector, topk), line.weights, output.number(line.whole),
           output.number(line.late))  # fmt: skip
    other = result.against(line)
    if other is None:
        return (*row, "", "", "")
    of = f"{label(other.selector, topk)}, {other.weights}"
    return (*row, of, *(f"{times:.4f}x" for times in line / other))


def _shares(mass: Mass) -> tuple[str, ...]:
    return tuple(f"{100 * share:.1f}%" for share in (mass.selected, mass.recent, mass.best))


def _needles(result: Quality, topk: int) -> list[tuple[str, ...]]:
    """A row per depth for the model's own selection, then a row per selector for all depths."""
    own = result.needles[0]
    rows = [
        (f"{label(own.selector, topk)}, {depth}% deep", *(f"{n}/{own.samples}" for n in counts))
        for depth, counts in zip(own.depths, zip(*own.found, strict=True), strict=True)
    ]
    each = own.samples * len(own.depths)
    rows += [
        (f"{label(n.selector, topk)}, all depths", *(f"{sum(counts)}/{each}" for counts in n.found))
        for n in result.needles
    ]
    return rows
