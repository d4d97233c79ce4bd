"""mla_attention on the processor."""

import torch
from torch import Tensor

from dsa_hal.ops.absorbed import mla_attention
from dsa_hal.ops.attention import sparse_mla, sparse_mla_paged
from dsa_hal.ops.layout import KVLayout

GROUP = 16 << 20
"""Bytes of fp32 copies at a time; at least those of one head are made."""


@mla_attention.impl("cpu", "torch", contract=1)
def absorbed(
    q: Tensor, kv_b: Tensor, kv: Tensor, indices: Tensor, *, softmax_scale: float, layout: str = ""
) -> Tensor:
    """Both projections in fp32 over a few heads at a time. Where processors have no bf16 products,
    torch's bf16 `bmm` takes up to 50 times as long as widening the weight for every call."""
    tokens, heads, dim = q.shape
    lora = kv_b.shape[2]
    width = KVLayout.parse(layout).width if layout else kv.shape[1]
    nope = dim - (width - lora)
    own = 4 * (tokens * (max(nope, kv_b.shape[1] - nope) + lora) + kv_b[0].numel())
    step = max(1, GROUP // own)
    groups = [slice(head, head + step) for head in range(0, heads, step)]
    query = q.new_empty(tokens, heads, width)
    query[..., lora:] = q[..., nope:]
    for some in groups:
        into = torch.bmm(q[:, some, :nope].transpose(0, 1).float(), kv_b[some, :nope].float())
        query[:, some, :lora] = into.transpose(0, 1)
    if layout:
        paged, _ = sparse_mla_paged(
            query[:, None], kv, indices[:, None],
            layout=layout, softmax_scale=softmax_scale, dim_v=lora,
        )  # fmt: skip
        latent = paged[:, 0]
    else:
        latent, _, _ = sparse_mla(query, kv, indices, softmax_scale=softmax_scale, dim_v=lora)
    out = q.new_empty(tokens, heads, kv_b.shape[1] - nope)
    for some in groups:
        weight = kv_b[some, nope:].float().transpose(1, 2)
        out[:, some] = torch.bmm(latent[:, some].transpose(0, 1).float(), weight).transpose(0, 1)
    return out
