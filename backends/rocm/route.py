"""route on AMD Instinct."""

from torch import Tensor

from dsa_hal.backends.portable.rows import too_many
from dsa_hal.backends.rocm._tiles import ARCHES, NEEDS
from dsa_hal.ops.routing import route


def _why_not(
    logits: Tensor, bias: Tensor | None = None, *, topk: int, groups: int = 1,
    topk_groups: int = 1, scale: float = 1.0, score: str = "sigmoid", normalize: bool = True,
) -> str | None:  # fmt: skip
    return too_many(logits.shape[1])


@route.impl("rocm", "triton", contract=1, arch=ARCHES, needs=NEEDS, why_not=_why_not)
def routed(
    logits: Tensor, bias: Tensor | None = None, *, topk: int, groups: int = 1,
    topk_groups: int = 1, scale: float = 1.0, score: str = "sigmoid", normalize: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One program per token."""
    from dsa_hal.backends.portable._kernels import routing

    return routing.routed(
        logits, bias, topk=topk, groups=groups, topk_groups=topk_groups, scale=scale, score=score,
        normalize=normalize,
    )  # fmt: skip
