"""What training adds to the ops: the gradients of sparse attention, and the indexer's loss with its
gradients. Each reference is the forward mathematics, differentiated by torch: independent of the
formulas that implementations derive by hand, and in fp64 where it is given fp64."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dsa_hal.case import Cost, Inputs, Maker, case
from dsa_hal.ops._attention import (
    FLOATS,
    KEY_SCALE,
    SOFTMAX_SCALE,
    attended,
    chosen_of,
    cut_short,
    misshapen,
    queries,
    selections,
    unselected,
)
from dsa_hal.ops._contract import floats, shaped, typed
from dsa_hal.ops._training import (
    gradients,
    judged,
    picked_keys,
    probabilities,
    ranges_of,
    row_blocks,
    wide,
)
from dsa_hal.ops.select import in_range
from dsa_hal.registry import op
from dsa_hal.selection import DETERMINISTIC

# -- sparse_mla_bwd -----------------------------------------------------------------------------


def sparse_attention(
    q: Tensor, kv: Tensor, indices: Tensor, *, softmax_scale: float, dim_v: int
) -> Tensor:
    """`out` of `sparse_mla` in the dtype of its arguments, for torch to differentiate."""
    keys = picked_keys(kv, indices)
    scores = torch.einsum("thd,tkd->thk", q, keys) * softmax_scale
    weights = probabilities(scores, (indices >= 0)[:, None])
    return torch.einsum("thk,tkv->thv", weights, keys[..., :dim_v])


def _forward(
    q: Tensor, kv: Tensor, indices: Tensor, softmax_scale: float, dim_v: int
) -> tuple[Tensor, Tensor]:
    """`out` of q's dtype and `lse` of `sparse_mla`, as a case's arguments."""
    tokens, heads, _ = q.shape
    out = torch.empty(tokens, heads, dim_v, dtype=q.dtype, device=q.device)
    lse = torch.empty(tokens, heads, device=q.device)
    for rows in row_blocks(tokens if not q.is_meta else 0, indices.shape[1] * q.shape[2]):
        mine, ids = q[rows].float(), indices[rows]
        out[rows] = sparse_attention(
            mine, kv.float(), ids, softmax_scale=softmax_scale, dim_v=dim_v
        )
        scores = torch.einsum("thd,tkd->thk", mine, picked_keys(kv.float(), ids)) * softmax_scale
        log = scores.masked_fill((ids < 0)[:, None], -torch.inf).logsumexp(-1)
        lse[rows] = log.masked_fill(log == -torch.inf, torch.inf)
    return out, lse


def _backward_inputs(
    make: Maker, *, tokens: int, context: int, heads: int, k: int, dim: int = 576, dim_v: int = 512,
    dtype: str = "bf16", pattern: str = "shuffled", sequence: int = 0, short: bool = False,
    spread: float = 2.0, softmax_scale: float = SOFTMAX_SCALE, deterministic: bool = False,
) -> Inputs:  # fmt: skip
    spans = ranges_of(make, "causal", tokens, context, sequence)
    indices = selections(make, [end - start for start, end in spans], k, pattern)
    starts = make.tensor([start for start, _ in spans])[:, None]
    indices = torch.where(indices < 0, -1, indices + starts).to(torch.int32)
    kind, scale = FLOATS[dtype], softmax_scale
    q = queries(make, tokens, heads, dim, dtype=kind, softmax_scale=scale, spread=spread)
    kv = make.randn(context, dim, dtype=kind, scale=KEY_SCALE)
    lengths, chosen = None, indices
    if short:
        lengths, indices = cut_short(make, indices)
        chosen = torch.where(chosen_of(indices, lengths), indices, -1)
    out, lse = _forward(q, kv, chosen, scale, dim_v)
    return dict(
        q=q, kv=kv, indices=indices, out=out, lse=lse,
        dout=make.randn(tokens, heads, dim_v, dtype=kind),
        softmax_scale=scale, dim_v=dim_v, topk_length=lengths, deterministic=deterministic,
    )  # fmt: skip


def _backward_cost(
    q: Tensor, kv: Tensor, indices: Tensor, out: Tensor, lse: Tensor, dout: Tensor, *,
    softmax_scale: float, dim_v: int = 512, topk_length: Tensor | None = None,
    deterministic: bool = False,
) -> Cost:  # fmt: skip
    pairs = attended(indices, topk_length)
    rows, heads, dim = q.shape
    moved = rows * heads * (2 * dim + 2 * dim_v) * q.element_size() + 4 * (rows * heads)
    keys = min(pairs, kv.shape[0]) * dim * kv.element_size() + 4 * kv.numel()
    flop = 2.0 * heads * pairs * (3 * dim + 2 * dim_v)
    return Cost(flop, moved + keys + 4 * indices.numel())


def _backward_invalid(
    q: Tensor, kv: Tensor, indices: Tensor, out: Tensor, lse: Tensor, dout: Tensor, *,
    softmax_scale: float, dim_v: int = 512, topk_length: Tensor | None = None,
    deterministic: bool = False,
) -> str | None:  # fmt: skip
    if q.dim() != 3 or kv.dim() != 2:
        return (
            f"q has shape {list(q.shape)}, kv {list(kv.shape)};"
            " expected [tokens, heads, dim] and [context, dim]"
        )
    tokens, heads, _ = q.shape
    return (
        typed(q.dtype, kv=kv, out=out, dout=dout)
        or typed(torch.float32, lse=lse)
        or shaped("out", out, tokens, heads, dim_v)
        or shaped("dout", dout, tokens, heads, dim_v)
        or shaped("lse", lse, tokens, heads)
        or misshapen(q, indices, kv.shape[1], dim_v, softmax_scale, None, topk_length)
    )


def _backward_requests(
    q: Tensor, kv: Tensor, indices: Tensor, out: Tensor, lse: Tensor, dout: Tensor, *,
    softmax_scale: float, dim_v: int = 512, topk_length: Tensor | None = None,
    deterministic: bool = False,
) -> frozenset[str]:  # fmt: skip
    return frozenset({DETERMINISTIC} if deterministic else ())


def _backward_unread(
    q: Tensor, kv: Tensor, indices: Tensor, out: Tensor, lse: Tensor, dout: Tensor, *,
    softmax_scale: float, dim_v: int = 512, topk_length: Tensor | None = None,
    deterministic: bool = False,
) -> Mapping[str, Tensor]:  # fmt: skip
    return {"kv": unselected(indices, topk_length, kv.shape[0])}


_SMALL: dict[str, Any] = dict(dim=40, dim_v=32)


@op(
    version=1,
    constant=("heads", "k", "dim", "dim_v", "dtype", "pattern", "sequence", "short", "spread",
              "softmax_scale", "deterministic"),
    variable={"tokens": "q[0]", "context": "kv[0]"},
    inputs=_backward_inputs,
    cases=(
        case("empty", tokens=0, context=64, heads=8, k=64, **_SMALL),
        case("no_context", tokens=3, context=0, heads=2, k=5, **_SMALL),
        case("one", tokens=1, context=1, heads=1, k=1, **_SMALL),
        case("one_full", tokens=1, context=300, heads=8, k=256, traps=(5,)),
        case("tiny", tokens=7, context=20, heads=2, k=9, dtype="fp32", **_SMALL),
        case("small", tokens=67, context=90, heads=3, k=21, dtype="fp32", **_SMALL),
        case("start", tokens=40, context=40, heads=8, k=64, pattern="ascending", traps=(13,)),
        case("fp16", tokens=5, context=90, heads=8, k=64, dtype="fp16"),
        case("fp32", tokens=5, context=400, heads=16, k=200, dtype="fp32"),
        case("odd_k", tokens=9, context=300, heads=8, k=67, pattern="holes", traps=(13,)),
        case("no_key", tokens=7, context=90, heads=8, k=64, pattern="alternate", traps=(12,)),
        case("single", tokens=7, context=90, heads=8, k=64, pattern="single"),
        case("short", tokens=9, context=300, heads=8, k=96, short=True, traps=(11,)),
        case("short_holes", tokens=9, context=20, heads=2, k=33, short=True, pattern="holes",
             **_SMALL),
        case("far", tokens=70, context=9000, heads=8, k=16, pattern="holes"),
        case("sequences", tokens=300, context=300, heads=4, k=32, sequence=75, **_SMALL),
        case("own_scale", tokens=5, context=300, heads=8, k=128, softmax_scale=0.5, traps=(5,)),
        case("deterministic", tokens=33, context=300, heads=8, k=64, deterministic=True),
        case("deterministic_far", tokens=40, context=6000, heads=2, k=24, deterministic=True,
             **_SMALL),
        case("heads128", tokens=3, context=700, heads=128, k=256),
        case("train_batch", model=True, tokens=65536, context=65536, heads=8, k=256, sequence=4096),
        case("train_8k", model=True, tokens=4096, context=8192, heads=128, k=2048),
        case("train_32k", model=True, tokens=4096, context=32768, heads=128, k=2048),
        case("train_tp8", model=True, tokens=4096, context=32768, heads=16, k=2048),
    ),
    check=judged(("dq", "dkv"), "q"),
    cost=_backward_cost,
    outputs=("dq", "dkv"),
    invalid=_backward_invalid,
    requests=_backward_requests,
    unread=_backward_unread,
)  # fmt: skip
def sparse_mla_bwd(
    q: Tensor, kv: Tensor, indices: Tensor, out: Tensor, lse: Tensor, dout: Tensor, *,
    softmax_scale: float, dim_v: int = 512, topk_length: Tensor | None = None,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of `sparse_mla` without sinks: what a change of q and kv does to out . dout.

    q            [tokens, heads, dim] bf16, fp16 or fp32, as in `sparse_mla`, like what follows
    kv           [context, dim] q's dtype
    indices      [tokens, k] int32 rows of kv, none twice; -1 = no key
    out          [tokens, heads, dim_v] q's dtype, the result of `sparse_mla`
    lse          [tokens, heads] fp32, likewise: natural logarithm, +inf for a query without keys
    dout         [tokens, heads, dim_v] q's dtype, the gradient with respect to out
    softmax_scale  as it was forward
    dim_v        columns of a key that are its value
    topk_length  [tokens] int32 or None, as it was forward
    deterministic  True: only an implementation whose repeats are equal to the bit may serve
    -> dq        [tokens, heads, dim] q's dtype; 0 for a query without keys
    -> dkv       [context, dim] fp32, summed in fp32; 0 for a key that nobody selected

    Source: FlashAttention's backward, through the gathered keys; TileLang's `sparse_mla_bwd`.
    """
    chosen = torch.where(chosen_of(indices, topk_length), indices, -1)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dkv = torch.zeros(kv.shape, dtype=wide(kv[:0]).dtype, device=kv.device)
    for rows in row_blocks(q.shape[0], 2 * indices.shape[1] * q.shape[2]):

        def attention(q: Tensor, kv: Tensor, ids: Tensor = chosen[rows]) -> Tensor:
            return sparse_attention(q, kv, ids, softmax_scale=softmax_scale, dim_v=dim_v)

        _, (dq[rows], part) = gradients(attention, (q[rows], kv), dout[rows])
        dkv += part
    return dq, dkv


