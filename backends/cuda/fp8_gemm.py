"""fp8_gemm on NVIDIA GPUs."""

import torch
from torch import Tensor

from dsa_hal.backends.cuda import _gemm, _nvrtc
from dsa_hal.backends.portable import gemm
from dsa_hal.ops.gemm import fp8_gemm


@fp8_gemm.impl("cuda", "triton", contract=1, needs=("triton>=3.6",))
def tiled(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fmt: skip
    """Any shape and stride, one program per tile."""
    return gemm.fp8(a, a_scale, b, b_scale, out_dtype)


def _why_not(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> str | None:  # fmt: skip
    return _gemm.weights_wrong(b)


@fp8_gemm.impl(
    "cuda", "cuda", contract=1, arch=("sm90",), needs=_nvrtc.NEEDS, rank=1, why_not=_why_not
)
def streamed(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fmt: skip
    """k is split where few tiles would leave processors idle."""
    return _gemm.fp8(a, a_scale, b, b_scale, out_dtype)


from dsa_hal.backends.cuda._adapters import cublas, deepgemm  # noqa: E402, F401
