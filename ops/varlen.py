"""The indexer's selection and sparse attention for requests of any length in one call, over the
pages of all: what prefills and decodes are alike to.

Tokens of all requests lie flat, request after request. Request r has the tokens cu_seqlens_q[r] to
cu_seqlens_q[r + 1], the last ones of its context, and context_lens[r] keys, its new ones included;
both may be 0. New token i of n sees the first context_lens[r] - n + i + 1 positions.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dsa_hal.case import Cost, Inputs, Maker, case
from dsa_hal.check import calc_diff, each
from dsa_hal.ops._attention import FLOATS, KEY_SCALE, SOFTMAX_SCALE, attended, pool, selections
from dsa_hal.ops._contract import shaped, typed
from dsa_hal.ops.absorbed import mla_attention
from dsa_hal.ops.index_select import indexer_topk_paged, judged
from dsa_hal.ops.indexer import coded, indexer_logits_paged
from dsa_hal.ops.layout import KVLayout
from dsa_hal.ops.quant import blocks
from dsa_hal.ops.select import ties_request, to_slots
from dsa_hal.registry import Call, composite

VARLEN = "varlen=native"
"""What an implementation promises that reads the pages of all requests in one call, where the body
looks up the request of each token. A model uses these ops where both are served so."""


def requests_of(cu_seqlens_q: Tensor, tokens: int) -> Tensor:
    """The request of each of `tokens` tokens, int64 [tokens]; nothing waits for the host."""
    token = torch.arange(tokens, dtype=torch.int32, device=cu_seqlens_q.device)
    return torch.searchsorted(cu_seqlens_q[1:].contiguous(), token, right=True)


def limits_of(cu_seqlens_q: Tensor, context_lens: Tensor, request: Tensor) -> Tensor:
    """How many positions each token sees, int32 [tokens]; `request` from `requests_of`."""
    token = torch.arange(request.shape[0], dtype=torch.int32, device=request.device)
    return context_lens[request] - cu_seqlens_q[1:][request] + token + 1


# -- what both ops' cases and checks share --------------------------------------------------------


def _lengths(
    make: Maker, requests: int, tokens: int, context: int, pattern: str
) -> tuple[list[int], list[int]]:
    """New tokens and keys of each request, the former `tokens` in all and the latter at most
    `context`.

    pattern  "even": as equal as can be, and whole contexts; "ragged": any, and every fourth request
             without new tokens; "fresh": as ragged, and no keys but those of the new tokens
    """
    if pattern == "even":
        new = [tokens // requests + (r < tokens % requests) for r in range(requests)]
        return new, [context] * requests
    new = [0] * requests
    working = [r for r in range(requests) if r % 4 != 2] if tokens else []
    for place, r in enumerate(working):
        rest, after = tokens - sum(new), len(working) - place - 1
        least, most = max(0, rest - after * context), min(rest, context)
        new[r] = make.pick.randint(least, most) if after else rest
    return new, new if pattern == "fresh" else [make.pick.randint(n, context) for n in new]


def _starts(new: list[int]) -> list[int]:
    return [sum(new[:r]) for r in range(len(new) + 1)]


def _tables(make: Maker, keys: list[int], context: int, page_size: int) -> tuple[Tensor, int]:
    """A block table with a page number everywhere, also where no key is, and the pool's pages: more
    than the table names."""
    each, spare = blocks(context, page_size), 3
    table = make.permutation(len(keys) * each + spare)[: len(keys) * each]
    return table.view(len(keys), each), len(keys) * each + spare


def _visible(new: list[int], keys: list[int]) -> list[int]:
    return [k - n + i + 1 for n, k in zip(new, keys, strict=True) for i in range(n)]


def _misplaced(
    tokens: int, cu_seqlens_q: Tensor, context_lens: Tensor, block_table: Tensor
) -> str | None:
    if wrong := typed(
        torch.int32, cu_seqlens_q=cu_seqlens_q, context_lens=context_lens, block_table=block_table
    ) or shaped("context_lens", context_lens, "requests"):
        return wrong
    requests = context_lens.shape[0]
    if tokens and not requests:
        return f"there are {tokens} tokens and no requests"
    return shaped("cu_seqlens_q", cu_seqlens_q, requests + 1) or shaped(
        "block_table", block_table, requests, "max_pages"
    )


def _without_keys(
    cu_seqlens_q: Tensor, context_lens: Tensor, block_table: Tensor, page_size: int
) -> Tensor:
    """Entries of `block_table` that hold no key of a request with new tokens."""
    page = torch.arange(block_table.shape[1], device=block_table.device)
    reach = context_lens * (cu_seqlens_q.diff() > 0)
    return page * page_size >= reach[:, None]


# -- indexer_topk_varlen --------------------------------------------------------------------------


def _topk_inputs(
    make: Maker, *, requests: int, tokens: int, context: int, topk: int, heads: int = 64,
    dim: int = 128, kind: str = "fp8", page_size: int = 64, pattern: str = "ragged",
    values: str = "plain", ties: str = "any", logits_mb: int = 64,
) -> Inputs:  # fmt: skip
    layout = KVLayout.parse(f"index_{kind}/{dim}")
    new, keys = _lengths(make, requests, tokens, context, pattern)
    table, count = _tables(make, keys, context, page_size)
    q, stored = make.randn(tokens, heads, dim), make.randn(count, page_size, dim)
    if values == "plateau":  # most rows point away from every key
        q, stored = -q.abs(), stored.abs()
        q[::3] *= -1
    pages = layout.empty(count, page_size, make.device)
    for name, part in layout.encode(stored).items():
        layout.views(pages)[name].copy_(part)
    return dict(
        q=coded(q, layout.parts[0].dtype), pages=pages,
        weights=make.randn(tokens, heads, scale=0.02), cu_seqlens_q=make.tensor(_starts(new)),
        context_lens=make.tensor(keys), block_table=table, topk=topk, layout=layout.spec,
        max_context_len=context, ties=ties, logits_mb=logits_mb,
    )  # fmt: skip


def _topk_cost(
    q: Tensor, pages: Tensor, weights: Tensor, cu_seqlens_q: Tensor, context_lens: Tensor,
    block_table: Tensor, topk: int, *, layout: str, max_context_len: int, ties: str = "any",
    logits_mb: int = 64,
) -> Cost:  # fmt: skip
    tokens, heads, dim = q.shape
    if q.is_meta:
        pairs, keys = float(tokens * max_context_len), float(len(context_lens) * max_context_len)
    else:
        request = requests_of(cu_seqlens_q, tokens)
        pairs = float(limits_of(cu_seqlens_q, context_lens, request).clamp_min(0).double().sum())
        keys = float((context_lens * (cu_seqlens_q.diff() > 0)).double().sum())
    read = q.numel() * q.element_size() + keys * KVLayout.parse(layout).token_bytes
    ints = weights.numel() + block_table.numel() + tokens * topk
    return Cost(2.0 * pairs * heads * dim, read + 4.0 * ints)


def _topk_invalid(
    q: Tensor, pages: Tensor, weights: Tensor, cu_seqlens_q: Tensor, context_lens: Tensor,
    block_table: Tensor, topk: int, *, layout: str, max_context_len: int, ties: str = "any",
    logits_mb: int = 64,
) -> str | None:  # fmt: skip
    if wrong := shaped("q", q, "tokens", "heads", "dim") or _misplaced(
        q.shape[0], cu_seqlens_q, context_lens, block_table
    ):
        return wrong
    limits = context_lens.new_empty(q.shape[0], 1)
    return indexer_topk_paged.invalid(
        q[:, None], pages, weights, limits, block_table[:1].expand(q.shape[0], -1), topk,
        layout=layout, max_context_len=max_context_len, ties=ties, logits_mb=logits_mb,
    )  # fmt: skip


def _topk_requests(
    q: Tensor, pages: Tensor, weights: Tensor, cu_seqlens_q: Tensor, context_lens: Tensor,
    block_table: Tensor, topk: int, *, layout: str, max_context_len: int, ties: str = "any",
    logits_mb: int = 64,
) -> frozenset[str]:  # fmt: skip
    return ties_request(ties)


def _topk_unread(
    q: Tensor, pages: Tensor, weights: Tensor, cu_seqlens_q: Tensor, context_lens: Tensor,
    block_table: Tensor, topk: int, *, layout: str, max_context_len: int, ties: str = "any",
    logits_mb: int = 64,
) -> dict[str, Tensor]:  # fmt: skip
    page_size, width = pages.shape[1], block_table.shape[1]
    reach = context_lens * (cu_seqlens_q.diff() > 0)
    position = torch.arange(width * page_size, dtype=torch.int32, device=q.device)
    seen = torch.where(position < reach[:, None], position, -1)
    slots = to_slots.reference(seen, block_table, page_size=page_size)
    read = torch.zeros(pages.shape[0] * page_size, dtype=torch.bool, device=q.device)
    read[slots[slots >= 0].long()] = True
    return {
        "pages": ~KVLayout.parse(layout).mask(pages, read.view(-1, page_size)),
        "block_table": _without_keys(cu_seqlens_q, context_lens, block_table, page_size),
    }


def _per_token(
    q: Tensor, pages: Tensor, weights: Tensor, cu_seqlens_q: Tensor, context_lens: Tensor,
    block_table: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The tensors that `indexer_topk_paged` takes, each token as a request of its own."""
    request = requests_of(cu_seqlens_q, q.shape[0])
    limits = limits_of(cu_seqlens_q, context_lens, request)
    return q[:, None], pages, weights, limits[:, None], block_table[request]