# -- indexer_kl ---------------------------------------------------------------------------------


def indexer_divergence(
    q_index: Tensor, k_index: Tensor, weights: Tensor, q: Tensor, keys: Tensor, allowed: Tensor, *,
    softmax_scale: float,
) -> Tensor:  # fmt: skip
    """KL(p || softmax(I)) [tokens] in the dtype of its arguments, for torch to differentiate.
    k_index and keys are [keys, dim], or [tokens, keys, dim] where each query has its own; allowed
    is bool [tokens, keys]."""
    axes = "sd" if keys.dim() == 2 else "tsd"
    with torch.no_grad():
        scores = torch.einsum(f"thd,{axes}->ths", q, keys) * softmax_scale
        target = probabilities(scores, allowed[:, None]).mean(1)
    logits = torch.zeros_like(target)
    for head in range(q_index.shape[1]):
        products = torch.einsum(f"td,{axes}->ts", q_index[:, head], k_index).relu()
        logits = logits + products * weights[:, head, None]
    nothing = ~allowed.any(-1, keepdim=True)
    logits = logits.masked_fill(~allowed, -torch.inf).masked_fill(nothing, 0)
    log = logits.log_softmax(-1).masked_fill(~allowed, 0)
    return (torch.xlogy(target, target) - target * log).sum(-1)


