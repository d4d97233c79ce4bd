"""sparse_mla on AMD Instinct."""

from torch import Tensor

from dsa_hal.backends.portable import sparse_attention
from dsa_hal.backends.rocm._tiles import ARCHES, NEEDS
from dsa_hal.ops.attention import sparse_mla


def _why_not(
    q: Tensor, kv: Tensor, indices: Tensor, *, softmax_scale: float, dim_v: int = 512,
    attn_sink: Tensor | None = None, topk_length: Tensor | None = None,
) -> str | None:  # fmt: skip
    return sparse_attention.why_not(q.dtype, q.shape[2], dim_v)


@sparse_mla.impl(
    "rocm", "triton", contract=1, arch=ARCHES, needs=NEEDS,
    promises=("deterministic", "lse=natural"), why_not=_why_not,
)  # fmt: skip
def tiled(
    q: Tensor, kv: Tensor, indices: Tensor, *, softmax_scale: float, dim_v: int = 512,
    attn_sink: Tensor | None = None, topk_length: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """A program per query and block of heads; selected keys are gathered row by row."""
    return sparse_attention.attended(
        q, kv, indices, softmax_scale=softmax_scale, dim_v=dim_v, attn_sink=attn_sink,
        topk_length=topk_length, precision="ieee",
    )  # fmt: skip
