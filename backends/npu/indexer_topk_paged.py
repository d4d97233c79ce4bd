"""indexer_topk_paged on Ascend."""

import torch
from torch import Tensor

from dsa_hal.backends.npu._attention import index_call, meta, meta_pool, unfit_keys
from dsa_hal.backends.npu._library import refusal
from dsa_hal.backends.npu.indexer_topk_varlen import chosen
from dsa_hal.ops.index_select import indexer_topk_paged


def _why_not(
    q: Tensor, pages: Tensor, weights: Tensor, context_lens: Tensor, block_table: Tensor,
    topk: int, *, layout: str, max_context_len: int, ties: str = "any", logits_mb: int = 64,
) -> str | None:  # fmt: skip
    if (reason := unfit_keys(layout)) is not None:
        return reason
    tokens = q.shape[0] * q.shape[1]
    name, arguments = index_call(
        meta(tokens, *q.shape[2:], dtype=q.dtype), meta_pool(pages),
        meta(*weights.shape, dtype=torch.float32), meta(tokens), meta(tokens),
        meta(tokens, block_table.shape[1]), topk, layout,
    )  # fmt: skip
    return refusal(name, **arguments)


@indexer_topk_paged.impl("npu", "lightning_indexer", contract=1, why_not=_why_not, promises=())
def select(
    q: Tensor, pages: Tensor, weights: Tensor, context_lens: Tensor, block_table: Tensor,
    topk: int, *, layout: str, max_context_len: int, ties: str = "any", logits_mb: int = 64,
) -> Tensor:  # fmt: skip
    """Every query token is a request of its own: its number of keys is its own, whatever that of
    its neighbour, and the kernel's rule for several tokens of a request does not apply. What it
    makes of a request without keys, whose weights may be anything, is not documented: it is given
    zeros, and -1 is written here."""
    batch, next_n = q.shape[:2]
    tokens = batch * next_n
    if not tokens or not block_table.numel():
        return torch.full((tokens, topk), -1, dtype=torch.int32, device=q.device)
    limits = context_lens.reshape(tokens).clamp(0, max_context_len)
    nobody = limits[:, None] <= 0
    found = chosen(
        q.reshape(tokens, *q.shape[2:]).contiguous(), pages, weights.masked_fill(nobody, 0),
        torch.arange(1, tokens + 1, dtype=torch.int32, device=q.device), limits,
        block_table.repeat_interleave(next_n, 0), topk, layout,
    )  # fmt: skip
    return found.masked_fill(nobody, -1)
