"""hadamard on AMD Instinct."""

from torch import Tensor

from dsa_hal.backends.portable.rows import too_wide
from dsa_hal.backends.rocm._tiles import ARCHES, NEEDS
from dsa_hal.ops.norm import hadamard


def _why_not(x: Tensor) -> str | None:
    return too_wide(x.shape[-1], "a row")


@hadamard.impl("rocm", "triton", contract=1, arch=ARCHES, needs=NEEDS, why_not=_why_not)
def forward(x: Tensor) -> Tensor:
    """A product with a matrix of signs, made in registers."""
    from dsa_hal.backends.portable._kernels.hadamard import transformed

    return transformed(x)
