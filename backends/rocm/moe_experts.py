"""moe_experts on AMD Instinct."""

from torch import Tensor

from dsa_hal.backends.portable import moe
from dsa_hal.backends.rocm._tiles import ARCHES, NEEDS
from dsa_hal.ops.moe import moe_experts


def _why_not(
    x: Tensor, ids: Tensor, weights: Tensor, w13: list[Tensor], w2: list[Tensor],
    shared: Tensor | None = None, *, act: str = "none",
) -> str | None:  # fmt: skip
    return moe.why_not(x, w13, w2, act)


@moe_experts.impl("rocm", "fused", contract=1, arch=ARCHES, needs=NEEDS, rank=1, why_not=_why_not)
def experts(
    x: Tensor, ids: Tensor, weights: Tensor, w13: list[Tensor], w2: list[Tensor],
    shared: Tensor | None = None, *, act: str = "none",
) -> Tensor:  # fmt: skip
    """Tokens are quantised before they are copied."""
    return moe.experts(x, ids, weights, w13, w2, shared, act)
