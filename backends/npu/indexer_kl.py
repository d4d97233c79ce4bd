"""indexer_kl on Ascend, in plain torch."""

from torch import Tensor

from dsa_hal.backends.npu._training import LIMITS
from dsa_hal.backends.portable.indexer import divergence
from dsa_hal.ops.training import indexer_kl


@indexer_kl.impl("npu", "torch", contract=1, rank=-1)
def loss_and_gradients(
    q_index: Tensor, k_index: Tensor, weights: Tensor, q: Tensor, kv: Tensor,
    ks: Tensor | None = None, ke: Tensor | None = None, indices: Tensor | None = None,
    row_weight: Tensor | None = None, *, softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """fp32 arithmetic; sums over queries go in their order, so that every call repeats."""
    return divergence(
        q_index, k_index, weights, q, kv, ks, ke, indices, row_weight,
        softmax_scale=softmax_scale, limits=LIMITS,
    )  # fmt: skip
