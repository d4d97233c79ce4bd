"""layer_norm on AMD Instinct."""

from torch import Tensor

from dsa_hal.backends.portable.rows import too_wide
from dsa_hal.backends.rocm._tiles import ARCHES, NEEDS
from dsa_hal.ops.norm import layer_norm


def _why_not(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-6) -> str | None:
    return too_wide(x.shape[-1], "a row")


@layer_norm.impl("rocm", "triton", contract=1, arch=ARCHES, needs=NEEDS, why_not=_why_not)
def forward(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Whole rows in registers; the variance is of differences from the mean."""
    from dsa_hal.backends.portable._kernels.norm import normed

    return normed(layer_norm.name, x, weight, bias, None, eps)[0]
