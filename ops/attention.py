"""Attention over selected keys in the absorbed form: all heads share one key per token, and a key's
first `dim_v` columns are its value. Keys are rows of one array while a prompt is read, and records
in pages while text is written."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dsa_hal.case import Cost, Inputs, Maker, case
from dsa_hal.check import close, each
from dsa_hal.ops._attention import (
    FLOATS,
    KEY_SCALE,
    SOFTMAX_SCALE,
    attended,
    chosen_of,
    cut_short,
    misshapen,
    placed,
    pool,
    queries,
    selections,
    sinks,
    softmax_attention,
    sunk,
    unselected,
)
from dsa_hal.ops.layout import KVLayout, misfit
from dsa_hal.ops.schedule import plan
from dsa_hal.registry import op

# -- sparse_mla ---------------------------------------------------------------------------------


def _sparse_inputs(
    make: Maker, *, tokens: int, context: int, heads: int, k: int, dim: int = 576, dim_v: int = 512,
    dtype: str = "bf16", pattern: str = "shuffled", causal: bool = True, sink: bool = False,
    short: bool = False, spread: float = 2.0, softmax_scale: float = SOFTMAX_SCALE,
) -> Inputs:  # fmt: skip
    visible = [max(0, context - tokens + 1 + t) if causal else context for t in range(tokens)]
    indices = selections(make, visible, k, pattern)
    lengths = None
    if short:
        lengths, indices = cut_short(make, indices)
    kind, scale = FLOATS[dtype], softmax_scale
    return dict(
        q=queries(make, tokens, heads, dim, dtype=kind, softmax_scale=scale, spread=spread),
        kv=make.randn(context, dim, dtype=kind, scale=KEY_SCALE),
        indices=indices,
        softmax_scale=scale,
        dim_v=dim_v,
        attn_sink=sinks(make, heads) if sink else None,
        topk_length=lengths,
    )


def _sparse_cost(
    q: Tensor, kv: Tensor, indices: Tensor, *, softmax_scale: float, dim_v: int = 512,
    attn_sink: Tensor | None = None, topk_length: Tensor | None = None,
) -> Cost:  # fmt: skip
    pairs = attended(indices, topk_length)
    rows, heads, dim = q.shape
    moved = rows * heads * (dim + dim_v) * q.element_size() + 4 * indices.numel()
    keys = min(pairs, kv.shape[0]) * dim * kv.element_size()
    return Cost(2.0 * heads * pairs * (dim + dim_v), moved + keys + 8 * rows * heads)


def _sparse_invalid(
    q: Tensor, kv: Tensor, indices: Tensor, *, softmax_scale: float, dim_v: int = 512,
    attn_sink: Tensor | None = None, topk_length: Tensor | None = None,
) -> str | None:  # fmt: skip
    if q.dim() != 3 or kv.dim() != 2:
        return (
            f"q has shape {list(q.shape)}, kv {list(kv.shape)};"
            " expected [tokens, heads, dim] and [context, dim]"
        )
    if kv.dtype != q.dtype:
        return f"q is {q.dtype} and kv is {kv.dtype}; expected one dtype"
    dim = kv.shape[1]
    return misshapen(q, indices, dim, dim_v, softmax_scale, attn_sink, topk_length)


def _sparse_unread(
    q: Tensor, kv: Tensor, indices: Tensor, *, softmax_scale: float, dim_v: int = 512,
    attn_sink: Tensor | None = None, topk_length: Tensor | None = None,
) -> Mapping[str, Tensor]:  # fmt: skip
    return {"kv": unselected(indices, topk_length, kv.shape[0])}


_SMALL: dict[str, Any] = dict(dim=40, dim_v=32)


@op(
    version=1,
    constant=("heads", "k", "dim", "dim_v", "dtype", "pattern", "causal", "sink", "short",
              "spread", "softmax_scale"),
    variable={"tokens": "q[0]", "context": "kv[0]"},
    inputs=_sparse_inputs,
    cases=(
        case("empty", tokens=0, context=64, heads=8, k=64, **_SMALL),
        case("no_context", tokens=3, context=0, heads=2, k=5, causal=False, **_SMALL),
        case("one", tokens=1, context=1, heads=1, k=1, **_SMALL),
        case("one_full", tokens=1, context=300, heads=8, k=256, traps=(5,)),
        case("small", tokens=67, context=90, heads=3, k=21, dtype="fp32", **_SMALL),
        case("fp16", tokens=5, context=90, heads=8, k=64, dtype="fp16"),
        case("fp32", tokens=5, context=400, heads=16, k=200, dtype="fp32", causal=False),
        case("chunks", tokens=70, context=500, heads=8, k=256, pattern="ascending"),
        case("start", tokens=40, context=40, heads=8, k=64, pattern="ascending", traps=(13,)),
        case("scattered", tokens=40, context=40, heads=8, k=64, traps=(13,)),
        case("odd_k", tokens=9, context=300, heads=8, k=67, pattern="holes", traps=(13,)),
        case("no_key", tokens=7, context=90, heads=8, k=64, pattern="alternate", traps=(12,)),
        case("single", tokens=7, context=90, heads=8, k=64, pattern="single"),
        case("short", tokens=9, context=300, heads=8, k=96, short=True, traps=(11,)),
        case("short_holes", tokens=9, context=20, heads=2, k=33, short=True, pattern="holes",
             **_SMALL),
        case("sink", tokens=9, context=300, heads=8, k=96, sink=True),
        case("sink_no_key", tokens=9, context=90, heads=8, k=64, sink=True, pattern="alternate"),
        case("all_options", tokens=33, context=600, heads=16, k=128, sink=True, short=True,
             pattern="holes"),
        case("peaked", tokens=5, context=300, heads=8, k=128, spread=40.0),
        case("own_scale", tokens=5, context=300, heads=8, k=128, softmax_scale=0.5, traps=(5,)),
        case("v4", tokens=5, context=300, heads=64, k=128, dim=512, dim_v=512, sink=True),
        case("heads64", tokens=3, context=700, heads=64, k=512),
        case("heads128", tokens=4, context=4096, heads=128, k=2048),
        *(
            case(f"prefill_{context // 1024}k", model=True, tokens=4096, context=context, heads=128,
                 k=2048)
            for context in (8192, 32768, 131072)
        ),
        case("prefill_tp2", model=True, tokens=4096, context=32768, heads=64, k=2048),
        case("prefill_tp8", model=True, tokens=4096, context=32768, heads=16, k=2048),
    ),
    check=each(
        out=close(abs=8e-4, rel=3.01 / 128, cos=7e-6),
        max_logits=close(abs=1e-6, rel=2.01 / 65536),
        lse=close(abs=1e-6, rel=2.01 / 65536),
    ),
    cost=_sparse_cost,
    outputs=("out", "max_logits", "lse"),
    invalid=_sparse_invalid,
    requires=("lse=natural",),
    unread=_sparse_unread,
)  # fmt: skip
def sparse_mla(
    q: Tensor, kv: Tensor, indices: Tensor, *, softmax_scale: float, dim_v: int = 512,
    attn_sink: Tensor | None = None, topk_length: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Attention of each query over the rows of `kv` that it selected.

    q            [tokens, heads, dim] bf16, fp16 or fp32: absorbed part, then rotated part
    kv           [context, dim], q's dtype: latent, then rotated part; the first dim_v columns are
                 the value too. Requests stand one behind the other, indices are offset accordingly.
    indices      [tokens, k] int32 rows of kv, in any order, none twice; -1 = no key, anywhere.
                 Any other number outside [0, context) is an error: BadInput where it can be seen,
                 undefined where looking would stall a device.
    softmax_scale  multiplies q . k; no default, see SOFTMAX_SCALE
    attn_sink    [heads] fp32 or None: out shrinks as if one more key had this score and value 0;
                 lse and max_logits do not know of it. -inf = none.
    topk_length  [tokens] int32 or None: entries of `indices` from here on are never looked at
    -> out         [tokens, heads, dim_v] q's dtype; 0 for a query without keys
    -> max_logits  [tokens, heads] fp32, largest scaled score; -inf for a query without keys
    -> lse         [tokens, heads] fp32, natural log of the sum of exponentials; +inf without keys

    Source: FlashMLA's sparse prefill (`flash_mla_sparse_fwd`).
    """
    context = kv.shape[0]
    valid = chosen_of(indices, topk_length)
    padded = torch.cat([kv, kv.new_zeros(1, kv.shape[1])])
    keys = padded[torch.where(valid, indices, context).long()].float()
    values, seen = keys[..., :dim_v], valid[..., None, :]
    out, top, lse = softmax_attention(q, keys, values, seen, softmax_scale)
    return sunk(out, lse, attn_sink).to(q.dtype), top, lse


