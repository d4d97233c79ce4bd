"""mla_attention on AMD Instinct."""

from torch import Tensor

from dsa_hal.backends.portable import absorbed
from dsa_hal.backends.rocm._tiles import ARCHES, NEEDS
from dsa_hal.ops.absorbed import mla_attention


def _why_not(
    q: Tensor, kv_b: Tensor, kv: Tensor, indices: Tensor, *, softmax_scale: float, layout: str = ""
) -> str | None:
    return absorbed.why_not(q, kv_b, layout)


@mla_attention.impl("rocm", "triton", contract=1, arch=ARCHES, needs=NEEDS, why_not=_why_not)
def projected(
    q: Tensor, kv_b: Tensor, kv: Tensor, indices: Tensor, *, softmax_scale: float, layout: str = ""
) -> Tensor:
    """Products over heads of our own."""
    return absorbed.absorbed(
        q, kv_b, kv, indices, softmax_scale=softmax_scale, layout=layout,
        product=absorbed.by_triton("ieee"),
    )  # fmt: skip


@mla_attention.impl("rocm", "torch", contract=1, rank=1, why_not=_why_not)
def attend(
    q: Tensor, kv_b: Tensor, kv: Tensor, indices: Tensor, *, softmax_scale: float, layout: str = ""
) -> Tensor:
    """Both projections write where the next step reads."""
    return absorbed.absorbed(
        q, kv_b, kv, indices, softmax_scale=softmax_scale, layout=layout, product=absorbed.by_torch
    )
