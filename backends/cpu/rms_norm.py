"""rms_norm on the processor."""

import torch
from torch import Tensor

from dsa_hal.ops.norm import rms_norm


def normed(wide: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm of fp32 rows, as a new fp32 tensor."""
    length: Tensor = torch.linalg.vector_norm(wide, 2, -1, keepdim=True)
    factor = length.square_().mul_(1 / wide.shape[-1]).add_(eps).rsqrt_()
    return torch.mul(wide, factor).mul_(weight)


@rms_norm.impl("cpu", "torch", contract=1)
def forward(x: Tensor, weight: Tensor, *, eps: float = 1e-6) -> Tensor:
    return normed(x.float(), weight, eps).to(x.dtype)
