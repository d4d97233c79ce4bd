"""sparse_mla on the processor."""

import torch
from torch import Tensor

from dsa_hal.backends.cpu._sparse import WORKSPACE, attend
from dsa_hal.ops.attention import sparse_mla


@sparse_mla.impl("cpu", "torch", contract=1, promises=("deterministic", "lse=natural"))
def sparse(
    q: Tensor, kv: Tensor, indices: Tensor, *, softmax_scale: float, dim_v: int = 512,
    attn_sink: Tensor | None = None, topk_length: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """fp32 arithmetic. A context that is small beside the selection is widened once; otherwise only
    what was gathered is."""
    context = kv.shape[0]
    if kv.dtype != torch.float32 and 4 * kv.numel() <= 2 * WORKSPACE and context <= indices.numel():
        kv = kv.float()

    def gather(ids: Tensor, out: Tensor) -> None:
        if kv.dtype == torch.float32:
            torch.index_select(kv, 0, ids, out=out)
        else:
            out.copy_(torch.index_select(kv, 0, ids))

    return attend(
        q, indices, gather, context, softmax_scale=softmax_scale, dim_v=dim_v, attn_sink=attn_sink,
        topk_length=topk_length, asked="sparse_mla: indices",
    )  # fmt: skip
