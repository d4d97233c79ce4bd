"""mla_attention on NVIDIA GPUs: both projections write where the next step reads."""

import torch
from torch import Tensor

from dsa_hal.ops.absorbed import mla_attention
from dsa_hal.ops.attention import sparse_mla, sparse_mla_paged
from dsa_hal.ops.layout import KVLayout


def _why_not(
    q: Tensor, kv_b: Tensor, kv: Tensor, indices: Tensor, *, softmax_scale: float, layout: str = ""
) -> str | None:
    if q.dtype == kv_b.dtype:
        return None
    return f"q is {q.dtype}, kv_b {kv_b.dtype}; it takes both of one dtype"


@mla_attention.impl("cuda", "torch", contract=1, rank=1, why_not=_why_not)
def absorbed(
    q: Tensor, kv_b: Tensor, kv: Tensor, indices: Tensor, *, softmax_scale: float, layout: str = ""
) -> Tensor:
    """cuBLAS's products over heads, whose results lie token by token: neither the absorbed queries
    nor the result are put together by a copy, which saves a fifth in prefill."""
    (tokens, heads, dim), lora = q.shape, kv_b.shape[2]
    width = KVLayout.parse(layout).width if layout else kv.shape[1]
    nope = dim - (width - lora)
    query = q.new_empty(tokens, heads, width)
    into = query[..., :lora].transpose(0, 1)
    torch.bmm(q[..., :nope].transpose(0, 1), kv_b[:, :nope], out=into)
    query[..., lora:] = q[..., nope:]
    if layout:
        paged, _ = sparse_mla_paged(
            query[:, None], kv, indices[:, None],
            layout=layout, softmax_scale=softmax_scale, dim_v=lora,
        )  # fmt: skip
        latent = paged[:, 0]
    else:
        latent, _, _ = sparse_mla(query, kv, indices, softmax_scale=softmax_scale, dim_v=lora)
    out = q.new_empty(tokens, heads, kv_b.shape[1] - nope)
    values = kv_b[:, nope:].transpose(1, 2)
    torch.bmm(latent.transpose(0, 1), values, out=out.transpose(0, 1))
    return out
