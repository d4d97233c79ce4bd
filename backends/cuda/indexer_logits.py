"""indexer_logits on NVIDIA GPUs."""

from torch import Tensor

from dsa_hal.backends.cuda._limits import LIMITS
from dsa_hal.backends.portable.indexer import logits
from dsa_hal.ops.indexer import indexer_logits


@indexer_logits.impl("cuda", "torch", contract=1)
def scores(
    q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, ks: Tensor, ke: Tensor
) -> Tensor:
    """Products of FP8 and bf16 in bf16, of other dtypes in fp32."""
    return logits(q, k, k_scale, weights, ks, ke, LIMITS)
