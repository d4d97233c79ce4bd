"""layer_norm on the processor."""

from torch import Tensor
from torch.nn import functional

from dsa_hal.ops.norm import layer_norm


@layer_norm.impl("cpu", "torch", contract=1)
def forward(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-6) -> Tensor:
    """torch's own, in fp32: its mixed form rounds the row before the weight is applied."""
    shape = x.shape[-1:]
    return functional.layer_norm(x.float(), shape, weight.float(), bias.float(), eps).to(x.dtype)
