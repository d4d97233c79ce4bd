"""topk on NVIDIA GPUs."""

from torch import Tensor

from dsa_hal.backends.cuda._limits import LIMITS
from dsa_hal.backends.portable.topk import largest
from dsa_hal.ops.select import topk


@topk.impl("cuda", "torch", contract=1, promises=("deterministic", "ties=lower"))
def best(
    logits: Tensor, k: int, starts: Tensor | None = None, ends: Tensor | None = None, *,
    ties: str = "any",
) -> Tensor:  # fmt: skip
    """torch's own selection on masked copies of some rows."""
    return largest(logits, k, starts, ends, ties=ties, limits=LIMITS)
