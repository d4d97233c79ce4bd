"""indexer_kl on AMD Instinct."""

from torch import Tensor

from dsa_hal.backends.portable import indexer_kl as portable
from dsa_hal.backends.rocm._tiles import ARCHES, NEEDS
from dsa_hal.ops.training import indexer_kl


def _why_not(
    q_index: Tensor, k_index: Tensor, weights: Tensor, q: Tensor, kv: Tensor,
    ks: Tensor | None = None, ke: Tensor | None = None, indices: Tensor | None = None,
    row_weight: Tensor | None = None, *, softmax_scale: float,
) -> str | None:  # fmt: skip
    return portable.why_not(q_index, q)


@indexer_kl.impl(
    "rocm", "triton", contract=1, arch=ARCHES, needs=NEEDS, rank=2, promises=(),
    why_not=_why_not,
)  # fmt: skip
def tiled(
    q_index: Tensor, k_index: Tensor, weights: Tensor, q: Tensor, kv: Tensor,
    ks: Tensor | None = None, ke: Tensor | None = None, indices: Tensor | None = None,
    row_weight: Tensor | None = None, *, softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Five kernels, six for ranges of keys; gradients of keys are added up atomically."""
    return portable.divergence(
        q_index, k_index, weights, q, kv, ks, ke, indices, row_weight,
        softmax_scale=softmax_scale, repeats=False, precision="ieee",
    )  # fmt: skip


@indexer_kl.impl(
    "rocm", "triton_fixed", contract=1, arch=ARCHES, needs=NEEDS, rank=1,
    why_not=_why_not,
)  # fmt: skip
def repeating(
    q_index: Tensor, k_index: Tensor, weights: Tensor, q: Tensor, kv: Tensor,
    ks: Tensor | None = None, ke: Tensor | None = None, indices: Tensor | None = None,
    row_weight: Tensor | None = None, *, softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The same, added up in fixed point, whose sums do not depend on their order."""
    return portable.divergence(
        q_index, k_index, weights, q, kv, ks, ke, indices, row_weight,
        softmax_scale=softmax_scale, repeats=True, precision="ieee",
    )  # fmt: skip
