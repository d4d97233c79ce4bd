"""indexer_topk_varlen on Ascend."""

import torch
from torch import Tensor

from dsa_hal.backends.npu._attention import held, index_call, meta, meta_pool, unfit_keys
from dsa_hal.backends.npu._library import call, refusal
from dsa_hal.ops.varlen import VARLEN, indexer_topk_varlen


def _why_not(
    q: Tensor, pages: Tensor, weights: Tensor, cu_seqlens_q: Tensor, context_lens: Tensor,
    block_table: Tensor, topk: int, *, layout: str, max_context_len: int, ties: str = "any",
    logits_mb: int = 64,
) -> str | None:  # fmt: skip
    if (reason := unfit_keys(layout)) is not None:
        return reason
    requests = context_lens.shape
    name, arguments = index_call(
        meta(*q.shape, dtype=q.dtype), meta_pool(pages), meta(*weights.shape, dtype=torch.float32),
        meta(*requests), meta(*requests), meta(*block_table.shape), topk, layout,
    )  # fmt: skip
    return refusal(name, **arguments)


@indexer_topk_varlen.impl(
    "npu", "lightning_indexer", contract=1, why_not=_why_not, promises=(VARLEN,)
)
def select(
    q: Tensor, pages: Tensor, weights: Tensor, cu_seqlens_q: Tensor, context_lens: Tensor,
    block_table: Tensor, topk: int, *, layout: str, max_context_len: int, ties: str = "any",
    logits_mb: int = 64,
) -> Tensor:  # fmt: skip
    """One call for all requests. No scores exist outside of it, so there is nothing to bound."""
    tokens = q.shape[0]
    if not tokens or not block_table.numel():
        return torch.full((tokens, topk), -1, dtype=torch.int32, device=q.device)
    return chosen(
        q.contiguous(), pages, weights, cu_seqlens_q[1:].contiguous(),
        held(cu_seqlens_q, context_lens), block_table.contiguous(), topk, layout,
    )  # fmt: skip


def chosen(
    q: Tensor, pages: Tensor, weights: Tensor, ends: Tensor, lengths: Tensor, block_table: Tensor,
    topk: int, layout: str,
) -> Tensor:  # fmt: skip
    """Positions [tokens, topk] int32; arguments as in `index_call`."""
    name, arguments = index_call(q, pages, weights, ends, lengths, block_table, topk, layout)
    result = call(name, **arguments)
    found: Tensor = result if isinstance(result, Tensor) else result[0]
    return found[:, 0]
