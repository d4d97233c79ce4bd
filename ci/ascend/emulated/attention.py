"""The indexer and sparse attention: which tokens belong to which request, what each sees, and plain
fp32 arithmetic over it.

Sources: op-plugin, docs/zh/custom_APIs/torch_npu, the page of each op; for the rounding of weights
of the softmax and for masked positions, ops-transformer's golden of sparse_flash_attention. Queries
are TND here, keys PA_BSND or TND; other layouts are not emulated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ci.ascend.emulated._need import HALVES, dense, is_950, need, of, undefined

ALL = 2**63 - 1
"""The one value of pre_tokens and next_tokens."""

Fetch = Callable[[int, Tensor], Tensor]
"""(request, positions) -> what stands there."""


@dataclass(frozen=True)
class Span:
    """One request of a call: its tokens [start, end), and its keys."""

    request: int
    start: int
    end: int
    keys: int

    def seen(self, token: int, sparse_mode: int) -> int:
        """Positions before it that a token may see; may be negative."""
        return self.keys if sparse_mode == 0 else self.keys - (self.end - token) + 1


def spans(
    tokens: int, query_lengths: Tensor | None, key_lengths: Tensor | None, keys: int | None
) -> list[Span]:
    """The requests of a TND call: cumulative ends of tokens, and lengths of keys, which are
    cumulative too where keys lie flat (`keys` of them in all; None under pages)."""
    of("actual_seq_lengths_query", query_lengths, (torch.int32,), None)
    of("actual_seq_lengths_key", key_lengths, (torch.int32,), None)
    assert query_lengths is not None and key_lengths is not None
    ends, lengths = query_lengths.tolist(), key_lengths.tolist()
    need(len(ends) == len(lengths) > 0, f"{len(ends)} lengths of queries, {len(lengths)} of keys")
    _cumulative("actual_seq_lengths_query", ends, tokens)
    if keys is not None:
        _cumulative("actual_seq_lengths_key", lengths, keys)
        lengths = [b - a for a, b in zip([0, *lengths], lengths, strict=False)]
    need(min(lengths) >= 0, f"lengths of keys are {lengths}")
    starts = [0, *ends][:-1]
    return [Span(r, *at) for r, at in enumerate(zip(starts, ends, lengths, strict=True))]


def _cumulative(name: str, ends: list[int], total: int) -> None:
    rising = all(a <= b for a, b in zip([0, *ends], ends, strict=False))
    need(rising and ends[-1] == total, f"{name} are {ends}: no cumulative sums up to {total}")


def fetch(cache: Tensor, block_table: Tensor | None, requests: list[Span]) -> Fetch:
    """Reads rows of keys, [pages, page, 1, D] under a block table or [keys, 1, D] without one."""
    if block_table is None:
        first = [0]
        for span in requests:
            first.append(first[-1] + span.keys)
        return lambda request, at: cache[first[request] + at, 0]
    of("block_table", block_table, (torch.int32,), len(requests), None)
    pages, page = cache.shape[:2]
    need(page % 16 == 0 and page <= 1024, f"a page has {page} tokens: multiples of 16, to 1024")
    for span in (span for span in requests if span.end > span.start):
        used = -(-span.keys // page)
        need(
            used <= block_table.shape[1],
            f"{span.keys} keys, a block_table of {block_table.shape[1]}",
        )
        row = block_table[span.request, :used]
        need(bool(((row >= 0) & (row < pages)).all()), f"block_table names pages outside {pages}")
    table = block_table.long()

    def read(request: int, at: Tensor) -> Tensor:
        return cache[table[request, at // page], at % page, 0]

    return read


def _layouts(query: str, key: str, block_table: Tensor | None, mode: int, *limits: int) -> None:
    need(query == "TND", f"queries are {query}: only TND is emulated")
    need(key in ("PA_BSND", "TND"), f"keys are {key}: only PA_BSND and TND are emulated")
    need((block_table is not None) == (key == "PA_BSND"), "a block_table is for PA_BSND alone")
    need(mode in (0, 3), f"sparse_mode is {mode}, must be 0 or 3")
    need(all(limit == ALL for limit in limits), "pre_tokens and next_tokens must be their defaults")


# -- the indexer ----------------------------------------------------------------------------------

AT_ONCE = 64
"""Tokens whose scores exist at the same time."""

ELEMENTS = 1 << 23
"""Of keys, gathered for each token apart, that exist at the same time."""


def _indexer_heads(heads: int) -> None:
    if is_950():
        need(heads in (8, 16, 24, 32, 64), f"{heads} heads: 8, 16, 24, 32 or 64")
    else:
        need(1 <= heads <= 64, f"{heads} heads: at most 64")


def _selected(
    requests: list[Span], tokens: int, count: int, mode: int,
    scores: Callable[[slice, Span], Tensor],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Positions [tokens, 1, count] int32 with the best scores and the scores; valid ones first,
    then -1. In what order the valid ones stand is not documented: here the worst comes first.
    Nothing is said of tokens that see no key.

    scores  of some tokens with all keys of their request, [tokens, keys]
    """
    out = undefined(tokens, 1, count, dtype=torch.int32)
    values = undefined(tokens, 1, count, dtype=torch.float32)
    for span in (span for span in requests if span.keys):
        for start in range(span.start, span.end, AT_ONCE):
            some = slice(start, min(start + AT_ONCE, span.end))
            seen = torch.tensor([span.seen(t, mode) for t in range(some.start, some.stop)])[:, None]
            hidden = torch.arange(span.keys) >= seen
            best = scores(some, span).masked_fill(hidden, -torch.inf).topk(min(count, span.keys))
            place = torch.arange(count)
            from_last = seen.clamp(0, best.indices.shape[1]) - 1 - place
            valid = from_last >= 0
            at = from_last.clamp_min(0)
            found = torch.where(valid, best.indices.gather(1, at), -1).to(torch.int32)
            out[some, 0] = torch.where(seen > 0, found, out[some, 0])
            values[some, 0] = torch.where(valid, best.values.gather(1, at), values[some, 0])
    return out, values