def _kl_inputs(
    make: Maker, *, tokens: int, context: int, index_heads: int, heads: int, k: int = 0,
    index_dim: int = 128, dim: int = 576, dtype: str = "bf16", ranges: str = "causal",
    pattern: str = "shuffled", sequence: int = 0, weighted: bool = False, spread: float = 2.0,
) -> Inputs:  # fmt: skip
    kind = FLOATS[dtype]
    spans = ranges_of(make, ranges, tokens, context, sequence)
    starts, ends = make.tensor([s for s, _ in spans]), make.tensor([e for _, e in spans])
    indices = None
    if k:
        chosen = selections(make, [end - start for start, end in spans], k, pattern)
        indices = torch.where(chosen < 0, -1, chosen + starts[:, None]).to(torch.int32)
    scale = spread / (0.6 * (index_dim * index_heads) ** 0.5)
    return dict(
        q_index=make.randn(tokens, index_heads, index_dim, dtype=kind),
        k_index=make.randn(context, index_dim, dtype=kind),
        weights=make.randn(tokens, index_heads, scale=scale),
        q=queries(make, tokens, heads, dim, dtype=kind, softmax_scale=SOFTMAX_SCALE, spread=spread),
        kv=make.randn(context, dim, dtype=kind, scale=KEY_SCALE),
        ks=None if k else starts,
        ke=None if k else ends,
        indices=indices,
        row_weight=make.randn(tokens) if weighted else None,
        softmax_scale=SOFTMAX_SCALE,
    )


