"""What all layers share in one step: worked out once, before the first layer.

Tokens of all requests lie flat, without padding. A `Prefill` step holds pieces of prompts at any
start positions; a `Decode` step holds the same small number of new tokens for every request. Where
attention takes requests of any length over pages, a `Varlen` step holds either.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dsa_hal.model.cache import Context, KVCache
from dsa_hal.model.config import ModelConfig

Form = Literal["mha", "mqa"]


class Piece(NamedTuple):
    """Tokens [start, stop) of the prompt of one request; `last` if the prompt ends there."""

    request: int
    start: int
    stop: int
    last: bool


@dataclass
class Prefill:
    """One prefill step.

    tokens     [tokens] int64
    positions  [tokens] int32, within each request
    slots      [tokens] int32, where the new tokens are stored
    gathered   [context] int32, slots of the contexts of all requests, one after the other
    ks, ke     [tokens] int32, the rows of `gathered` that each token may see
    scored     some token sees more than index_topk keys, so the indexer must choose
    form       "mha": keys and values are expanded from the latents; "mqa": the absorbed form
    everything [tokens, most keys] int32, all rows each token sees, -1 after the last; only for an
               absorbed step that is not scored
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    gathered: Tensor
    ks: Tensor
    ke: Tensor
    scored: bool
    form: Form
    everything: Tensor | None
    positions_end: int


@dataclass
class Decode:
    """One decode step: `per_request` new tokens for each request, request after request.

    tokens, positions, slots  [requests * per_request], as in `Prefill`
    context_lens  [requests, per_request] int32, how many keys each token sees
    block_table   [requests, pages] int32
    longest       the largest of context_lens
    everything    [requests * per_request, keys] int32, the slots of all keys, -1 after the last;
                  None when some token sees more than index_topk keys and the indexer must choose
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    context_lens: Tensor
    block_table: Tensor
    longest: int
    everything: Tensor | None
    positions_end: int


@dataclass
class Varlen:
    """One step of either phase, of which attention reads the pages of all requests in one call.

    tokens, positions, slots  as in `Prefill`
    cu_seqlens_q  [requests + 1] int32, where the tokens of each request begin
    context_lens  [requests] int32, keys of each request, its new ones included
    block_table   [requests, pages] int32
    longest       no context is longer
    everything    [tokens, longest] int32, all positions each token sees, -1 after the last; None
                  when some token sees more than index_topk keys and the indexer must choose
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    cu_seqlens_q: Tensor
    context_lens: Tensor
    block_table: Tensor
    longest: int
    everything: Tensor | None
    positions_end: int


Step = Prefill | Decode | Varlen


def pieces(lengths: Sequence[int], starts: Sequence[int], chunk: int) -> Iterator[list[Piece]]:
    """Cut prompts of `lengths` tokens, of which `starts` are stored already, into steps of at most
    `chunk` tokens; the prompt after the one that ends fills the rest of its step."""
    step: list[Piece] = []
    room = chunk
    for request, (length, at) in enumerate(zip(lengths, starts, strict=True)):
        while at < length:
            stop = min(length, at + room)
            step.append(Piece(request, at, stop, stop == length))
            room -= stop - at
            at = stop
            if room == 0:
                yield step
                step, room = [], chunk
    if step:
        yield step


def attention_flop(config: ModelConfig, queries: int, context: int) -> tuple[float, float]:
    """Work of one layer's attention for the last `queries` of `context` tokens, as (MHA, MQA) FLOP.

    MHA expands the latents of the whole context and then meets every visible key at qk_head_dim +
    v_head_dim per head. MQA expands per query and meets at most index_topk keys, each at twice the
    latent's width. The indexer's own work is the same in both and left out.
    """
    heads = config.num_attention_heads
    expand = 2.0 * heads * (config.qk_nope_head_dim + config.v_head_dim) * config.kv_lora_rank
    visible = queries * context - queries * (queries - 1) / 2
    selected = visible
    if context > config.index_topk:
        short = max(0, config.index_topk - (context - queries))  # queries that see up to topk keys
        below = short * config.index_topk - short * (short - 1) / 2
        selected = below + (queries - short) * config.index_topk
    mha = 2.0 * heads * (config.qk_head_dim + config.v_head_dim) * visible + expand * context
    mqa = 2.0 * heads * (2 * config.kv_lora_rank + config.qk_rope_head_dim) * selected
    return mha, mqa + expand * queries


def prefers_mha(
    config: ModelConfig, work: Sequence[tuple[int, int]], *, free_masks: bool = True
) -> bool:
    """The switch-over rule: expanded MHA while it costs no more than the absorbed sparse form.

    `work`: (queries, context) per request of a step. For the published model and long chunks the
    two are equal at about 7000 visible keys, which is the kink in the paper's figure 3. Beyond
    index_topk keys MHA needs a mask; without `free_masks`, one that costs nothing, it stops there.
    """
    if not free_masks and any(context > config.index_topk for _, context in work):
        return False
    costs = [attention_flop(config, queries, context) for queries, context in work]
    return sum(mha for mha, _ in costs) <= sum(mqa for _, mqa in costs)


