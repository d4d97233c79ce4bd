"""add_rms_norm on AMD Instinct."""

from torch import Tensor

from dsa_hal.backends.portable.rows import too_wide
from dsa_hal.backends.rocm._tiles import ARCHES, NEEDS
from dsa_hal.ops.norm import add_rms_norm


def _why_not(x: Tensor, residual: Tensor, weight: Tensor, *, eps: float = 1e-6) -> str | None:
    return too_wide(x.shape[-1], "a row")


@add_rms_norm.impl("rocm", "triton", contract=1, arch=ARCHES, needs=NEEDS, why_not=_why_not)
def forward(
    x: Tensor, residual: Tensor, weight: Tensor, *, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Whole rows in registers, one launch."""
    from dsa_hal.backends.portable._kernels.norm import normed

    out, total = normed(add_rms_norm.name, x, weight, None, residual, eps)
    assert total is not None
    return out, total
