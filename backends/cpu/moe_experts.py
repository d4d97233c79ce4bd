"""moe_experts on the processor."""

import torch
from torch import Tensor
from torch.nn import functional

from dsa_hal.backends.cpu._product import packed_product, rounded, runs
from dsa_hal.ops.moe import moe_experts

ROOM = 1 << 28
"""Bytes of intermediate rows at a time."""


@moe_experts.impl("cpu", "torch", contract=1)
def experts(
    x: Tensor, ids: Tensor, weights: Tensor, w13: list[Tensor], w2: list[Tensor],
    shared: Tensor | None = None, *, act: str = "none",
) -> Tensor:  # fmt: skip
    """Rows sorted by expert, so that each expert hit is one product; as many tokens at a time as
    the room allows."""
    tokens, topk = ids.shape
    dim, inter = x.shape[1], w2[0].shape[2]
    step = max(1, ROOM // max(1, 4 * topk * (3 * dim + 4 * inter)))
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for at in range(0, tokens, step):
        part = slice(at, at + step)
        routed = _routed(x[part], ids[part], weights[part], w13, w2, act)
        out[part] = routed if shared is None else routed.add_(shared[part])
    return out


def _routed(
    x: Tensor, ids: Tensor, weights: Tensor, w13: list[Tensor], w2: list[Tensor], act: str
) -> Tensor:
    """The weighted sum over each token's experts, [tokens, dim] fp32, in the order of its ids."""
    tokens, topk = ids.shape
    flat = ids.reshape(-1)
    order = None if tokens == 1 else flat.argsort(stable=True)
    hit = runs(flat if order is None else flat[order], w13[0].shape[0], "moe_experts: ids, sorted")
    source = rounded(x, act)
    rows = source.expand(topk, -1) if order is None else source.index_select(0, order // topk)
    gate, up = _each(rows, w13, hit).chunk(2, -1)
    hidden = rounded(functional.silu(gate).mul_(up), act)
    if act == "none":
        hidden = hidden.to(x.dtype)
    done = _each(hidden, w2, hit)
    if sum(end - begin for _, begin, end in hit) < flat.shape[0]:
        weights = weights.masked_fill(ids < 0, 0.0)
    if order is None:
        return weights @ done
    back = torch.empty_like(order)
    back[order] = torch.arange(flat.shape[0])
    return torch.bmm(weights[:, None], done.index_select(0, back).view(tokens, topk, -1))[:, 0]


def _each(rows: Tensor, weight: list[Tensor], hit: list[tuple[int, int, int]]) -> Tensor:
    """Each stretch of rows times its own expert's weight, fp32; rows outside all stretches zero."""
    done = torch.empty(rows.shape[0], weight[0].shape[1])
    if sum(end - begin for _, begin, end in hit) < rows.shape[0]:
        done.zero_()
    for expert, begin, end in hit:
        done[begin:end] = packed_product(rows[begin:end], [part[expert] for part in weight])
    return done