def prefill_step(
    config: ModelConfig,
    cache: KVCache,
    contexts: Sequence[Context],
    step: Sequence[Piece],
    tokens: Sequence[Tensor],
    form: Form | None = None,
    *,
    free_masks: bool = True,
) -> Prefill:
    """The step that stores and computes `step`'s pieces; reserves their pages. `tokens` holds each
    request's whole prompt, int64. `form` overrides the switch-over rule, `free_masks` is its."""
    positions, slots, gathered, ks, ke = [], [], [], [], []
    base = 0
    for piece in step:
        context = contexts[piece.request]
        cache.reserve(context, piece.stop)
        at = torch.arange(piece.start, piece.stop, dtype=torch.int32)
        rows = cache.slots(context, 0, piece.stop)
        positions.append(at)
        slots.append(rows[piece.start :])
        gathered.append(rows)
        ks.append(torch.full_like(at, base))
        ke.append(at + (base + 1))
        base += piece.stop
    longest = max(piece.stop for piece in step)
    scored = longest > config.index_topk
    if form is None:
        work = [(piece.stop - piece.start, piece.stop) for piece in step]
        form = "mha" if prefers_mha(config, work, free_masks=free_masks) else "mqa"
    first, end = torch.cat(ks), torch.cat(ke)
    everything = None
    if form == "mqa" and not scored:
        everything = first[:, None] + torch.arange(longest, dtype=torch.int32)
        everything.masked_fill_(everything >= end[:, None], -1)

    def put(tensor: Tensor) -> Tensor:
        return tensor.to(cache.device)

    return Prefill(
        tokens=put(torch.cat([tokens[p.request][p.start : p.stop] for p in step])),
        positions=put(torch.cat(positions)),
        slots=put(torch.cat(slots)),
        gathered=put(torch.cat(gathered)),
        ks=put(first),
        ke=put(end),
        scored=scored,
        form=form,
        everything=None if everything is None else put(everything),
        positions_end=longest,
    )


def varlen_prefill(
    config: ModelConfig,
    cache: KVCache,
    contexts: Sequence[Context],
    step: Sequence[Piece],
    tokens: Sequence[Tensor],
) -> Varlen:
    """As `prefill_step`, for attention over pages."""
    for piece in step:
        cache.reserve(contexts[piece.request], piece.stop)
    starts = list(accumulate((piece.stop - piece.start for piece in step), initial=0))
    slots = [cache.slots(contexts[p.request], p.start, p.stop) for p in step]
    positions = [torch.arange(p.start, p.stop, dtype=torch.int32) for p in step]
    ends = torch.tensor([piece.stop for piece in step], dtype=torch.int32)
    return _varlen(
        config,
        torch.cat([tokens[p.request][p.start : p.stop] for p in step]).to(cache.device),
        torch.cat(positions).to(cache.device),
        torch.cat(slots).to(cache.device),
        torch.tensor(starts, dtype=torch.int32).to(cache.device),
        ends.to(cache.device),
        cache.block_table([contexts[piece.request] for piece in step]),
        max(piece.stop for piece in step),
    )


def _varlen(
    config: ModelConfig, tokens: Tensor, positions: Tensor, slots: Tensor, cu_seqlens_q: Tensor,
    context_lens: Tensor, table: Tensor, longest: int,
) -> Varlen:  # fmt: skip
    everything = None
    if longest <= config.index_topk:
        at = torch.arange(longest, dtype=torch.int32, device=tokens.device)
        everything = at.expand(len(positions), longest).masked_fill(at > positions[:, None], -1)
    return Varlen(
        tokens=tokens,
        positions=positions,
        slots=slots,
        cu_seqlens_q=cu_seqlens_q,
        context_lens=context_lens,
        block_table=table,
        longest=longest,
        everything=everything,
        positions_end=longest,
    )


def decode_step(
    config: ModelConfig,
    cache: KVCache,
    contexts: Sequence[Context],
    tokens: Tensor,
    *,
    varlen: bool = False,
) -> Decode | Varlen:
    """The step that appends `tokens` [requests, per_request] int64; reserves their pages. `varlen`
    makes one for attention over pages."""
    count = tokens.shape[1]
    for context in contexts:
        cache.reserve(context, context.length + count)
    lengths = torch.tensor([context.length for context in contexts], dtype=torch.int32)
    return decode_batch(
        config, tokens.to(cache.device), lengths.to(cache.device), cache.block_table(contexts),
        longest=max(context.length for context in contexts) + count, page_size=cache.page_size,
        varlen=varlen,
    )  # fmt: skip


def decode_batch(
    config: ModelConfig, tokens: Tensor, lengths: Tensor, table: Tensor, *, longest: int,
    page_size: int, varlen: bool = False,
) -> Decode | Varlen:  # fmt: skip
    """The step that appends `tokens` [requests, per_request] int64 to contexts of `lengths`
    [requests] int32 with the pages `table` [requests, pages] int32, all on one device and read by
    it alone. No context is longer than `longest` afterwards."""
    requests, count = tokens.shape
    offsets = torch.arange(count, dtype=torch.int32, device=tokens.device)
    positions = lengths[:, None] + offsets

    def slots(at: Tensor) -> Tensor:  # at [requests, any], positions
        return table.gather(1, (at // page_size).long()) * page_size + at % page_size

    if varlen:
        starts = torch.arange(requests + 1, dtype=torch.int32, device=tokens.device) * count
        return _varlen(
            config, tokens.flatten(), positions.flatten(), slots(positions).flatten(), starts,
            lengths + count, table, longest,
        )  # fmt: skip
    everything = None
    if longest <= config.index_topk:
        at = torch.arange(longest, dtype=torch.int32, device=tokens.device)
        all_slots = slots(at.expand(requests, longest))[:, None]
        unseen = at > positions[..., None]
        everything = all_slots.expand(requests, count, longest).masked_fill(unseen, -1)
        everything = everything.reshape(requests * count, longest)
    return Decode(
        tokens=tokens.flatten(),
        positions=positions.flatten(),
        slots=slots(positions).flatten(),
        context_lens=positions + 1,
        block_table=table,
        longest=longest,
        everything=everything,
        positions_end=longest,
    )
