"""What the attention ops share: inputs of their cases, and the definition in fp32."""

import torch
from torch import Tensor

from dsa_hal.case import Maker
from dsa_hal.ops.layout import KVLayout

SOFTMAX_SCALE = 0.13523378
"""The model's: 192^-0.5 times YaRN's squared mscale (1.8738542). No op has it as its default, or
another: the usual guess, the absorbed head size to the power -0.5, would be silently wrong."""

FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
KEY_SCALE = 0.1
"""Deviation of the keys that cases use."""


# -- inputs of cases ----------------------------------------------------------------------------


def queries(
    make: Maker, *shape: int, dtype: torch.dtype, softmax_scale: float, spread: float
) -> Tensor:
    """Queries [..., dim] whose scores against keys of deviation 0.1 have deviation `spread` after
    scaling. Flat scores would give nearly the same result under a wrong scale."""
    scale = spread / (softmax_scale * KEY_SCALE * shape[-1] ** 0.5)
    return make.randn(*shape, dtype=dtype, scale=scale)


def selections(make: Maker, visible: list[int], k: int, pattern: str) -> Tensor:
    """Choices of up to k among each row's first `visible` keys, int32 [rows, k], no key twice.

    pattern  "ascending" (-1 at the end), "shuffled" (-1 of short rows anywhere), "holes" (some of
             the chosen become -1), "alternate" (every other row has no key), "single" (one key)
    """
    count = make.tensor(visible, torch.int64)[:, None]
    column = torch.arange(k, device=make.device)
    chosen = count.clamp(max=k)
    at = torch.minimum(column, chosen - 1).clamp(min=0)
    low, high = at * count // chosen.clamp(min=1), (at + 1) * count // chosen.clamp(min=1)
    some = make.randint(0, 1 << 30, len(visible), k, dtype=torch.int64)
    index = torch.where(column < chosen, low + some % (high - low).clamp(min=1), -1)
    if pattern != "ascending":
        index = index[:, make.permutation(k, dtype=torch.int64)]
    if pattern == "holes":
        index = torch.where(make.randint(0, 4, *index.shape) == 0, -1, index)
    if pattern == "alternate":
        index[::2] = -1
    if pattern == "single":
        index = torch.where(column == k // 2, index, -1)
    return index.to(torch.int32)


def cut_short(make: Maker, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Lengths for the last axis of `indices`, and `indices` with two sorts of garbage behind them:
    keys that count for nobody, and the largest integer."""
    rows, k = indices.flatten(0, -2).shape
    lengths = make.tensor([make.pick.randint(0, k) for _ in range(rows)])
    lengths = lengths.view(indices.shape[:-1])
    column = torch.arange(k, device=indices.device)
    behind = (column >= lengths[..., None]) & (column % 2 == 0)
    return lengths, torch.where(behind, torch.iinfo(torch.int32).max, indices)


def sinks(make: Maker, heads: int) -> Tensor:
    """Sink logits fp32 [heads]; with several heads the first is -inf (no sink), the last +inf."""
    sink = make.randn(heads, scale=3)
    if heads > 1:
        sink[0], sink[-1] = -torch.inf, torch.inf
    return sink


def pool(make: Maker, layout: str, pages: int, page_size: int) -> Tensor:
    """A pool in `layout` filled with keys. Large pools repeat a block of 257 pages, a prime, so
    that an address which lost its upper bits does not find the same content."""
    form = KVLayout.parse(layout)
    own = min(pages, 257)
    values = make.randn(own, page_size, form.width, scale=KEY_SCALE)
    block = form.empty(own, page_size, make.device)
    views = form.views(block)
    for name, part in form.encode(values).items():
        views[name].copy_(part)
    if own == pages:
        return block
    at = torch.arange(pages, device=make.device) % own
    if form.order != "split":
        return block[at]
    whole = form.empty(pages, page_size, make.device)
    for name, part in form.views(whole).items():
        part.copy_(views[name][at])
    return whole


def placed(make: Maker, logical: Tensor, requests: int, pages: int, page_size: int) -> Tensor:
    """Slots for `logical` [requests, ..., k], positions in each request's own text: its pages lie
    anywhere in a pool of requests * pages pages. -1 stays."""
    table = make.permutation(requests * pages, dtype=torch.int64).view(requests, pages)
    at = logical.flatten(1).long().clamp(min=0)
    slots = table.gather(1, at // page_size) * page_size + at % page_size
    return torch.where(logical < 0, -1, slots.view(logical.shape)).to(torch.int32)


# -- the definition -----------------------------------------------------------------------------


def softmax_attention(
    q: Tensor, keys: Tensor, values: Tensor, valid: Tensor, softmax_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, in fp32: q [..., heads, dim], keys [..., k, dim], values [..., k, dim_v],
    valid bool that broadcasts to [..., heads, k] -> out [..., heads, dim_v], max_logits and lse
    [..., heads]. Rows without a valid key: out 0, max_logits -inf, lse +inf."""
    scores = torch.einsum("...hd,...kd->...hk", q.float(), keys.float()) * softmax_scale
    scores = scores.masked_fill(~valid, -torch.inf)
    top, lse = scores.amax(-1), scores.logsumexp(-1)
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    weights = torch.exp(scores - lse[..., None])
    return torch.einsum("...hk,...kv->...hv", weights, values.float()), top, lse


def sunk(out: Tensor, lse: Tensor, attn_sink: Tensor | None) -> Tensor:
    """`out` [..., heads, dim_v] less what a key of score `attn_sink` and value 0 would take."""
    if attn_sink is None:
        return out
    kept = 1 / (1 + torch.exp(attn_sink - lse))
    return out * kept.masked_fill(lse == torch.inf, 0)[..., None]


def chosen_of(indices: Tensor, topk_length: Tensor | None) -> Tensor:
    """Which entries of `indices` [..., k] name a key: not -1, and not behind the length."""
    valid = indices >= 0
    if topk_length is None:
        return valid
    return valid & (torch.arange(indices.shape[-1], device=indices.device) < topk_length[..., None])


def unselected(indices: Tensor, topk_length: Tensor | None, count: int) -> Tensor:
    """Mask [count] of the rows or slots that no entry names."""
    free = torch.ones(count + 1, dtype=torch.bool, device=indices.device)
    free[torch.where(chosen_of(indices, topk_length), indices, count).long()] = False
    return free[:count]


def attended(indices: Tensor, topk_length: Tensor | None) -> int:
    """Pairs of a query and a key; on the meta device, which shows no -1, the most possible."""
    if indices.device.type == "meta":
        return indices.numel()
    return int(chosen_of(indices, topk_length).sum())


def misshapen(
    q: Tensor, indices: Tensor, dim: int, dim_v: int, softmax_scale: float,
    attn_sink: Tensor | None, topk_length: Tensor | None,
) -> str | None:  # fmt: skip
    """Which demand of sparse attention q [..., heads, dim] and indices [..., k] break, or None."""
    rows, heads = list(q.shape[:-2]), q.shape[-2]
    if q.dtype not in FLOATS.values():
        return f"q is {q.dtype}; expected bfloat16, float16 or float32"
    if q.shape[-1] != dim or not 0 < dim_v <= dim:
        return f"q has {q.shape[-1]} columns and dim_v is {dim_v}, where a key has {dim} columns"
    if indices.dtype != torch.int32 or list(indices.shape[:-1]) != rows or not indices.shape[-1]:
        return f"indices are {indices.dtype} {list(indices.shape)}; expected int32 {[*rows, 'k']}"
    if not softmax_scale > 0:
        return f"softmax_scale is {softmax_scale}; expected a positive number"
    if attn_sink is not None and (attn_sink.dtype, *attn_sink.shape) != (torch.float32, heads):
        return f"attn_sink is {attn_sink.dtype} {list(attn_sink.shape)}; expected float32 [{heads}]"
    if topk_length is not None and (topk_length.dtype, *topk_length.shape) != (torch.int32, *rows):
        found = f"{topk_length.dtype} {list(topk_length.shape)}"
        return f"topk_length is {found}; expected int32 {rows}"
    return None
