"""grouped_gemm on NVIDIA GPUs."""

import torch
from torch import Tensor

from dsa_hal.backends.cuda import _gemm, _nvrtc
from dsa_hal.backends.portable import gemm
from dsa_hal.ops.gemm import grouped_gemm


@grouped_gemm.impl("cuda", "triton", contract=1, needs=("triton>=3.6",))
def tiled(a: Tensor, b: Tensor, grouped_layout: Tensor) -> Tensor:
    """Any shape and stride, one program per tile, once for each group in the tile."""
    return gemm.grouped(a, b, grouped_layout)


def _why_not(a: Tensor, b: Tensor, grouped_layout: Tensor) -> str | None:
    if a.dtype == torch.float32:
        return "a is torch.float32; this kernel multiplies bfloat16 and float16"
    return _gemm.weights_wrong(b, multiple=8)


@grouped_gemm.impl(
    "cuda", "cuda", contract=1, arch=("sm90",), needs=_nvrtc.NEEDS, rank=1, why_not=_why_not
)
def streamed(a: Tensor, b: Tensor, grouped_layout: Tensor) -> Tensor:
    """Stretches of rows of one group are found on the device first."""
    return _gemm.grouped_floats(a, b, grouped_layout)