def npu_lightning_indexer(
    query: Tensor, key: Tensor, weights: Tensor, actual_seq_lengths_query: Tensor | None,
    actual_seq_lengths_key: Tensor | None, block_table: Tensor | None, layout_query: str,
    layout_key: str, sparse_count: int, sparse_mode: int, pre_tokens: int, next_tokens: int,
    return_value: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The keys with the largest sum over heads of weight times relu(q . k)."""
    _layouts(layout_query, layout_key, block_table, sparse_mode, pre_tokens, next_tokens)
    of("query", query, HALVES, None, None, 128)
    tokens, heads = query.shape[:2]
    _key("key", key, (query.dtype,), block_table, 128)
    _indexer_heads(heads)
    wide = () if is_950() else (torch.float32,)
    of("weights", weights, (query.dtype, *wide), tokens, heads)
    dense(query=query, key=key, weights=weights)
    ranges = 1 <= sparse_count <= 2048 or sparse_count in range(3072, 8193, 1024)
    need(ranges, f"sparse_count is {sparse_count}")
    need(not (return_value and layout_key == "PA_BSND"), "return_value is not for pages")
    requests = spans(tokens, actual_seq_lengths_query, actual_seq_lengths_key, _flat(key))
    read = fetch(key, block_table, requests)

    def scores(some: slice, span: Span) -> Tensor:
        keys = read(span.request, torch.arange(span.keys)).float()
        products = torch.relu(query[some].float() @ keys.T)
        return (weights[some].float()[:, None] @ products)[:, 0]

    out, values = _selected(requests, tokens, sparse_count, sparse_mode, scores)
    return out, values.to(query.dtype) if return_value else query.new_empty(0)


def npu_quant_lightning_indexer(
    query: Tensor, key: Tensor, weights: Tensor, query_dequant_scale: Tensor,
    key_dequant_scale: Tensor, query_quant_mode: int, key_quant_mode: int,
    actual_seq_lengths_query: Tensor | None, actual_seq_lengths_key: Tensor | None,
    block_table: Tensor | None, layout_query: str, layout_key: str, sparse_count: int,
    sparse_mode: int, pre_tokens: int, next_tokens: int,
) -> Tensor:  # fmt: skip
    """As above, of codes; a head's weight and its query's scale are multiplied in fp16, in whose
    range the product has to be."""
    _layouts(layout_query, layout_key, block_table, sparse_mode, pre_tokens, next_tokens)
    need(layout_key == "PA_BSND", "quantised keys that lie flat are not emulated")
    need(query_quant_mode == 0 and key_quant_mode == 0, "quant modes must be 0")
    codes = (torch.int8, torch.float8_e4m3fn) if is_950() else (torch.int8,)
    of("query", query, codes, None, None, 128)
    tokens, heads = query.shape[:2]
    _key("key", key, (query.dtype,), block_table, 128)
    _indexer_heads(heads)
    kinds = [(torch.float16, torch.float16)]
    if query.dtype == torch.float8_e4m3fn:
        kinds.append((torch.bfloat16, torch.float32))
    need((weights.dtype, query_dequant_scale.dtype) in kinds, f"weights are {weights.dtype}")
    of("weights", weights, (weights.dtype,), tokens, heads)
    of("query_dequant_scale", query_dequant_scale, (query_dequant_scale.dtype,), tokens, heads)
    of("key_dequant_scale", key_dequant_scale, (query_dequant_scale.dtype,), *key.shape[:3])
    dense(query=query, key=key, weights=weights, query_dequant_scale=query_dequant_scale,
          key_dequant_scale=key_dequant_scale)  # fmt: skip
    need(1 <= sparse_count <= 2048, f"sparse_count is {sparse_count}")
    requests = spans(tokens, actual_seq_lengths_query, actual_seq_lengths_key, None)
    read = fetch(key, block_table, requests)
    read_scale = fetch(key_dequant_scale[..., None], block_table, requests)
    folded = (weights.float() * query_dequant_scale.float()).to(torch.float16)
    need(bool(folded.isfinite().all()), "weights times query scales leave fp16's range")

    def scores(some: slice, span: Span) -> Tensor:
        every = torch.arange(span.keys)
        keys = read(span.request, every).float()
        products = torch.relu(query[some].float() @ keys.T)
        summed = (folded[some].float()[:, None] @ products)[:, 0]
        return summed * read_scale(span.request, every)[:, 0].float()

    return _selected(requests, tokens, sparse_count, sparse_mode, scores)[0]


# -- attention ------------------------------------------------------------------------------------


def _key(
    name: str, key: Tensor, dtypes: tuple[torch.dtype, ...], block_table: Tensor | None, dim: int
) -> None:
    lead = (None,) if block_table is None else (None, None)
    of(name, key, dtypes, *lead, 1, dim)


def _flat(key: Tensor) -> int | None:
    """How many keys lie flat in all; None for pages."""
    return key.shape[0] if key.dim() == 3 else None


def _attention_heads(heads: int, allowed: tuple[int, ...]) -> None:
    need(heads in allowed, f"{heads} heads: one of {allowed}")


POWERS = (1, 2, 4, 8, 16, 32, 64, 128)


def _attended(
    query: Tensor, sparse_indices: Tensor, scale: float, requests: list[Span], mode: int,
    read: Callable[[int, Tensor], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(out [tokens, heads, 512] fp32, maximum and sum of the softmax [tokens, heads]) over the
    positions that each token names and sees; nothing is said of tokens without any. The weights of
    the values are rounded to the query's dtype, their sum is not.

    read  (request, positions [...]) -> keys [..., 576], values [..., 512]
    """
    tokens, heads, width = query.shape
    indices = sparse_indices[:, 0].long()
    valid = indices >= 0
    need(not bool((valid[:, 1:] & ~valid[:, :-1]).any()), "valid sparse_indices must come first")
    out = undefined(tokens, heads, 512, dtype=torch.float32)
    top, total = (undefined(tokens, heads, dtype=torch.float32) for _ in range(2))
    at_once = max(1, ELEMENTS // (indices.shape[1] * width))
    for span in (span for span in requests if span.end > span.start):
        most = int(indices[span.start : span.end].max())
        need(most < span.keys, f"sparse_indices name position {most} of {span.keys} keys")
        for start in range(span.start, span.end, at_once):
            some = slice(start, min(start + at_once, span.end))
            seen = torch.tensor([span.seen(t, mode) for t in range(some.start, some.stop)])[:, None]
            used = (valid[some] & (indices[some] < seen))[:, None]
            anything = used.any(-1)
            if not bool(anything.any()):
                continue
            own = torch.where(used[:, 0], indices[some], -1)  # what is not used, is read nowhere
            at = torch.where(own < 0, own.amax(-1, keepdim=True).clamp_min(0), own)
            keys, values = read(span.request, at)
            scores = query[some].float() @ keys.float().mT * scale
            scores = scores.masked_fill(~used, -torch.inf)
            largest = scores.amax(-1, keepdim=True)
            weights = torch.exp(scores - largest).masked_fill(~used, 0)
            summed = weights.sum(-1, keepdim=True)
            mixed = weights.to(query.dtype).float() @ values.float()
            found = (mixed / summed, largest[..., 0], summed[..., 0])
            for result, part in zip((out, top, total), found, strict=True):
                blank = anything if part.dim() == 2 else anything[..., None]
                result[some] = torch.where(blank, part, torch.nan)
    return out, top, total


def _pattern(
    attention_mode: int, sparse_block_size: int, sparse_indices: Tensor, q: Tensor
) -> None:
    need(attention_mode == 2, f"attention_mode is {attention_mode}, must be 2")
    need(sparse_block_size == 1, "blocks of several tokens are not emulated")
    of("sparse_indices", sparse_indices, (torch.int32,), q.shape[0], 1, None)
    dense(sparse_indices=sparse_indices)


def npu_sparse_flash_attention(
    query: Tensor, key: Tensor, value: Tensor | None, sparse_indices: Tensor, scale_value: float,
    block_table: Tensor | None, actual_seq_lengths_query: Tensor | None,
    actual_seq_lengths_kv: Tensor | None, query_rope: Tensor | None, key_rope: Tensor | None,
    sparse_block_size: int, layout_query: str, layout_kv: str, sparse_mode: int, pre_tokens: int,
    next_tokens: int, attention_mode: int, return_softmax_lse: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Attention over the positions named, of absorbed queries; the maximum and the sum of the
    softmax [1, tokens, heads] where they are asked for."""
    _layouts(layout_query, layout_kv, block_table, sparse_mode, pre_tokens, next_tokens)
    of("query", query, HALVES, None, None, 512)
    tokens, heads, _ = query.shape
    _attention_heads(heads, tuple(range(1, 129)) if is_950() else POWERS)
    _key("key", key, (query.dtype,), block_table, 512)
    of("query_rope", query_rope, (query.dtype,), tokens, heads, 64)
    assert query_rope is not None and key_rope is not None and value is not None
    of("key_rope", key_rope, (query.dtype,), *key.shape[:-1], 64)
    need((value.data_ptr(), value.shape) == (key.data_ptr(), key.shape), "value must be key itself")
    dense(query=query, query_rope=query_rope, key=key, key_rope=key_rope)
    _pattern(attention_mode, sparse_block_size, sparse_indices, query)
    need(not (return_softmax_lse and layout_kv == "PA_BSND"), "no softmax_lse of pages")
    requests = spans(tokens, actual_seq_lengths_query, actual_seq_lengths_kv, _flat(key))
    latent, rope = (fetch(t, block_table, requests) for t in (key, key_rope))

    def read(request: int, at: Tensor) -> tuple[Tensor, Tensor]:
        found = latent(request, at)
        return torch.cat([found, rope(request, at)], -1), found

    out, top, total = _attended(
        torch.cat([query, query_rope], -1), sparse_indices, scale_value, requests, sparse_mode, read
    )
    lse = (top[None], total[None]) if return_softmax_lse else (torch.empty(0), torch.empty(0))
    return out.to(query.dtype), *lse


def npu_kv_quant_sparse_flash_attention(
    query: Tensor, key: Tensor, value: Tensor, sparse_indices: Tensor, scale_value: float,
    key_quant_mode: int, value_quant_mode: int, block_table: Tensor | None,
    actual_seq_lengths_query: Tensor | None, actual_seq_lengths_kv: Tensor | None,
    sparse_block_size: int, layout_query: str, layout_kv: str, sparse_mode: int, pre_tokens: int,
    next_tokens: int, attention_mode: int, quant_scale_repo_mode: int, tile_size: int,
    rope_head_dim: int,
) -> Tensor:  # fmt: skip
    """As above, of records of 656 bytes: 512 codes, 64 rotated numbers of the query's dtype, and 4
    scales. Codes times scales are rounded to the query's dtype."""
    _layouts(layout_query, layout_kv, block_table, sparse_mode, pre_tokens, next_tokens)
    need(layout_kv == "PA_BSND", "quantised keys that lie flat are not emulated")
    of("query", query, HALVES, None, None, 576)
    tokens, heads, _ = query.shape
    _attention_heads(heads, (*POWERS, 48) if is_950() else POWERS)
    codes = (torch.int8, torch.float8_e4m3fn) if is_950() else (torch.int8,)
    _key("key", key, codes, block_table, 656)
    need((value.data_ptr(), value.shape) == (key.data_ptr(), key.shape), "value must be key itself")
    dense(query=query, key=key)
    need(key_quant_mode == value_quant_mode == 2, "quant modes must be 2")
    modes = (quant_scale_repo_mode, tile_size, rope_head_dim)
    need(modes == (1, 128, 64), f"repo mode, tile and rope are {modes}, must be (1, 128, 64)")
    _pattern(attention_mode, sparse_block_size, sparse_indices, query)
    requests = spans(tokens, actual_seq_lengths_query, actual_seq_lengths_kv, None)
    record = fetch(key, block_table, requests)

    def read(request: int, at: Tensor) -> tuple[Tensor, Tensor]:
        codes, rope, scales = record(request, at).split([512, 128, 16], -1)
        latent = codes.unflatten(-1, (4, 128)).float()
        scaled = latent * scales.contiguous().view(torch.float32)[..., None]
        values, rope = scaled.flatten(-2).to(query.dtype), rope.contiguous().view(query.dtype)
        return torch.cat([values, rope], -1), values

    out = _attended(query, sparse_indices, scale_value, requests, sparse_mode, read)[0]
    return out.to(query.dtype)