def _topk_asks(
    q: Tensor, pages: Tensor, weights: Tensor, cu_seqlens_q: Tensor, context_lens: Tensor,
    block_table: Tensor, topk: int, *, layout: str, max_context_len: int, ties: str = "any",
    logits_mb: int = 64,
) -> Sequence[Call]:  # fmt: skip
    tokens, width = q.shape[0], block_table.shape[1]
    limits, table = (torch.empty(tokens, n, dtype=torch.int32, device="meta") for n in (1, width))
    options: dict[str, Any] = dict(
        layout=layout, max_context_len=max_context_len, ties=ties, logits_mb=logits_mb
    )
    return [(indexer_topk_paged, (q[:, None], pages, weights, limits, table, topk), options)]


def _scores(inputs: Inputs) -> Tensor:
    """The reference's scores of every token, [tokens, max_context_len]."""
    names = ("q", "pages", "weights", "cu_seqlens_q", "context_lens", "block_table")
    return indexer_logits_paged.reference(
        *_per_token(*(inputs[name] for name in names)),
        layout=inputs["layout"], max_context_len=inputs["max_context_len"],
    )  # fmt: skip


@composite(
    uses=(indexer_topk_paged,),
    asks=_topk_asks,
    version=1,
    constant=("heads", "dim", "topk", "ties", "kind", "page_size", "pattern", "values",
              "logits_mb"),
    variable={"requests": "context_lens[0]", "tokens": "q[0]", "context": "max_context_len"},
    inputs=_topk_inputs,
    cases=(
        case("no_requests", requests=0, tokens=0, context=64, topk=16),
        case("no_tokens", requests=3, tokens=0, context=64, topk=16),
        case("one", requests=1, tokens=1, context=1, heads=8, dim=64, topk=64),
        case("ragged", requests=5, tokens=37, context=200, topk=64, traps=(10, 13, 15, 21)),
        case("k_more", requests=3, tokens=9, context=65, heads=32, topk=192, traps=(13,)),
        case("fresh", requests=3, tokens=70, context=90, heads=8, topk=40, pattern="fresh"),
        case("page3", requests=3, tokens=11, context=63, heads=8, page_size=3, topk=7,
             kind="bf16"),
        case("page16", requests=4, tokens=20, context=100, heads=32, page_size=16, topk=33,
             kind="int8"),
        case("page128", requests=3, tokens=17, context=300, page_size=128, topk=128,
             kind="int8_split", traps=(10, 11)),
        case("bf16_128", requests=5, tokens=23, context=260, page_size=128, topk=128, kind="bf16",
             traps=(11,)),
        case("fp32", requests=2, tokens=9, context=129, heads=8, dim=64, kind="fp32", topk=16,
             page_size=16),
        case("plateau_lower", requests=3, tokens=10, context=300, topk=64, values="plateau",
             ties="lower", traps=(14,)),
        case("chunks", requests=4, tokens=20, context=40000, heads=8, dim=64, topk=64,
             logits_mb=1),
        *(
            case(f"{name}{suffix}", model=True, requests=requests, tokens=tokens, context=context,
                 topk=2048, kind=kind, page_size=page_size, pattern="even", logits_mb=256)
            for suffix, kind, page_size in (("", "fp8", 64), ("_bf16_128", "bf16", 128),
                                            ("_int8_128", "int8_split", 128))
            for name, requests, tokens, context in (
                ("decode_32k", 64, 64, 32768), ("mtp_32k", 64, 128, 32768),
                ("prefill_8k", 4, 2048, 8192),
            )
        ),
        case("mixed_32k", model=True, requests=16, tokens=2048, context=32768, topk=2048,
             logits_mb=256),
    ),
    check=judged(_scores),
    cost=_topk_cost,
    invalid=_topk_invalid,
    requests=_topk_requests,
    unread=_topk_unread,
)  # fmt: skip
def indexer_topk_varlen(
    q: Tensor, pages: Tensor, weights: Tensor, cu_seqlens_q: Tensor, context_lens: Tensor,
    block_table: Tensor, topk: int, *, layout: str, max_context_len: int, ties: str = "any",
    logits_mb: int = 64,
) -> Tensor:  # fmt: skip
    """The positions that each token attends to: the best `topk` of those that it sees, by the
    scores of `indexer_logits_paged`.

    q             [tokens, heads, dim] of the stored keys' dtype, without its scale
    pages         [pages, page_size, record], index keys as KVLayout says of `layout`
    weights       [tokens, heads] fp32, signed, with q's scale and the constants in it
    cu_seqlens_q  [requests + 1] int32, 0 first and `tokens` last: where each request's tokens begin
    context_lens  [requests] int32, its keys, the new tokens' own included; not below their number
    block_table   [requests, max_pages] int32; only entries that hold keys of requests with tokens
                  are read
    topk          1 to 4096
    max_context_len  no context_lens is larger
    ties          as in `topk`
    logits_mb     MiB of scores that may exist at a time; one token's are always allowed
    -> out        [tokens, topk] int32 positions in the token's request in any order, then -1. They
                  are no slots: `mla_attention_varlen` takes them as they are

    Source: the lightning indexer of torch_npu (`npu_lightning_indexer`, TND queries over PA_BSND
    keys, sparse_mode 3), which returns positions and no scores.
    """
    rows = _per_token(q, pages, weights, cu_seqlens_q, context_lens, block_table)
    return indexer_topk_paged(
        *rows, topk, layout=layout, max_context_len=max_context_len, ties=ties, logits_mb=logits_mb
    )