# -- sparse_mla_paged ---------------------------------------------------------------------------


def _paged_inputs(
    make: Maker, *, batch: int, next_n: int, context: int, heads: int, k: int, page_size: int = 64,
    layout: str = "latent_fp8/512+64", dim_v: int = 512, dtype: str = "bf16",
    pattern: str = "shuffled", full: bool = False, sink: bool = False, short: bool = False,
    workers: int = 0, spread: float = 2.0,
) -> Inputs:  # fmt: skip
    ends = [context if full else make.pick.randint(1, context) for _ in range(batch)]
    visible = [max(0, end - next_n + 1 + n) for end in ends for n in range(next_n)]
    logical = selections(make, visible, k, pattern).view(batch, next_n, k)
    pages = -(-context // page_size)
    indices = placed(make, logical, batch, pages, page_size)
    lengths = None
    if short:
        lengths, indices = cut_short(make, indices)
    schedule, num_splits = None, None
    if workers:
        rows = [k] * (batch * next_n)
        own = make.tensor(rows) if lengths is None else lengths.view(-1)
        schedule, num_splits = plan.reference(own, workers=workers)
    shape, scale = (batch, next_n, heads, KVLayout.parse(layout).width), SOFTMAX_SCALE
    return dict(
        q=queries(make, *shape, dtype=FLOATS[dtype], softmax_scale=scale, spread=spread),
        pages=pool(make, layout, batch * pages, page_size),
        indices=indices,
        layout=layout,
        softmax_scale=scale,
        dim_v=dim_v,
        attn_sink=sinks(make, heads) if sink else None,
        topk_length=lengths,
        schedule=schedule,
        num_splits=num_splits,
    )


def _paged_cost(
    q: Tensor, pages: Tensor, indices: Tensor, *, layout: str, softmax_scale: float,
    dim_v: int = 512, attn_sink: Tensor | None = None, topk_length: Tensor | None = None,
    schedule: Tensor | None = None, num_splits: Tensor | None = None,
) -> Cost:  # fmt: skip
    pairs = attended(indices, topk_length)
    rows, (heads, dim) = q.shape[0] * q.shape[1], q.shape[2:]
    moved = rows * heads * (dim + dim_v) * q.element_size() + 4 * indices.numel()
    if indices.device.type != "meta":
        slots = pages.shape[0] * pages.shape[1]
        unique = slots - int(unselected(indices, topk_length, slots).sum())
    else:
        unique = pairs
    keys = unique * KVLayout.parse(layout).token_bytes
    return Cost(2.0 * heads * pairs * (dim + dim_v), moved + keys + 4 * rows * heads)


def _paged_invalid(
    q: Tensor, pages: Tensor, indices: Tensor, *, layout: str, softmax_scale: float,
    dim_v: int = 512, attn_sink: Tensor | None = None, topk_length: Tensor | None = None,
    schedule: Tensor | None = None, num_splits: Tensor | None = None,
) -> str | None:  # fmt: skip
    if (reason := misfit(pages, layout, "latent")) is not None:
        return reason
    if q.dim() != 4:
        return f"q has shape {list(q.shape)}; expected [batch, next_n, heads, dim]"
    if (schedule is None) != (num_splits is None):
        return "schedule and num_splits come from one `plan` and are given together or not at all"
    if schedule is not None and num_splits is not None:
        rows = q.shape[0] * q.shape[1]
        kinds = (schedule.dtype, num_splits.dtype) == (torch.int32, torch.int32)
        if not kinds or schedule.shape[1:] != (4,) or num_splits.shape != (rows + 1,):
            found = ", ".join(f"{t.dtype} {list(t.shape)}" for t in (schedule, num_splits))
            return (
                f"schedule and num_splits are {found};"
                f" expected int32 [workers, 4] and int32 [{rows + 1}]"
            )
    dim = KVLayout.parse(layout).width
    return misshapen(q, indices, dim, dim_v, softmax_scale, attn_sink, topk_length)


def _paged_unread(
    q: Tensor, pages: Tensor, indices: Tensor, *, layout: str, softmax_scale: float,
    dim_v: int = 512, attn_sink: Tensor | None = None, topk_length: Tensor | None = None,
    schedule: Tensor | None = None, num_splits: Tensor | None = None,
) -> Mapping[str, Tensor]:  # fmt: skip
    free = unselected(indices, topk_length, pages.shape[0] * pages.shape[1])
    return {"pages": KVLayout.parse(layout).mask(pages, free.view(pages.shape[:2]))}


_TINY: dict[str, Any] = dict(layout="latent_fp32/32+8", dim_v=32, dtype="fp32")


@op(
    version=1,
    constant=("next_n", "heads", "k", "page_size", "layout", "dim_v", "dtype", "pattern", "full",
              "sink", "short", "workers", "spread"),
    variable={"batch": "q[0]", "context": "pages[0]"},
    inputs=_paged_inputs,
    cases=(
        case("empty", batch=0, next_n=1, context=64, heads=8, k=64),
        case("one", batch=1, next_n=1, context=1, heads=1, k=1, page_size=1, **_TINY),
        case("small", batch=3, next_n=2, context=50, heads=3, k=21, page_size=3, **_TINY),
        case("decode", batch=1, next_n=1, context=1000, heads=8, k=256, full=True, traps=(5, 10)),
        case("batch", batch=5, next_n=1, context=700, heads=16, k=128, traps=(11,)),
        case("next_2", batch=3, next_n=2, context=300, heads=8, k=64, page_size=1),
        case("next_3", batch=2, next_n=3, context=300, heads=8, k=67, page_size=3, traps=(13,)),
        case("next_6", batch=2, next_n=6, context=300, heads=8, k=64, page_size=128),
        case("young", batch=4, next_n=2, context=9, heads=8, k=64, pattern="ascending"),
        case("holes", batch=3, next_n=1, context=300, heads=8, k=128, pattern="holes"),
        case("no_key", batch=3, next_n=2, context=90, heads=8, k=64, pattern="alternate",
             traps=(12,)),
        case("single", batch=3, next_n=1, context=90, heads=8, k=64, pattern="single"),
        case("short", batch=3, next_n=2, context=300, heads=8, k=96, short=True),
        case("sink", batch=3, next_n=2, context=300, heads=8, k=96, sink=True),
        case("plan", batch=3, next_n=2, context=900, heads=8, k=256, workers=5),
        case("all_options", batch=3, next_n=2, context=300, heads=16, k=96, sink=True, short=True,
             workers=7, pattern="holes", page_size=3),
        case("bf16_pages", batch=3, next_n=1, context=300, heads=8, k=96,
             layout="latent_bf16/512+64"),
        case("fp32_pages", batch=3, next_n=2, context=300, heads=8, k=96,
             layout="latent_fp32/512+64", dtype="fp32"),
        case("split_pages", batch=3, next_n=1, context=300, heads=8, k=96, page_size=128,
             layout="latent_bf16_split/512+64", traps=(10,)),
        case("int8_pages", batch=3, next_n=2, context=300, heads=8, k=96, page_size=128,
             layout="latent_int8/512+64", traps=(10,)),
        case("partial_group", batch=3, next_n=1, context=300, heads=4, k=64,
             layout="latent_fp8/192+8", dim_v=160),
        case("fp32_query", batch=2, next_n=1, context=300, heads=8, k=96, dtype="fp32"),
        case("peaked", batch=2, next_n=1, context=300, heads=8, k=96, spread=40.0),
        case("heads64", batch=2, next_n=1, context=900, heads=64, k=256),
        *(
            case(f"decode_b{batch}", model=True, batch=batch, next_n=next_n, context=32768,
                 heads=128, k=2048, full=True, traps=(22,) if batch == 128 else ())
            for batch, next_n in ((1, 2), (16, 4), (64, 2), (128, 2))
        ),
        case("decode_one", model=True, batch=128, next_n=1, context=32768, heads=128, k=2048,
             full=True),
        case("decode_tp2", model=True, batch=128, next_n=1, context=32768, heads=64, k=2048,
             full=True),
        case("decode_tp8", model=True, batch=64, next_n=1, context=32768, heads=16, k=2048,
             full=True),
    ),
    check=each(
        out=close(abs=1e-3, rel=2.01 / 128, cos=5e-6),
        lse=close(abs=1e-6, rel=8.01 / 65536),
    ),
    cost=_paged_cost,
    outputs=("out", "lse"),
    invalid=_paged_invalid,
    requires=("lse=natural",),
    unread=_paged_unread,
)  # fmt: skip
def sparse_mla_paged(
    q: Tensor, pages: Tensor, indices: Tensor, *, layout: str, softmax_scale: float,
    dim_v: int = 512, attn_sink: Tensor | None = None, topk_length: Tensor | None = None,
    schedule: Tensor | None = None, num_splits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of each query over the cache slots that it selected.

    q            [batch, next_n, heads, dim] bf16, fp16 or fp32; next_n queries per request
    pages        [pages, page_size, record], as KVLayout says of `layout`
    indices      [batch, next_n, k] int32 slots (page * page_size + offset), in any order, none
                 twice; -1 = no key, anywhere; others as in `sparse_mla`
    softmax_scale  multiplies q . k; no default, see SOFTMAX_SCALE
    attn_sink    [heads] fp32 or None, as in `sparse_mla`
    topk_length  [batch, next_n] int32 or None, as in `sparse_mla`
    schedule, num_splits  what `plan` made of the batch * next_n lengths, or None; they say where
                 work is done and never change the result beyond rounding
    -> out       [batch, next_n, heads, dim_v] q's dtype; 0 for a query without keys
    -> lse       [batch, heads, next_n] fp32, natural log; +inf for a query without keys

    Stored values count as they decode: latent * scale, before any rounding. Source: FlashMLA's
    sparse decoding (`flash_mla_with_kvcache`), with more layouts and lengths per query.
    """
    form = KVLayout.parse(layout)
    page_size = pages.shape[1]
    valid = chosen_of(indices, topk_length)
    slots = torch.where(valid, indices, 0).long()
    parts = {n: v[slots // page_size, slots % page_size] for n, v in form.views(pages).items()}
    keys = torch.where(valid[..., None], form.decode(parts), 0)
    out, _, lse = softmax_attention(q, keys, keys[..., :dim_v], valid[..., None, :], softmax_scale)
    return sunk(out, lse, attn_sink).to(q.dtype), lse.transpose(1, 2)