def _kl_cost(
    q_index: Tensor, k_index: Tensor, weights: Tensor, q: Tensor, kv: Tensor,
    ks: Tensor | None = None, ke: Tensor | None = None, indices: Tensor | None = None,
    row_weight: Tensor | None = None, *, softmax_scale: float,
) -> Cost:  # fmt: skip
    context = kv.shape[0]
    if indices is not None:
        pairs = float(attended(indices, None))
    elif q.is_meta or ks is None or ke is None:
        pairs = float(q.shape[0] * context)
    else:
        pairs = float((ke.clamp(0, context) - ks.clamp(0, context)).clamp_min(0).double().sum())
    work = 3 * q_index.shape[1] * q_index.shape[2] + q.shape[1] * q.shape[2]
    read = sum(t.numel() * t.element_size() for t in (q_index, k_index, q, kv))
    read += 4 * (0 if indices is None else indices.numel())
    written = 4 * (q_index.numel() + k_index.numel() + 2 * weights.numel() + q.shape[0])
    return Cost(2.0 * pairs * work, read + written)


def _kl_invalid(
    q_index: Tensor, k_index: Tensor, weights: Tensor, q: Tensor, kv: Tensor,
    ks: Tensor | None = None, ke: Tensor | None = None, indices: Tensor | None = None,
    row_weight: Tensor | None = None, *, softmax_scale: float,
) -> str | None:  # fmt: skip
    given = [n for n, t in (("ks", ks), ("ke", ke), ("indices", indices)) if t is not None]
    if given not in (["ks", "ke"], ["indices"]):
        return (
            f"of ks, ke and indices {', '.join(given) or 'none'} came; expected ks and ke (every"
            " key of a range) or indices (selected keys)"
        )
    if q_index.dim() != 3 or q.dim() != 3:
        return (
            f"q_index has shape {list(q_index.shape)}, q {list(q.shape)}; expected"
            " [tokens, index_heads, index_dim] and [tokens, heads, dim]"
        )
    tokens, index_heads, index_dim = q_index.shape
    wrong = (
        floats(q_index=q_index, q=q)
        or typed(q_index.dtype, k_index=k_index)
        or typed(q.dtype, kv=kv)
        or typed(torch.float32, weights=weights, row_weight=row_weight)
        or typed(torch.int32, ks=ks, ke=ke, indices=indices)
        or shaped("q", q, tokens, "heads", "dim")
        or shaped("kv", kv, "context", q.shape[2])
        or shaped("k_index", k_index, kv.shape[0], index_dim)
        or shaped("weights", weights, tokens, index_heads)
    )
    for name, t in (("ks", ks), ("ke", ke), ("row_weight", row_weight)):
        wrong = wrong or (shaped(name, t, tokens) if t is not None else None)
    if wrong is None and indices is not None:
        wrong = shaped("indices", indices, tokens, indices.shape[-1] or "k")
    if wrong is None and not softmax_scale > 0:
        wrong = f"softmax_scale is {softmax_scale}; expected a positive number"
    return wrong


