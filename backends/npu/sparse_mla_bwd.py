"""sparse_mla_bwd on Ascend, in plain torch."""

from torch import Tensor

from dsa_hal.backends.npu._training import LIMITS
from dsa_hal.backends.portable.sparse_mla import backward
from dsa_hal.ops.training import sparse_mla_bwd


@sparse_mla_bwd.impl("npu", "torch", contract=1, rank=-1)
def gradients(
    q: Tensor, kv: Tensor, indices: Tensor, out: Tensor, lse: Tensor, dout: Tensor, *,
    softmax_scale: float, dim_v: int = 512, topk_length: Tensor | None = None,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """fp32 arithmetic; sums over queries go in their order, so that every call repeats."""
    return backward(
        q, kv, indices, out, lse, dout, softmax_scale=softmax_scale, dim_v=dim_v,
        topk_length=topk_length, limits=LIMITS,
    )  # fmt: skip
