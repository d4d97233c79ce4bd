"""rope on AMD Instinct."""

from torch import Tensor

from dsa_hal.backends.portable.rows import too_wide
from dsa_hal.backends.rocm._tiles import ARCHES, NEEDS
from dsa_hal.ops.norm import rope


def _why_not(
    x: Tensor, positions: Tensor, cos_sin: Tensor, *, interleaved: bool, offset: int = 0
) -> str | None:
    return too_wide(x.shape[-1], "a row")


@rope.impl("rocm", "triton", contract=1, arch=ARCHES, needs=NEEDS, why_not=_why_not)
def rotate(
    x: Tensor, positions: Tensor, cos_sin: Tensor, *, interleaved: bool, offset: int = 0
) -> Tensor:
    """Columns before, in and behind the rotated part, each in its own registers."""
    from dsa_hal.backends.portable._kernels.rope import rotated

    return rotated(x, positions, cos_sin, interleaved=interleaved, offset=offset)
