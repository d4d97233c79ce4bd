"""indexer_logits on NVIDIA GPUs."""

from torch import Tensor

from dsa_hal.backends.cuda._limits import LIMITS
from dsa_hal.backends.portable import indexer_logits as portable
from dsa_hal.backends.portable.indexer import logits
from dsa_hal.ops.indexer import indexer_logits


@indexer_logits.impl("cuda", "torch", contract=1)
def scores(
    q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, ks: Tensor, ke: Tensor
) -> Tensor:
    """Products of FP8 and bf16 in bf16, of other dtypes in fp32."""
    return logits(q, k, k_scale, weights, ks, ke, LIMITS)


@indexer_logits.impl("cuda", "triton", contract=1, needs=("triton>=3.6",), rank=1)
def tiled(
    q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, ks: Tensor, ke: Tensor
) -> Tensor:
    """Any dtype; a program per tile of keys and some rows."""
    return portable.ragged(q, k, k_scale, weights, ks, ke)


def into(
    out: Tensor, q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, ks: Tensor, ke: Tensor
) -> None:
    """Scores into `out` [tokens, context] fp32, whose rows may lie apart; all of it is written."""
    portable.ragged_into(out, q, k, k_scale, weights, ks, ke)
