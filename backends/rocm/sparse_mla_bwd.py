"""sparse_mla_bwd on AMD Instinct."""

from torch import Tensor

from dsa_hal.backends.portable import sparse_mla_bwd as portable
from dsa_hal.backends.rocm._tiles import ARCHES, NEEDS
from dsa_hal.ops.training import sparse_mla_bwd


def _why_not(
    q: Tensor, kv: Tensor, indices: Tensor, out: Tensor, lse: Tensor, dout: Tensor, *,
    softmax_scale: float, dim_v: int = 512, topk_length: Tensor | None = None,
    deterministic: bool = False,
) -> str | None:  # fmt: skip
    return portable.why_not(q.dtype)


@sparse_mla_bwd.impl(
    "rocm", "triton", contract=1, arch=ARCHES, needs=NEEDS, rank=2, promises=(),
    why_not=_why_not,
)  # fmt: skip
def tiled(
    q: Tensor, kv: Tensor, indices: Tensor, out: Tensor, lse: Tensor, dout: Tensor, *,
    softmax_scale: float, dim_v: int = 512, topk_length: Tensor | None = None,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A program per query and block of heads; gradients of keys are added up atomically."""
    return portable.differentiated(
        q, kv, indices, out, lse, dout, softmax_scale=softmax_scale, dim_v=dim_v,
        topk_length=topk_length, repeats=False, precision="ieee",
    )  # fmt: skip


@sparse_mla_bwd.impl(
    "rocm", "triton_fixed", contract=1, arch=ARCHES, needs=NEEDS, rank=1,
    why_not=_why_not,
)  # fmt: skip
def repeating(
    q: Tensor, kv: Tensor, indices: Tensor, out: Tensor, lse: Tensor, dout: Tensor, *,
    softmax_scale: float, dim_v: int = 512, topk_length: Tensor | None = None,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same, added up in fixed point, whose sums do not depend on their order."""
    return portable.differentiated(
        q, kv, indices, out, lse, dout, softmax_scale=softmax_scale, dim_v=dim_v,
        topk_length=topk_length, repeats=True, precision="ieee",
    )  # fmt: skip
