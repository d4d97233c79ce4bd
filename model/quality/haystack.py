"""Needles hidden in text that the model was not trained on, and whether it finds them again.

A haystack holds a needle at every depth asked for, and is read once; then each is asked for in
turn. So every question has wrong answers near it that are of the right form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from torch import Tensor

from dsa_hal.errors import BadInput
from dsa_hal.model.generate import Memory, generate
from dsa_hal.model.quality.needle import Needle, draw
from dsa_hal.model.quality.perplexity import Advance
from dsa_hal.model.quality.selectors import selecting
from dsa_hal.model.tokenizer import Tokenizer
from dsa_hal.model.transformer import Transformer


@dataclass(frozen=True)
class Haystack:
    """Tokens with needles in them; `tokens`, the longest question and its answer make `length`.

    length   tokens in all
    tokens   the text, a begin-of-text token first if the tokenizer has one
    depths   percent of the text that stands before each needle
    needles  one for each of `depths`
    """

    length: int
    tokens: tuple[int, ...]
    depths: tuple[int, ...]
    needles: tuple[Needle, ...]


@dataclass(frozen=True)
class Needles:
    """What was found under one selector: `found[length][depth]` of `samples`, in the order of
    `lengths` and `depths`."""

    selector: str
    lengths: tuple[int, ...]
    depths: tuple[int, ...]
    samples: int
    found: tuple[tuple[int, ...], ...]

    @property
    def share(self) -> float:
        return sum(map(sum, self.found)) / (self.samples * len(self.lengths) * len(self.depths))


def haystacks(
    text: Tensor, tokenizer: Tokenizer, lengths: Sequence[int], depths: Sequence[int],
    samples: int, seed: int,
) -> list[Haystack]:  # fmt: skip
    """`samples` of each length, made of pieces of `text` int64 [tokens]; BadInput where a length
    has no room for the needles or the text is too short for it."""
    return [
        _haystack(text, tokenizer, length, tuple(depths), Random(f"{seed}/{length}/{sample}"))
        for length in lengths
        for sample in range(samples)
    ]


def _haystack(
    text: Tensor, tokenizer: Tokenizer, length: int, depths: tuple[int, ...], pick: Random
) -> Haystack:
    needles: list[Needle] = []
    while len(needles) < len(depths):
        needle = draw(pick, heldout=True)
        if needle.question not in {known.question for known in needles}:
            needles.append(needle)
    hidden = [tokenizer.encode(f"\n{needle.statement}\n", add_bos=False) for needle in needles]
    first = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    asked = max(len(_asked(tokenizer, n)) + len(_answer(tokenizer, n)) for n in needles)
    taken = len(first) + sum(map(len, hidden)) + asked
    room = length - taken
    if room < len(needles):
        raise BadInput(
            f"a haystack of {length} tokens is too short: {len(needles)} needles and a question"
            f" take {taken}; choose longer ones, or fewer depths"
        )
    if room > len(text):
        raise BadInput(
            f"a haystack of {length} tokens needs {room} of text, and the text has {len(text)};"
            " give a longer text or shorter haystacks"
        )
    start = pick.randrange(len(text) - room + 1)
    filler = text[start : start + room].tolist()
    made, done = list(first), 0
    for depth, statement in sorted(zip(depths, hidden, strict=True)):
        stop = round(room * depth / 100)
        made += [*filler[done:stop], *statement]
        done = stop
    return Haystack(length, (*made, *filler[done:]), depths, tuple(needles))


def find(
    model: Transformer,
    tokenizer: Tokenizer,
    stacks: Sequence[Haystack],
    *,
    selector: str,
    seed: int = 0,
    advance: Advance | None = None,
) -> Needles:
    """Ask `model` for every needle of `stacks`, greedily: found is one whose whole code comes
    first. All stacks have the same depths, and of each length there are as many."""
    lengths, depths = tuple(dict.fromkeys(s.length for s in stacks)), stacks[0].depths
    found = {length: [0] * len(depths) for length in lengths}
    for at, stack in enumerate(stacks):
        memory = Memory()
        with selecting(model, selector, seed + at):
            for column, needle in enumerate(stack.needles):
                found[stack.length][column] += _finds(model, tokenizer, stack, needle, memory)
        if advance is not None:
            advance(stack.length)
    counts = tuple(tuple(found[length]) for length in lengths)
    return Needles(selector, lengths, depths, len(stacks) // len(lengths), counts)


def _finds(
    model: Transformer, tokenizer: Tokenizer, stack: Haystack, needle: Needle, memory: Memory
) -> bool:
    prompt = [*stack.tokens, *_asked(tokenizer, needle)]
    count = len(_answer(tokenizer, needle))
    new = generate(model, [prompt], max_new_tokens=count, stop_ids=(), memory=memory)[0]
    return tokenizer.decode(new).strip().startswith(needle.answer)


def _asked(tokenizer: Tokenizer, needle: Needle) -> list[int]:
    return tokenizer.encode(f"\n{needle.question}", add_bos=False)


def _answer(tokenizer: Tokenizer, needle: Needle) -> list[int]:
    return tokenizer.encode(f" {needle.answer}", add_bos=False)