# -- mla_attention_varlen -------------------------------------------------------------------------


def _keys_first(positions: Tensor) -> Tensor:
    order = (positions < 0).to(torch.int8).sort(dim=-1, stable=True).indices
    return positions.gather(1, order)


def _mla_inputs(
    make: Maker, *, requests: int, tokens: int, context: int, heads: int, k: int, nope: int = 128,
    rope: int = 64, v: int = 128, lora: int = 512, form: str = "latent_bf16", page_size: int = 64,
    dtype: str = "bf16", pattern: str = "ragged", chosen: str = "shuffled",
) -> Inputs:  # fmt: skip
    layout = f"{form}/{lora}+{rope}"
    new, keys = _lengths(make, requests, tokens, context, pattern)
    table, count = _tables(make, keys, context, page_size)
    return dict(
        # absorbed queries get deviation 7, as the rotated part has: scores then spread by about 2
        q=make.randn(tokens, heads, nope + rope, dtype=FLOATS[dtype], scale=0.7 / KEY_SCALE),
        kv_b=make.randn(heads, nope + v, lora, dtype=FLOATS[dtype], scale=nope**-0.5),
        pages=pool(make, layout, count, page_size),
        positions=_keys_first(selections(make, _visible(new, keys), k, chosen)),
        cu_seqlens_q=make.tensor(_starts(new)), context_lens=make.tensor(keys), block_table=table,
        softmax_scale=SOFTMAX_SCALE, layout=layout,
    )  # fmt: skip


