"""mla_attention_varlen on Ascend."""

import torch
from torch import Tensor

from dsa_hal.backends.npu._attention import (
    absorbed,
    attention_call,
    held,
    keyed,
    meta,
    meta_pool,
    projected,
    unfit_latents,
)
from dsa_hal.backends.npu._library import call, refusal
from dsa_hal.ops.layout import KVLayout
from dsa_hal.ops.varlen import VARLEN, mla_attention_varlen


def _why_not(
    q: Tensor, kv_b: Tensor, pages: Tensor, positions: Tensor, cu_seqlens_q: Tensor,
    context_lens: Tensor, block_table: Tensor, *, softmax_scale: float, layout: str,
) -> str | None:  # fmt: skip
    requests = context_lens.shape[0]
    return refused(q, kv_b, pages, positions, requests, block_table.shape[1], softmax_scale, layout)


def refused(
    q: Tensor, kv_b: Tensor, pages: Tensor, indices: Tensor, requests: int, max_pages: int,
    softmax_scale: float, layout: str,
) -> str | None:  # fmt: skip
    """Why the device's attention does not take these arguments, or None."""
    if (reason := unfit_latents(layout)) is not None:
        return reason
    tokens, heads, _ = q.shape
    lora = kv_b.shape[2]
    name, arguments = attention_call(
        meta(tokens, heads, lora, dtype=q.dtype),
        meta(tokens, heads, KVLayout.parse(layout).width - lora, dtype=q.dtype),
        meta_pool(pages), layout, meta(*indices.shape), ends=meta(requests), lengths=meta(requests),
        block_table=meta(requests, max_pages), softmax_scale=softmax_scale, causal=True,
    )  # fmt: skip
    return refusal(name, **arguments)


@mla_attention_varlen.impl(
    "npu", "sparse_flash_attention", contract=1, why_not=_why_not, promises=(VARLEN,)
)
def attend(
    q: Tensor, kv_b: Tensor, pages: Tensor, positions: Tensor, cu_seqlens_q: Tensor,
    context_lens: Tensor, block_table: Tensor, *, softmax_scale: float, layout: str,
) -> Tensor:  # fmt: skip
    """Positions as they come from the indexer: the kernel looks up the pages itself."""
    return over_pages(
        q, kv_b, pages, layout, positions, ends=cu_seqlens_q[1:].contiguous(),
        lengths=held(cu_seqlens_q, context_lens), block_table=block_table.contiguous(),
        softmax_scale=softmax_scale, causal=True,
    )  # fmt: skip


def over_pages(
    q: Tensor, kv_b: Tensor, pages: Tensor, layout: str, indices: Tensor, *, ends: Tensor,
    lengths: Tensor, block_table: Tensor, softmax_scale: float, causal: bool,
) -> Tensor:  # fmt: skip
    """The three steps of `mla_attention` with the kernel in the middle; arguments as in
    `attention_call`."""
    tokens, heads, dim = q.shape
    nope = dim - (KVLayout.parse(layout).width - kv_b.shape[2])
    if not tokens or not block_table.numel():
        return q.new_zeros(tokens, heads, kv_b.shape[1] - nope)
    listed, nobody = keyed(indices)
    name, arguments = attention_call(
        *absorbed(q, kv_b, nope), pages, layout, listed, ends=ends, lengths=lengths,
        block_table=block_table, softmax_scale=softmax_scale, causal=causal,
    )  # fmt: skip
    result = call(name, **arguments)
    latent = result if isinstance(result, Tensor) else result[0]
    return projected(torch.where(nobody[..., None], 0, latent), kv_b, nope)
