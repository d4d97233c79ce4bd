"""dense_mla on AMD Instinct."""

from torch import Tensor

from dsa_hal.backends.portable.dense import attended, why_not, without_gaps
from dsa_hal.backends.rocm._tiles import ARCHES, NEEDS
from dsa_hal.ops.dense import dense_mla


def _why_not(
    q: Tensor, kv: Tensor, ks: Tensor, ke: Tensor, *, softmax_scale: float, dim_v: int = 512
) -> str | None:
    return why_not(q.dtype, q.shape[2], dim_v)


@dense_mla.impl(
    "rocm", "triton", contract=1, arch=ARCHES, needs=NEEDS,
    promises=("deterministic", "lse=natural"), why_not=_why_not,
)  # fmt: skip
def dense(
    q: Tensor, kv: Tensor, ks: Tensor, ke: Tensor, *, softmax_scale: float, dim_v: int = 512
) -> tuple[Tensor, Tensor]:
    """All heads share the keys; keys are split among programs where rows are few."""
    kv = without_gaps(kv)  # its values are a part of it, and no copy of their own
    return attended(
        q, kv[:, None], kv[:, None, :dim_v], ks, ke, None, softmax_scale=softmax_scale, shared=True,
        precision="ieee",
    )  # fmt: skip
