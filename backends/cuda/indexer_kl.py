"""indexer_kl on NVIDIA GPUs."""

from torch import Tensor

from dsa_hal.backends.cuda._limits import LIMITS, REPEATING
from dsa_hal.backends.portable.indexer import divergence
from dsa_hal.ops.training import indexer_kl


@indexer_kl.impl("cuda", "torch", contract=1, rank=1, promises=())
def loss_and_gradients(
    q_index: Tensor, k_index: Tensor, weights: Tensor, q: Tensor, kv: Tensor,
    ks: Tensor | None = None, ke: Tensor | None = None, indices: Tensor | None = None,
    row_weight: Tensor | None = None, *, softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Products of bf16 as they are, of other dtypes in fp32."""
    return divergence(
        q_index, k_index, weights, q, kv, ks, ke, indices, row_weight,
        softmax_scale=softmax_scale, limits=LIMITS,
    )  # fmt: skip


@indexer_kl.impl("cuda", "deterministic", contract=1)
def repeating(
    q_index: Tensor, k_index: Tensor, weights: Tensor, q: Tensor, kv: Tensor,
    ks: Tensor | None = None, ke: Tensor | None = None, indices: Tensor | None = None,
    row_weight: Tensor | None = None, *, softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The same, but gathered keys' gradients are sorted before they are summed."""
    return divergence(
        q_index, k_index, weights, q, kv, ks, ke, indices, row_weight,
        softmax_scale=softmax_scale, limits=REPEATING,
    )  # fmt: skip
