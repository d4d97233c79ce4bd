"""layer_norm on Ascend."""

from torch import Tensor
from torch.nn import functional

from dsa_hal.ops.norm import layer_norm


@layer_norm.impl("npu", "native_layer_norm", contract=1)
def forward(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-6) -> Tensor:
    """torch's own, which torch_npu maps to the device's kernel, in fp32 and rounded once."""
    shape = x.shape[-1:]
    return functional.layer_norm(x.float(), shape, weight.float(), bias.float(), eps).to(x.dtype)
