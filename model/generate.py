"""Continuing prompts: greedy or sampled, a ragged batch at a time, repeatable by seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dsa_hal.errors import BadInput
from dsa_hal.model.cache import Context, KVCache
from dsa_hal.model.decoder import Decoder
from dsa_hal.model.transformer import PREFILL_CHUNK, Transformer


@dataclass
class Memory:
    """What a cache still holds of one conversation, so that its next turn reads only what is new.

    tokens  the conversation so far; the first `context.length` of them are stored
    reused  tokens of the last prompt that were not read again
    """

    cache: KVCache | None = None
    context: Context = field(default_factory=Context)
    tokens: list[int] = field(default_factory=list)
    reused: int = 0

    def recall(self, model: Transformer, prompt: Sequence[int], room: int) -> KVCache:
        """The cache, with space for `room` tokens, and the context cut back to what it shares with
        `prompt`; its last token is read anew, because the next one follows from its logits."""
        if self.cache is None:
            self.cache, _ = model.new_cache([room])
        self.cache.grow(-(-room // self.cache.page_size))
        stored = self.tokens[: self.context.length]
        pairs = enumerate(zip(stored, prompt[:-1], strict=False))
        differing = (at for at, (old, new) in pairs if old != new)
        self.reused = next(differing, min(len(stored), len(prompt) - 1))
        self.context.length = self.reused
        self.tokens = list(prompt)
        return self.cache


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    stop_ids: Sequence[int] | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    on_token: Callable[[int, int], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    memory: Memory | None = None,
) -> list[list[int]]:
    """New token ids for each prompt, without the stop token that ended it.

    prompts         token ids; lengths may differ, and no prompt influences another
    max_new_tokens  at most so many; fewer if a stop token comes or `model.max_context` is reached
    temperature     0 takes the likeliest token; else softmax(logits / temperature) in fp32
    top_p           sample among the likeliest tokens whose probabilities first reach it, in (0, 1]
    repetition_penalty  above 1 makes tokens that the prompt or the answer holds less likely, as in
                    transformers: a logit above 0 is divided by it, another multiplied; 1 = none
    seed            row i draws from a generator of its own, seeded with seed + i
    stop_ids        None = the config's eos tokens
    on_token        called as (row, token id) for every new token, in the order they come
    progress        called as (prompt tokens stored, prompt tokens in all) while prompts are read
    memory          of a conversation, for its one prompt: what both begin with is not read again

    Raises BadInput for values outside these ranges, before anything is computed.
    """
    stops = frozenset(model.config.eos_token_ids if stop_ids is None else stop_ids)
    if max_new_tokens < 0:
        raise BadInput(f"max_new_tokens is {max_new_tokens}; it must be 0 or more")
    choose = Sampler(temperature, top_p, repetition_penalty, seed)
    checked = [model.checked(prompt) for prompt in prompts]
    out: list[list[int]] = [[] for _ in checked]
    if not checked or max_new_tokens == 0:
        return out
    room = [min(len(p) + max_new_tokens, model.max_context) for p in checked]
    for prompt, most in zip(checked, room, strict=True):
        if len(prompt) == most:
            raise BadInput(
                f"a prompt of {most} tokens leaves no room to continue: this model takes {most} in"
                " all; shorten the prompt"
            )
    if memory is None:
        cache, contexts = model.new_cache(room)
    elif len(checked) == 1:
        cache = memory.recall(model, checked[0].tolist(), room[0])
        contexts = [memory.context]
    else:
        raise BadInput(f"there are {len(checked)} prompts; a memory belongs to one conversation")
    live: dict[int, int] = {}
    seen = [set(prompt.tolist()) for prompt in checked]

    def take(rows: Sequence[int], logits: Tensor) -> None:
        """Choose the next token of each row; `live` keeps the rows that go on."""
        for row, token in zip(rows, choose.each(rows, logits, seen), strict=True):
            seen[row].add(token)
            live.pop(row, None)
            if token not in stops:
                out[row].append(token)
                if memory is not None:
                    memory.tokens.append(token)
                if on_token is not None:
                    on_token(row, token)
                if len(checked[row]) + len(out[row]) < room[row]:
                    live[row] = token

    stored, total = sum(context.length for context in contexts), sum(map(len, checked))
    for step, logits in model.prefill(cache, contexts, checked, chunk=prefill_chunk):
        take([piece.request for piece in step if piece.last], logits)
        stored += sum(piece.stop - piece.start for piece in step)
        if progress is not None:
            progress(stored, total)
    decode = Decoder(model, cache, contexts, room)
    while live:
        fed = dict(sorted(live.items()))
        take(list(fed), decode(fed))
    return out


class Sampler:
    """Picks tokens from logits, knowing which were there before; the same seed picks the same
    tokens, whatever else runs.

    Draws come from generators of its own on the CPU, one per row, never from torch's global one.
    """

    def __init__(
        self, temperature: float, top_p: float, repetition_penalty: float, seed: int
    ) -> None:
        if not (math.isfinite(temperature) and temperature >= 0):
            raise BadInput(f"temperature is {temperature}; it must be 0 (greedy) or above 0")
        if not 0 < top_p <= 1:
            raise BadInput(f"top_p is {top_p}; it must be above 0 and at most 1")
        if not (math.isfinite(repetition_penalty) and repetition_penalty > 0):
            raise BadInput(
                f"repetition_penalty is {repetition_penalty}; it must be above 0, and 1 is none"
            )
        if not 0 <= seed < 1 << 63:
            raise BadInput(f"seed is {seed}; it must be an integer from 0 to 2^63 - 1")
        self._temperature, self._top_p, self._seed = temperature, top_p, seed
        self._penalty = repetition_penalty
        self._generators: dict[int, torch.Generator] = {}

    def each(self, rows: Sequence[int], logits: Tensor, seen: Sequence[Set[int]]) -> list[int]:
        """A token for each of `rows` from its logits [len(rows), vocab]; seen[row] are the row's
        tokens so far. The device is waited for once, however many rows there are."""
        if self._temperature == 0 and self._penalty == 1:
            return [int(token) for token in logits.argmax(-1).tolist()]
        here = logits.float().cpu()
        return [self(row, own, seen[row]) for row, own in zip(rows, here, strict=True)]

    def __call__(self, row: int, logits: Tensor, so_far: Set[int]) -> int:
        """A token from logits [vocab], which lie on the CPU."""
        if self._penalty != 1:
            seen = torch.tensor(list(so_far))
            held = logits[seen]
            less = torch.where(held > 0, held / self._penalty, held * self._penalty)
            logits = logits.index_copy(0, seen, less)
        if self._temperature == 0:
            return int(logits.argmax())
        if row not in self._generators:
            self._generators[row] = torch.Generator().manual_seed((self._seed + row) % (1 << 63))
        # Subtracting the largest logit first keeps a tiny temperature from overflowing to infinity.
        scaled = (logits - logits.max()) / self._temperature
        kept, order = torch.softmax(scaled, -1).sort(descending=True, stable=True)
        before = kept.cumsum(-1) - kept
        kept = kept.masked_fill(before >= self._top_p, 0)
        return int(order[torch.multinomial(kept, 1, generator=self._generators[row])])
