"""sparse_mla on NVIDIA GPUs."""

from torch import Tensor

from dsa_hal.backends.cuda._limits import LIMITS
from dsa_hal.backends.portable.sparse_mla import forward
from dsa_hal.ops.attention import sparse_mla


@sparse_mla.impl("cuda", "torch", contract=1, promises=("deterministic", "lse=natural"))
def sparse(
    q: Tensor, kv: Tensor, indices: Tensor, *, softmax_scale: float, dim_v: int = 512,
    attn_sink: Tensor | None = None, topk_length: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Products of bf16 as they are, of other dtypes in fp32."""
    return forward(
        q, kv, indices, softmax_scale=softmax_scale, dim_v=dim_v, attn_sink=attn_sink,
        topk_length=topk_length, limits=LIMITS,
    )  # fmt: skip