def _kl_unread(
    q_index: Tensor, k_index: Tensor, weights: Tensor, q: Tensor, kv: Tensor,
    ks: Tensor | None = None, ke: Tensor | None = None, indices: Tensor | None = None,
    row_weight: Tensor | None = None, *, softmax_scale: float,
) -> Mapping[str, Tensor]:  # fmt: skip
    if indices is not None:
        unread = unselected(indices, None, kv.shape[0])
    else:
        unread = ~in_range(ks, ke, kv.shape[0], kv.device).any(0)
    return {"k_index": unread, "kv": unread}


_TINY: dict[str, Any] = dict(index_heads=3, index_dim=24, heads=2, dim=40)


@op(
    version=1,
    constant=("index_heads", "heads", "k", "index_dim", "dim", "dtype", "ranges", "pattern",
              "sequence", "weighted", "spread"),
    variable={"tokens": "q_index[0]", "context": "kv[0]"},
    inputs=_kl_inputs,
    cases=(
        case("empty", tokens=0, context=64, **_TINY),
        case("no_context", tokens=3, context=0, **_TINY),
        case("one", tokens=1, context=1, **_TINY),
        case("small", tokens=19, context=19, dtype="fp32", **_TINY),
        case("sparse_small", tokens=19, context=30, k=7, dtype="fp32", pattern="holes", **_TINY),
        case("dense", tokens=33, context=70, index_heads=32, heads=8, traps=(3, 15)),
        case("head64", tokens=9, context=90, index_heads=8, index_dim=64, heads=4, dtype="fp32"),
        case("fp16", tokens=9, context=90, index_heads=8, heads=4, dtype="fp16"),
        case("ragged", tokens=40, context=150, index_heads=8, heads=4, ranges="ragged",
             weighted=True, traps=(15, 21)),
        case("beyond", tokens=6, context=90, index_heads=8, heads=4, ranges="beyond"),
        case("sequences", tokens=260, context=260, sequence=65, **_TINY),
        case("sparse", tokens=17, context=300, index_heads=32, heads=8, k=64, traps=(13,)),
        case("sparse_start", tokens=40, context=40, index_heads=8, heads=4, k=64,
             pattern="ascending", traps=(13,)),
        case("sparse_none", tokens=7, context=90, index_heads=8, heads=4, k=32,
             pattern="alternate", weighted=True),
        case("sparse_single", tokens=7, context=90, index_heads=8, heads=4, k=32,
             pattern="single"),
        case("sparse_far", tokens=70, context=6000, index_heads=8, heads=4, k=16, pattern="holes"),
        case("peaked", tokens=9, context=90, index_heads=8, heads=4, spread=8.0),
        case("warm_up", model=True, tokens=4096, context=8192, index_heads=64, heads=128),
        case("warm_up_batch", model=True, tokens=16384, context=16384, index_heads=32, heads=8,
             sequence=4096),
        case("sparse_batch", model=True, tokens=65536, context=65536, index_heads=32, heads=8,
             k=256, sequence=4096),
        case("sparse_32k", model=True, tokens=4096, context=32768, index_heads=64, heads=128,
             k=2048),
    ),
    check=judged(("loss", "dq_index", "dk_index", "dweights"), "q_index"),
    cost=_kl_cost,
    outputs=("loss", "dq_index", "dk_index", "dweights"),
    invalid=_kl_invalid,
    unread=_kl_unread,
)  # fmt: skip
def indexer_kl(
    q_index: Tensor, k_index: Tensor, weights: Tensor, q: Tensor, kv: Tensor,
    ks: Tensor | None = None, ke: Tensor | None = None, indices: Tensor | None = None,
    row_weight: Tensor | None = None, *, softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The indexer's loss per query, and the gradients of its weighted sum, in one pass.

    I[t, s] = sum over heads h of weights[t, h] * ReLU(<q_index[t, h], k_index[s]>); p[t] = mean
    over heads of the softmax of softmax_scale * <q[t, h], kv[s]>, which takes no gradient;
    loss[t] = KL(p[t] || softmax(I[t])). Both softmaxes run over the keys allowed to query t.

    q_index      [tokens, index_heads, index_dim] bf16, fp16 or fp32
    k_index      [context, index_dim] q_index's dtype
    weights      [tokens, index_heads] fp32, all constants included, as in `indexer_logits`
    q            [tokens, heads, dim] bf16, fp16 or fp32, the absorbed queries of `sparse_mla`
    kv           [context, dim] q's dtype
    ks, ke       [tokens] int32 or None: the allowed keys are [ks, ke) clipped to [0, context), the
                 dense warm-up stage; they come together, or `indices` comes in their place
    indices      [tokens, k] int32 or None: the allowed keys, none twice; -1 = none; sparse stage
    row_weight   [tokens] fp32 or None (ones): what each query's loss counts in the gradients
    softmax_scale  multiplies q . kv
    -> loss      [tokens] fp32, not weighted; 0 for a query without keys
    -> dq_index  [tokens, index_heads, index_dim] fp32, like the next two of sum(row_weight * loss)
    -> dk_index  [context, index_dim] fp32
    -> dweights  [tokens, index_heads] fp32

    Source: the paper, section 2.1.
    """
    tokens, context = q.shape[0], kv.shape[0]
    dtype = wide(q_index[:0]).dtype
    loss = torch.empty(tokens, dtype=dtype, device=q.device)
    dq_index = torch.empty(q_index.shape, dtype=dtype, device=q.device)
    dk_index = torch.zeros(k_index.shape, dtype=dtype, device=q.device)
    dweights = torch.empty(weights.shape, dtype=dtype, device=q.device)
    row_weight = torch.ones_like(loss) if row_weight is None else row_weight
    per_key = 2 * (q.shape[1] + q_index.shape[1])
    row_elements = per_key * context
    if indices is not None:
        row_elements = indices.shape[1] * (per_key + 2 * (q.shape[2] + q_index.shape[2]))
    for rows in row_blocks(tokens, row_elements):
        if indices is None:
            assert ks is not None and ke is not None
            allowed, keys = in_range(ks[rows], ke[rows], context, q.device), wide(kv)
        else:
            allowed, keys = indices[rows] >= 0, picked_keys(wide(kv), indices[rows])

        def divergence(
            q_index: Tensor, k_index: Tensor, weights: Tensor, rows: slice = rows,
            keys: Tensor = keys, allowed: Tensor = allowed,
        ) -> Tensor:  # fmt: skip
            k_index = k_index if indices is None else picked_keys(k_index, indices[rows])
            query = wide(q[rows])
            return indexer_divergence(
                q_index, k_index, weights, query, keys, allowed, softmax_scale=softmax_scale
            )

        leaves = q_index[rows], k_index, weights[rows]
        loss[rows], parts = gradients(divergence, leaves, row_weight[rows])
        dq_index[rows], dweights[rows] = parts[0], parts[2]
        dk_index += parts[1]
    return loss, dq_index, dk_index, dweights
