"""permute on AMD Instinct."""

from torch import Tensor

from dsa_hal.backends.portable.rows import too_many
from dsa_hal.backends.rocm._tiles import ARCHES, NEEDS
from dsa_hal.ops.moe import permute, permuted_rows


def _why_not(x: Tensor, ids: Tensor, *, experts: int, align: int = 1) -> str | None:
    return too_many(experts)


@permute.impl("rocm", "triton", contract=1, arch=ARCHES, needs=NEEDS, why_not=_why_not)
def permuted(
    x: Tensor, ids: Tensor, *, experts: int, align: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """One program per token, or per part of a wide one."""
    from dsa_hal.backends.portable._kernels import moe

    rows = permuted_rows(ids.numel(), experts, align)
    return moe.permuted(x, ids, experts=experts, align=align, rows=rows)[:3]
