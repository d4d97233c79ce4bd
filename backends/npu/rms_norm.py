"""rms_norm on Ascend."""

from torch import Tensor

from dsa_hal.backends.npu._library import call, refusal
from dsa_hal.backends.npu._products import like, meta
from dsa_hal.ops.norm import rms_norm


def refused(x: Tensor, weight: Tensor) -> str | None:
    """Why the kernel does not take rows of x's width and dtype with this weight."""
    return refusal("npu_rms_norm", input=meta(1, x.shape[-1], dtype=x.dtype), gamma=like(weight))


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The kernel on rows x [..., dim]."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    out: Tensor = call("npu_rms_norm", input=rows, gamma=weight.contiguous(), epsilon=eps)[0]
    return out.view(x.shape)


def _why_not(x: Tensor, weight: Tensor, *, eps: float = 1e-6) -> str | None:
    return refused(x, weight)


@rms_norm.impl("npu", "rms_norm", contract=1, why_not=_why_not)
def forward(x: Tensor, weight: Tensor, *, eps: float = 1e-6) -> Tensor:
    """An fp32 weight beside bf16 rows is documented."""
    return normed(x, weight, eps) if x.numel() else x.new_empty(x.shape)


rms_norm.impl("npu", "torch", contract=1, rank=-1)(rms_norm.reference)
