"""Attention over a range of keys per query, everything in it or what an index list leaves: short
prompts, the indexer's warm-up, and the yardstick for sparse attention."""

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
    queries,
    selections,
    softmax_attention,
)
from dsa_hal.registry import op

CHECK = each(
    out=close(abs=8e-4, rel=3.01 / 128, cos=7e-6),
    lse=close(abs=1e-6, rel=2.01 / 65536),
)


def ranges(make: Maker, tokens: int, context: int, kind: str) -> tuple[Tensor, Tensor]:
    """First and end key of every query, int32 [tokens] each.

    kind  "causal" (the queries are the last tokens of one request), "requests" (several requests
          one behind the other, causal in each), "random" (any, some of them empty), "all"
    """
    starts, ends = [0] * tokens, [context] * tokens
    if kind == "causal":
        ends = [max(0, context - tokens + 1 + t) for t in range(tokens)]
    elif kind == "requests":
        own = -(-tokens // 3)
        starts = [t // own * (context // 3) for t in range(tokens)]
        ends = [min(context, start + t % own + 1) for t, start in enumerate(starts)]
    elif kind == "random":
        starts = [make.pick.randint(0, context) for _ in range(tokens)]
        ends = [make.pick.randint(0, context) for _ in range(tokens)]
    return make.tensor(starts), make.tensor(ends)


def in_range(ks: Tensor, ke: Tensor, context: int) -> Tensor:
    """Mask [tokens, context] of the keys in each query's range."""
    column = torch.arange(context, device=ks.device)
    return (column >= ks[:, None]) & (column < ke[:, None])


def _pairs(ks: Tensor, ke: Tensor, context: int) -> int:
    """Pairs of a query and a key; on the meta device the most possible."""
    if ks.device.type == "meta":
        return ks.numel() * context
    return int((ke.long() - ks).clamp(min=0).sum())


def _misfit(ks: Tensor, ke: Tensor, tokens: int, softmax_scale: float) -> str | None:
    for name, bound in (("ks", ks), ("ke", ke)):
        if (bound.dtype, *bound.shape) != (torch.int32, tokens):
            return f"{name} is {bound.dtype} {list(bound.shape)}; expected int32 [{tokens}]"
    if not softmax_scale > 0:
        return f"softmax_scale is {softmax_scale}; expected a positive number"
    return None


# -- dense_mla ----------------------------------------------------------------------------------


def _dense_inputs(
    make: Maker, *, tokens: int, context: int, heads: int, dim: int = 576, dim_v: int = 512,
    dtype: str = "bf16", kind: str = "causal", spread: float = 2.0,
) -> Inputs:  # fmt: skip
    ks, ke = ranges(make, tokens, context, kind)
    number, scale = FLOATS[dtype], SOFTMAX_SCALE
    return dict(
        q=queries(make, tokens, heads, dim, dtype=number, softmax_scale=scale, spread=spread),
        kv=make.randn(context, dim, dtype=number, scale=KEY_SCALE),
        ks=ks,
        ke=ke,
        softmax_scale=scale,
        dim_v=dim_v,
    )


def _dense_cost(
    q: Tensor, kv: Tensor, ks: Tensor, ke: Tensor, *, softmax_scale: float, dim_v: int = 512
) -> Cost:
    rows, heads, dim = q.shape
    moved = (rows * heads * (dim + dim_v) + kv.numel()) * q.element_size() + 4 * rows * (heads + 2)
    return Cost(2.0 * heads * _pairs(ks, ke, kv.shape[0]) * (dim + dim_v), moved)


def _dense_invalid(
    q: Tensor, kv: Tensor, ks: Tensor, ke: Tensor, *, softmax_scale: float, dim_v: int = 512
) -> str | None:
    if q.dim() != 3 or kv.dim() != 2 or q.shape[2] != kv.shape[1] or not 0 < dim_v <= kv.shape[1]:
        return (
            f"q has shape {list(q.shape)}, kv {list(kv.shape)}, dim_v is {dim_v};"
            " expected [tokens, heads, dim], [context, dim] and 1 to dim"
        )
    if q.dtype not in FLOATS.values() or kv.dtype != q.dtype:
        return f"q is {q.dtype}, kv {kv.dtype}; expected one of bfloat16, float16, float32 for both"
    return _misfit(ks, ke, q.shape[0], softmax_scale)


def _dense_unread(
    q: Tensor, kv: Tensor, ks: Tensor, ke: Tensor, *, softmax_scale: float, dim_v: int = 512
) -> Mapping[str, Tensor]:
    return {"kv": ~in_range(ks, ke, kv.shape[0]).any(0)}


_SMALL: dict[str, Any] = dict(dim=40, dim_v=32)


@op(
    version=1,
    constant=("heads", "dim", "dim_v", "dtype", "kind"),
    variable={"tokens": "q[0]", "context": "kv[0]"},
    inputs=_dense_inputs,
    cases=(
        case("empty", tokens=0, context=64, heads=8, **_SMALL),
        case("no_context", tokens=2, context=0, heads=2, **_SMALL),
        case("one", tokens=1, context=1, heads=1, **_SMALL),
        case("small", tokens=67, context=90, heads=3, dtype="fp32", **_SMALL),
        case("fp16", tokens=5, context=90, heads=8, dtype="fp16"),
        case("fp32", tokens=5, context=700, heads=16, dtype="fp32"),
        case("start", tokens=70, context=70, heads=8),
        case("chunk", tokens=33, context=500, heads=8, traps=(5, 15)),
        case("requests", tokens=60, context=70, heads=8, kind="requests", traps=(15,)),
        case("random", tokens=40, context=300, heads=8, kind="random", traps=(12,)),
        case("all", tokens=3, context=5000, heads=64, kind="all"),
        case("heads128", tokens=2, context=9000, heads=128),
        case("prefill_8k", model=True, tokens=4096, context=8192, heads=128),
        case("decode_b128", model=True, tokens=128, context=32768, heads=128),
    ),
    check=CHECK,
    cost=_dense_cost,
    outputs=("out", "lse"),
    invalid=_dense_invalid,
    requires=("lse=natural",),
    unread=_dense_unread,
)
def dense_mla(
    q: Tensor, kv: Tensor, ks: Tensor, ke: Tensor, *, softmax_scale: float, dim_v: int = 512
) -> tuple[Tensor, Tensor]:
    """Attention of each query over all rows of `kv` in its range; absorbed form.

    q       [tokens, heads, dim] bf16, fp16 or fp32: absorbed part, then rotated part
    kv      [context, dim], q's dtype; the first dim_v columns are the value too
    ks, ke  [tokens] int32: query t sees keys ks[t] <= i < ke[t]; none if ke[t] <= ks[t].
            0 <= ks and ke <= context, BadInput where it can be seen
    softmax_scale  multiplies q . k; no default, see `attention.SOFTMAX_SCALE`
    -> out  [tokens, heads, dim_v] q's dtype; 0 for a query without keys
    -> lse  [tokens, heads] fp32, natural log; +inf for a query without keys

    Source: the decoding branch of the model's demo code, which masks this with the selection.
    """
    seen = in_range(ks, ke, kv.shape[0])
    keys = torch.cat([torch.where(seen.any(0)[:, None], kv, 0), kv.new_zeros(1, kv.shape[1])])
    seen = torch.nn.functional.pad(seen, (0, 1))  # a last key that nobody sees: no axis is empty
    out, _, lse = softmax_attention(q, keys, keys[:, :dim_v], seen[:, None], softmax_scale)
    return out.to(q.dtype), lse


# -- mha_prefill --------------------------------------------------------------------------------

FREE_MASK = "mask=free"
"""The promise that attention under `indices` takes no longer than without: what a model needs to
know before it prefers this form for contexts that must be selected from."""


def _mha_inputs(
    make: Maker, *, tokens: int, context: int, heads: int, dim: int = 192, dim_v: int = 128,
    k: int = 0, dtype: str = "bf16", kind: str = "causal", pattern: str = "ascending",
    spread: float = 2.0,
) -> Inputs:  # fmt: skip
    ks, ke = ranges(make, tokens, context, kind)
    before = context - tokens + 1 if kind == "causal" else context
    visible = [min(context, max(0, before + t)) for t in range(tokens)]
    number, scale = FLOATS[dtype], SOFTMAX_SCALE
    return dict(
        q=queries(make, tokens, heads, dim, dtype=number, softmax_scale=scale, spread=spread),
        k=make.randn(context, heads, dim, dtype=number, scale=KEY_SCALE),
        v=make.randn(context, heads, dim_v, dtype=number, scale=KEY_SCALE),
        ks=ks,
        ke=ke,
        indices=selections(make, visible, k, pattern) if k else None,
        softmax_scale=scale,
    )


def _mha_cost(
    q: Tensor, k: Tensor, v: Tensor, ks: Tensor, ke: Tensor, indices: Tensor | None = None, *,
    softmax_scale: float,
) -> Cost:  # fmt: skip
    rows, heads, dim = q.shape
    moved = rows * heads * (dim + v.shape[2]) + k.numel() + v.numel()
    moved = moved * q.element_size() + 4 * rows * (heads + 2)
    pairs = _pairs(ks, ke, k.shape[0])
    if indices is not None:
        moved += 4 * indices.numel()
        pairs = min(pairs, indices.numel())
    return Cost(2.0 * heads * pairs * (dim + v.shape[2]), moved)


def _mha_invalid(
    q: Tensor, k: Tensor, v: Tensor, ks: Tensor, ke: Tensor, indices: Tensor | None = None, *,
    softmax_scale: float,
) -> str | None:  # fmt: skip
    flat = {q.dim(), k.dim(), v.dim()} != {3}
    if flat or k.shape[1:] != q.shape[1:] or v.shape[:2] != k.shape[:2]:
        return (
            f"q has shape {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}; expected"
            " [tokens, heads, dim], [context, heads, dim] and [context, heads, dim_v]"
        )
    if q.dtype not in FLOATS.values() or {k.dtype, v.dtype} != {q.dtype}:
        found = f"q is {q.dtype}, k {k.dtype}, v {v.dtype}"
        return f"{found}; expected one of bfloat16, float16, float32 for all"
    if indices is not None:
        tokens, found = q.shape[0], f"{indices.dtype} {list(indices.shape)}"
        fits = indices.dim() == 2 and indices.shape[0] == tokens and indices.shape[1] > 0
        if indices.dtype != torch.int32 or not fits:
            return f"indices are {found}; expected int32 [{tokens}, k]"
    return _misfit(ks, ke, q.shape[0], softmax_scale)


def _listed(seen: Tensor, indices: Tensor | None) -> Tensor:
    """`seen` [tokens, context] without the keys that `indices` does not name."""
    if indices is None:
        return seen
    context = seen.shape[1]
    named = seen.new_zeros(seen.shape[0], context + 1)
    named = named.scatter(1, torch.where(indices < 0, context, indices).long(), True)
    return seen & named[:, :context]


def _mha_unread(
    q: Tensor, k: Tensor, v: Tensor, ks: Tensor, ke: Tensor, indices: Tensor | None = None, *,
    softmax_scale: float,
) -> Mapping[str, Tensor]:  # fmt: skip
    free = ~_listed(in_range(ks, ke, k.shape[0]), indices).any(0)
    return {"k": free, "v": free}


@op(
    version=1,
    constant=("heads", "dim", "dim_v", "k", "dtype", "kind", "pattern"),
    variable={"tokens": "q[0]", "context": "k[0]"},
    inputs=_mha_inputs,
    cases=(
        case("empty", tokens=0, context=64, heads=8, **_SMALL),
        case("no_context", tokens=2, context=0, heads=2, **_SMALL),
        case("one", tokens=1, context=1, heads=1, **_SMALL),
        case("small", tokens=67, context=90, heads=3, dtype="fp32", **_SMALL),
        case("fp16", tokens=5, context=90, heads=8, dtype="fp16"),
        case("start", tokens=300, context=300, heads=4, traps=(5,)),
        case("chunk", tokens=33, context=400, heads=8, traps=(15,)),
        case("requests", tokens=60, context=70, heads=8, kind="requests", traps=(15,)),
        case("random", tokens=40, context=300, heads=8, kind="random", traps=(12,)),
        case("masked", tokens=40, context=300, heads=8, k=64, traps=(11,)),
        case("masked_start", tokens=60, context=60, heads=8, k=16, pattern="shuffled",
             dtype="fp32"),
        case("masked_holes", tokens=40, context=300, heads=8, k=64, pattern="holes"),
        case("masked_no_key", tokens=9, context=90, heads=8, k=16, pattern="alternate",
             traps=(12,)),
        case("masked_random", tokens=40, context=90, heads=2, k=16, kind="random"),
        case("heads128", tokens=17, context=200, heads=128),
        case("prefill_4k", model=True, tokens=4096, context=4096, heads=128),
        case("prefill_8k", model=True, tokens=4096, context=8192, heads=128),
        case("masked_4k", model=True, tokens=4096, context=4096, heads=128, k=2048),
    ),
    check=CHECK,
    cost=_mha_cost,
    outputs=("out", "lse"),
    invalid=_mha_invalid,
    requires=("lse=natural",),
    unread=_mha_unread,
)  # fmt: skip
def mha_prefill(
    q: Tensor, k: Tensor, v: Tensor, ks: Tensor, ke: Tensor, indices: Tensor | None = None, *,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention with keys and values per head, cheaper than the absorbed form for prompts of up to
    about 7000 tokens; with `indices` it computes what sparse attention would.

    q        [tokens, heads, dim] bf16, fp16 or fp32
    k        [context, heads, dim], q's dtype
    v        [context, heads, dim_v], q's dtype
    ks, ke   [tokens] int32: query t sees keys ks[t] <= i < ke[t], as in `dense_mla`
    indices  [tokens, topk] int32 rows of k, or None: of its range, a query sees only those named
             here; -1 = no key, others as in `sparse_mla`
    softmax_scale  multiplies q . k; no default, see `attention.SOFTMAX_SCALE`
    -> out   [tokens, heads, dim_v] q's dtype; 0 for a query without keys
    -> lse   [tokens, heads] fp32, natural log; +inf for a query without keys

    Source: the prefill branch of the model's demo code; the paper's masked MHA mode.
    """
    seen = _listed(in_range(ks, ke, k.shape[0]), indices)
    used = seen.any(0)[:, None, None]
    keys, values = (
        torch.cat([torch.where(used, t, 0), t.new_zeros(1, *t.shape[1:])]) for t in (k, v)
    )
    mask = torch.nn.functional.pad(seen, (0, 1))  # a last key that nobody sees: no axis is empty
    q, keys, values = (t.transpose(0, 1) for t in (q, keys, values))  # heads first, tokens as rows
    out, _, lse = softmax_attention(q, keys, values, mask, softmax_scale)
    return out.transpose(0, 1).to(q.dtype), lse.t()