def _mla_cost(
    q: Tensor, kv_b: Tensor, pages: Tensor, positions: Tensor, cu_seqlens_q: Tensor,
    context_lens: Tensor, block_table: Tensor, *, softmax_scale: float, layout: str,
) -> Cost:  # fmt: skip
    rows, heads, dim = q.shape
    lora, form = kv_b.shape[2], KVLayout.parse(layout)
    rope = form.width - lora
    nope = dim - rope
    v, pairs = kv_b.shape[1] - nope, attended(positions, None)
    flop = 2.0 * heads * (rows * lora * (nope + v) + pairs * (2 * lora + rope))
    moved = rows * heads * (dim + v) * q.element_size() + kv_b.numel() * kv_b.element_size()
    keys = form.token_bytes * min(pairs, pages.shape[0] * pages.shape[1])
    return Cost(flop, moved + keys + 4 * (positions.numel() + block_table.numel()))


def _mla_invalid(
    q: Tensor, kv_b: Tensor, pages: Tensor, positions: Tensor, cu_seqlens_q: Tensor,
    context_lens: Tensor, block_table: Tensor, *, softmax_scale: float, layout: str,
) -> str | None:  # fmt: skip
    if not layout:
        return "layout is empty; expected that of pages, as in latent_bf16/512+64"
    if wrong := mla_attention.invalid(
        q, kv_b, pages, positions, softmax_scale=softmax_scale, layout=layout
    ):
        return wrong.replace("indices are", "positions are")
    return _misplaced(q.shape[0], cu_seqlens_q, context_lens, block_table)


