"""mha_prefill on AMD Instinct."""

from torch import Tensor

from dsa_hal.backends.portable.dense import attended, why_not
from dsa_hal.backends.rocm._tiles import ARCHES, NEEDS
from dsa_hal.ops.dense import mha_prefill


def _why_not(
    q: Tensor, k: Tensor, v: Tensor, ks: Tensor, ke: Tensor, indices: Tensor | None = None, *,
    softmax_scale: float,
) -> str | None:  # fmt: skip
    return why_not(q.dtype, q.shape[2], v.shape[2])


@mha_prefill.impl(
    "rocm", "triton", contract=1, arch=ARCHES, needs=NEEDS,
    promises=("deterministic", "lse=natural"), why_not=_why_not,
)  # fmt: skip
def mha(
    q: Tensor, k: Tensor, v: Tensor, ks: Tensor, ke: Tensor, indices: Tensor | None = None, *,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A program per block of queries and head; `indices` become one bit per query and key."""
    return attended(
        q, k, v, ks, ke, indices, softmax_scale=softmax_scale, shared=False, precision="ieee"
    )
