"""The quality report of one checkpoint: what is measured, with which weights, and all results."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dsa_hal.errors import BadInput, ConfigError
from dsa_hal.model import Transformer
from dsa_hal.model.checkpoint import Checkpoint
from dsa_hal.model.config import ModelConfig
from dsa_hal.model.precision import resolve
from dsa_hal.model.quality import heldout
from dsa_hal.model.quality.haystack import Haystack, Needles, find, haystacks
from dsa_hal.model.quality.perplexity import Perplexity, perplexity
from dsa_hal.model.quality.recall import Recall, recall
from dsa_hal.model.tokenizer import Tokenizer
from dsa_hal.selection import current

PARTS = ("perplexity", "recall", "needle")
UNQUANTISED, FP8 = "unquantised", "fp8"

_DENSE, _DSA = (UNQUANTISED, "dense"), (UNQUANTISED, "dsa")
COMPARED = {
    _DENSE: None,
    _DSA: _DENSE,
    (FP8, "dsa"): _DSA,
    (UNQUANTISED, "recent"): _DENSE,
    (UNQUANTISED, "random"): _DENSE,
}
"""Weights and selectors whose perplexity is taken -> those it is compared with."""

ASKED = ("dsa", "dense", "random")
"""Selectors under which needles are looked for."""


@dataclass(frozen=True)
class Weights:
    """One of the two sides of the comparison.

    name       UNQUANTISED or FP8
    path       the checkpoint
    precision  as `Transformer.from_pretrained` takes it
    origin     where the numbers come from, in words
    """

    name: str
    path: Path
    precision: str | None
    origin: str


@dataclass(frozen=True)
class Subject:
    """What is judged, made by `subject`.

    stored   the weights as the checkpoint has them: recall and needles are measured on these
    other    those on the other side of quantisation, or the sentence why there are none
    """

    config: ModelConfig
    tokenizer: Tokenizer
    stored: Weights
    other: Weights | str


@dataclass(frozen=True)
class Plan:
    """What is measured, made by `plan`: no model is needed to find it impossible."""

    parts: tuple[str, ...]
    windows: tuple[Tensor, ...]
    stacks: tuple[Haystack, ...]
    seed: int


@dataclass(frozen=True)
class Quality:
    """The results on one backend; what was not asked for is empty.

    target   backend and architecture
    weights  name -> origin and number formats, of the weights that were used
    stored   name of the weights that recall and needles were measured on
    notes    sentences about what could not be measured
    """

    target: str
    weights: dict[str, str]
    stored: str
    notes: tuple[str, ...]
    perplexity: tuple[Perplexity, ...]
    recall: Recall | None
    needles: tuple[Needles, ...]
    seconds: float

    def against(self, line: Perplexity) -> Perplexity | None:
        """What a line is compared with, if that was measured."""
        pair = COMPARED[line.weights, line.selector]
        return next((p for p in self.perplexity if (p.weights, p.selector) == pair), None)

    def to_json(self) -> dict[str, Any]:
        """Plain values; a line of perplexity also says how many times that is of what."""
        lines = []
        for line in self.perplexity:
            other = self.against(line)
            record = asdict(line)
            if other is not None:
                record["against"] = {"weights": other.weights, "selector": other.selector}
                record["times"], record["times_late"] = line / other
            lines.append(record)
        return {**asdict(self), "perplexity": lines}


def subject(path: Path, unquantised: Path | None = None) -> Subject:
    """The checkpoint at `path` with what its FP8 weights are compared with: those of the checkpoint
    `unquantised`, or its own, multiplied out. Unquantised weights are compared with their own
    rounding to FP8, where their sizes allow it."""
    with Checkpoint.open(path) as checkpoint:
        config, dtype = checkpoint.config, checkpoint.weights_dtype
    tokenizer = Tokenizer.load(path, config)
    stored = Weights(FP8 if dtype == "fp8" else UNQUANTISED, path, None, f"{path}, as stored")
    if unquantised is not None:
        return Subject(config, tokenizer, stored, _given(unquantised, config, stored))
    if dtype == "fp8":
        origin = "the same weights multiplied out, in bf16 arithmetic"
        return Subject(config, tokenizer, stored, Weights(UNQUANTISED, path, "bf16", origin))
    try:
        resolve("fp8", config, dtype)
    except ConfigError as error:
        return Subject(config, tokenizer, stored, f"no perplexity in FP8: {error}")
    other = Weights(FP8, path, "fp8", "the same weights, rounded on loading")
    return Subject(config, tokenizer, stored, other)


def _given(path: Path, config: ModelConfig, stored: Weights) -> Weights:
    with Checkpoint.open(path) as checkpoint:
        dtype, vocab = checkpoint.weights_dtype, checkpoint.config.vocab_size
    if stored.name != FP8 or dtype == FP8:
        found = f"{stored.path} is {stored.name} and {path} holds {dtype}"
        raise BadInput(f"an FP8 model is compared with an unquantised one, but {found}")
    if vocab != config.vocab_size:
        sizes = f"{path} has {vocab} tokens and {stored.path} has {config.vocab_size}"
        raise BadInput(f"the vocabularies differ: {sizes}")
    return Weights(UNQUANTISED, path, None, f"{path}, as stored ({dtype})")


def plan(
    subject: Subject, text: Path, *, parts: Sequence[str], context: int, windows: int, seed: int,
    lengths: Sequence[int], depths: Sequence[int], samples: int,
) -> Plan:  # fmt: skip
    """What to measure on the text in the file `text`; BadInput for what this model or text does not
    allow."""
    limit, topk = subject.config.max_position_embeddings, subject.config.index_topk
    if unknown := [part for part in parts if part not in PARTS]:
        raise BadInput(f"unknown part {unknown[0]!r}; known are {', '.join(PARTS)}")
    if not topk < context <= limit:
        raise BadInput(
            f"the context is {context} tokens; this model selects {topk} keys and takes {limit}"
            f" tokens, so that it must be from {topk + 1} to {limit}"
        )
    if "needle" in parts and max(lengths) > limit:
        raise BadInput(f"a haystack of {max(lengths)} tokens: this model takes {limit}")
    tokens = heldout.tokens(text, subject.tokenizer)
    cut: Sequence[Tensor] = ()
    stacks: Sequence[Haystack] = ()
    if {"perplexity", "recall"} & set(parts):
        cut = heldout.windows(tokens, context, windows, seed, subject.tokenizer.bos_id)
    if "needle" in parts:
        stacks = haystacks(tokens, subject.tokenizer, lengths, depths, samples, seed)
    return Plan(tuple(parts), tuple(cut), tuple(stacks), seed)


def measure(
    subject: Subject, plan: Plan, progress: Callable[[int, int], None] | None = None
) -> Quality:
    """Everything of `plan` on the backend in force; one model is in memory at a time.

    progress  called as (tokens read, tokens in all)
    """
    began = time.monotonic()
    other = [subject.other] if isinstance(subject.other, Weights) else []
    present = {weights.name for weights in (subject.stored, *other)}
    compared = [pair for pair in COMPARED if pair[0] in present and "perplexity" in plan.parts]
    recalled = plan.windows if "recall" in plan.parts else ()
    read, window = 0, sum(map(len, plan.windows))
    total = window * len(compared) + sum(map(len, recalled))
    total += sum(stack.length for stack in plan.stacks) * len(ASKED)

    def advance(tokens: int) -> None:
        nonlocal read
        read += tokens
        if progress is not None:
            progress(read, total)

    used: dict[str, str] = {}
    lines: dict[tuple[str, str], Perplexity] = {}
    held: Recall | None = None
    needles: list[Needles] = []
    for weights in (subject.stored, *other):
        mine = [selector for name, selector in compared if name == weights.name]
        if not mine and weights is not subject.stored:
            continue
        model = Transformer.from_pretrained(weights.path, precision=weights.precision)
        used[weights.name] = f"{weights.origin}: {model.formats}"
        for selector in mine:
            lines[weights.name, selector] = perplexity(
                model, plan.windows, weights=weights.name, selector=selector, seed=plan.seed,
                advance=advance,
            )  # fmt: skip
        if weights is subject.stored:
            if recalled:
                held = recall(model, recalled, advance=advance)
            if plan.stacks:
                needles = [
                    find(model, subject.tokenizer, plan.stacks, selector=selector, seed=plan.seed,
                         advance=advance)
                    for selector in ASKED
                ]  # fmt: skip
        del model  # before the next one is read
    notes = [] if other or "perplexity" not in plan.parts else [str(subject.other)]
    return Quality(
        target=f"{current()} {current().name}".strip(), weights=used, stored=subject.stored.name,
        notes=tuple(notes), perplexity=tuple(lines[pair] for pair in compared), recall=held,
        needles=tuple(needles), seconds=time.monotonic() - began,
    )  # fmt: skip