def _mla_unread(
    q: Tensor, kv_b: Tensor, pages: Tensor, positions: Tensor, cu_seqlens_q: Tensor,
    context_lens: Tensor, block_table: Tensor, *, softmax_scale: float, layout: str,
) -> dict[str, Tensor]:  # fmt: skip
    page_size = pages.shape[1]
    row, column = (positions >= 0).nonzero(as_tuple=True)
    request = requests_of(cu_seqlens_q, q.shape[0])[row]
    position = positions[row, column].long()
    read = torch.zeros(pages.shape[:2], dtype=torch.bool, device=pages.device)
    read[block_table[request, position // page_size].long(), position % page_size] = True
    return {
        "pages": ~KVLayout.parse(layout).mask(pages, read),
        "block_table": _without_keys(cu_seqlens_q, context_lens, block_table, page_size),
    }


def _mla_asks(
    q: Tensor, kv_b: Tensor, pages: Tensor, positions: Tensor, cu_seqlens_q: Tensor,
    context_lens: Tensor, block_table: Tensor, *, softmax_scale: float, layout: str,
) -> Sequence[Call]:  # fmt: skip
    options: dict[str, Any] = dict(softmax_scale=softmax_scale, layout=layout)
    return [(mla_attention, (q, kv_b, pages, positions), options)]


_SMALL: dict[str, Any] = dict(nope=12, rope=8, v=10, lora=32)


@composite(
    uses=(to_slots, mla_attention),
    asks=_mla_asks,
    version=1,
    constant=("heads", "k", "nope", "rope", "v", "lora", "form", "page_size", "dtype", "pattern",
              "chosen"),
    variable={"requests": "context_lens[0]", "tokens": "q[0]", "context": "pages[0]"},
    inputs=_mla_inputs,
    cases=(
        case("no_requests", requests=0, tokens=0, context=64, heads=2, k=16, **_SMALL),
        case("no_tokens", requests=2, tokens=0, context=64, heads=2, k=16, **_SMALL),
        case("one", requests=1, tokens=1, context=1, heads=1, k=1, **_SMALL),
        case("ragged", requests=5, tokens=19, context=90, heads=3, k=21, dtype="fp32",
             form="latent_fp32", page_size=16, traps=(11, 13), **_SMALL),
        case("k_more", requests=3, tokens=9, context=20, heads=3, k=64, page_size=3,
             traps=(13,), **_SMALL),
        case("fresh", requests=3, tokens=40, context=60, heads=2, k=16, pattern="fresh", **_SMALL),
        case("split", requests=3, tokens=9, context=300, heads=8, k=64, page_size=128,
             form="latent_bf16_split", traps=(5, 10, 11)),
        case("int8", requests=3, tokens=9, context=300, heads=8, k=64, page_size=128,
             form="latent_int8", traps=(10, 11)),
        case("fp8", requests=3, tokens=9, context=300, heads=8, k=64, form="latent_fp8"),
        case("no_key", requests=3, tokens=9, context=90, heads=8, k=64, chosen="alternate",
             form="latent_bf16_split", page_size=128),
        *(
            case(f"{name}{suffix}", model=True, requests=requests, tokens=tokens, context=context,
                 heads=128, k=2048, form=form, page_size=page_size, pattern="even")
            for suffix, form, page_size in (("", "latent_fp8", 64),
                                            ("_bf16_128", "latent_bf16_split", 128),
                                            ("_int8_128", "latent_int8", 128))
            for name, requests, tokens, context in (
                ("decode_b64", 64, 64, 32768), ("prefill_8k", 4, 2048, 8192),
            )
        ),
    ),
    check=each(out=calc_diff(2e-5)),
    cost=_mla_cost,
    invalid=_mla_invalid,
    unread=_mla_unread,
)  # fmt: skip
def mla_attention_varlen(
    q: Tensor, kv_b: Tensor, pages: Tensor, positions: Tensor, cu_seqlens_q: Tensor,
    context_lens: Tensor, block_table: Tensor, *, softmax_scale: float, layout: str,
) -> Tensor:  # fmt: skip
    """`mla_attention` over the pages of all requests, by positions.

    q             [tokens, heads, nope + rope] bf16, fp16 or fp32, rotated part last
    kv_b          [heads, nope + v, lora] any float: expands a latent to a head's key, then value
    pages         [pages, page_size, record] latents in `layout`
    positions     [tokens, k] int32 positions in the token's own request, each among those that it
                  sees, in any order; behind them -1 = no key. Slots are an error that shapes do not
                  show
    cu_seqlens_q  [requests + 1] int32, context_lens [requests] int32, block_table [requests,
                  max_pages] int32: as in `indexer_topk_varlen`
    softmax_scale  multiplies q . k; no default, see SOFTMAX_SCALE
    -> out        [tokens, heads, v] q's dtype; 0 for a token without keys

    Source: torch_npu's `npu_sparse_flash_attention` (TND queries over PA_BSND keys) between the
    projections of the model's demo code.
    """
    request = requests_of(cu_seqlens_q, q.shape[0])
    slots = to_slots(positions, block_table[request], page_size=pages.shape[1])
    return mla_attention(q, kv_b, pages, slots, softmax_scale=softmax_scale, layout=layout)
