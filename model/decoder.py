"""Decoding a batch step by step. Where the device records work, all that changes from step to step
lies in buffers of fixed size, so that one recorded step serves for all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsa_hal.graphs import Recorded, can_record
from dsa_hal.model.batch import decode_batch
from dsa_hal.model.cache import Context, KVCache
from dsa_hal.model.transformer import Transformer


class FixedBatch:
    """Decode steps of one batch, each on the same memory.

    Every request may grow to its `room` tokens, for which pages are reserved at once; ops are asked
    for contexts of the longest room in every step. A request at rest is computed with the others,
    on a token that it does not keep.

    record  record the second step and replay it from then on; the first finds everything compiled
    """

    def __init__(
        self,
        model: Transformer,
        cache: KVCache,
        contexts: Sequence[Context],
        room: Sequence[int],
        *,
        record: bool,
    ) -> None:
        for context, most in zip(contexts, room, strict=True):
            cache.reserve(context, most)
        self._model, self._cache, self._contexts = model, cache, contexts
        self._longest = max(room)
        self._table = cache.block_table(contexts)
        self._rotary = model.rope.upto(self._longest)  # stays, should another request need more
        device = cache.device
        self._tokens = torch.zeros(len(contexts), 1, dtype=torch.int64, device=device)
        self._grow = torch.ones(len(contexts), dtype=torch.int32, device=device)
        self._lengths = torch.tensor([c.length for c in contexts], dtype=torch.int32).to(device)
        self._awake = [True] * len(contexts)
        self._record, self._ran = record, False
        self._recorded: Recorded[Tensor] | None = None

    def rest(self, request: int) -> None:
        """The request grows no more."""
        self._awake[request] = False
        self._grow[request] = 0

    def __call__(self, tokens: Sequence[int]) -> Tensor:
        """Append a token to each request's context: logits fp32 [requests, vocab], overwritten by
        the next call."""
        self._tokens.copy_(torch.tensor(tokens)[:, None])
        if self._recorded is None and self._record and self._ran:
            self._recorded = Recorded(self._step, self._cache.device)
        logits = self._step() if self._recorded is None else self._recorded.replay()
        self._ran = True
        for context, awake in zip(self._contexts, self._awake, strict=True):
            context.length += awake
        return logits

    def _step(self) -> Tensor:
        step = decode_batch(
            self._model.config, self._tokens, self._lengths, self._table, longest=self._longest,
            page_size=self._cache.page_size, varlen=self._model.attention_ops.varlen,
        )  # fmt: skip
        logits = self._model.forward(step, self._cache)
        self._lengths.add_(self._grow)
        return logits


class Decoder:
    """Decodes those of some requests that still go on.

    room  tokens that each request may have in all
    """

    def __init__(
        self,
        model: Transformer,
        cache: KVCache,
        contexts: Sequence[Context],
        room: Sequence[int],
    ) -> None:
        self._model, self._cache, self._contexts, self._room = model, cache, contexts, room
        self._record = model.record and can_record(cache.device)
        self._rows: list[int] = []
        self._batch: FixedBatch | None = None

    def __call__(self, tokens: dict[int, int]) -> Tensor:
        """Append to each request its token: logits fp32 [len(tokens), vocab], in the order of the
        tokens. A request that was left out once does not come back."""
        contexts = [self._contexts[row] for row in tokens]
        if not self._record:
            fed = torch.tensor([*tokens.values()])[:, None]
            return self._model.decode(self._cache, contexts, fed)[:, -1]
        if self._batch is None or 2 * len(tokens) <= len(self._rows):  # half of the work for naught
            self._rows = list(tokens)
            room = [self._room[row] for row in tokens]
            self._batch = FixedBatch(self._model, self._cache, contexts, room, record=True)
        places = {row: at for at, row in enumerate(self._rows)}
        for row in places.keys() - tokens.keys():
            self._batch.rest(places[row])
        logits = self._batch([tokens.get(row, 0) for row in self._rows])
        if len(tokens) == len(self._rows):
            return logits
        return logits[torch.tensor([places[row] for row in tokens], device=logits.device)]
