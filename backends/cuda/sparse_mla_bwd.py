"""sparse_mla_bwd on NVIDIA GPUs."""

from torch import Tensor

from dsa_hal.backends.cuda._limits import LIMITS, REPEATING
from dsa_hal.backends.portable.sparse_mla import backward
from dsa_hal.ops.training import sparse_mla_bwd


@sparse_mla_bwd.impl("cuda", "torch", contract=1, rank=1, promises=())
def gradients(
    q: Tensor, kv: Tensor, indices: Tensor, out: Tensor, lse: Tensor, dout: Tensor, *,
    softmax_scale: float, dim_v: int = 512, topk_length: Tensor | None = None,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Products of bf16 as they are, of other dtypes in fp32."""
    return backward(
        q, kv, indices, out, lse, dout, softmax_scale=softmax_scale, dim_v=dim_v,
        topk_length=topk_length, limits=LIMITS,
    )  # fmt: skip


@sparse_mla_bwd.impl("cuda", "deterministic", contract=1)
def repeating(
    q: Tensor, kv: Tensor, indices: Tensor, out: Tensor, lse: Tensor, dout: Tensor, *,
    softmax_scale: float, dim_v: int = 512, topk_length: Tensor | None = None,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same, but gathered keys' gradients are sorted before they are summed."""
    return backward(
        q, kv, indices, out, lse, dout, softmax_scale=softmax_scale, dim_v=dim_v,
        topk_length=topk_length, limits=REPEATING,
    )  # fmt: skip
