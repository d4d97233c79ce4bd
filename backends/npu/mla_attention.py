"""mla_attention on Ascend."""

import torch
from torch import Tensor

from dsa_hal.backends.npu._attention import compacted
from dsa_hal.backends.npu.mla_attention_varlen import over_pages, refused
from dsa_hal.ops.absorbed import mla_attention


def _why_not(
    q: Tensor, kv_b: Tensor, kv: Tensor, indices: Tensor, *, softmax_scale: float, layout: str = ""
) -> str | None:
    if not layout:
        return "reads pages; keys that lie row by row are sparse_mla's, between two products"
    return refused(q, kv_b, kv, indices, 1, kv.shape[0], softmax_scale, layout)


@mla_attention.impl("npu", "sparse_flash_attention", contract=1, why_not=_why_not, promises=())
def attend(
    q: Tensor, kv_b: Tensor, kv: Tensor, indices: Tensor, *, softmax_scale: float, layout: str = ""
) -> Tensor:
    """The whole pool is one request whose pages stand in their own order, so that slots are its
    positions; none of them is behind another."""
    count, page_size = kv.shape[:2]
    one = torch.ones(1, dtype=torch.int32, device=q.device)
    return over_pages(
        q, kv_b, kv, layout, compacted(indices, None), ends=one * q.shape[0],
        lengths=one * (count * page_size),
        block_table=torch.arange(count, dtype=torch.int32, device=q.device)[None],
        softmax_scale=softmax_scale, causal=False,
    )  # fmt: skip
