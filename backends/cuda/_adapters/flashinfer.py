"""FlashInfer's top-k behind `topk`.

It knows ranges per row and fills up with -1, but it selects -inf where a row has nothing better and
ranks NaN as a number. So NaN becomes -inf in a copy of the scores before, and what is -inf leaves
the result after: a pass over the scores, and some over the columns, that its own users do not pay.
"""

import torch
from torch import Tensor

from dsa_hal.backends.portable.library import imported
from dsa_hal.ops.select import topk

MAX_K = 2048
"""Above this its native kernels refuse rules for ties."""

LOWER = 1
"""Its number for the rule that of equal scores the lower column is selected."""


def _why_not(
    logits: Tensor, k: int, starts: Tensor | None = None, ends: Tensor | None = None, *,
    ties: str = "any",
) -> str | None:  # fmt: skip
    if k > MAX_K:
        return f"k is {k}; the FlashInfer adapter takes up to {MAX_K}"
    module = imported("flashinfer")
    return module if isinstance(module, str) else None


@topk.impl(
    "cuda", "flashinfer", contract=1, arch=("sm90",), needs=("flashinfer-python>=0.7",), rank=5,
    promises=("ties=lower",), why_not=_why_not,
)  # fmt: skip
def best(
    logits: Tensor, k: int, starts: Tensor | None = None, ends: Tensor | None = None, *,
    ties: str = "any",
) -> Tensor:  # fmt: skip
    """`top_k_ragged_transform`. Whatever rule is asked for, ties go to lower columns, so that the
    selection repeats; the order of the columns does not."""
    rows, n = logits.shape
    if not rows or not n:
        return torch.full((rows, k), -1, dtype=torch.int32, device=logits.device)
    module = imported("flashinfer")
    if isinstance(module, str):
        raise ImportError(module)
    scores = (
        logits.float().contiguous().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    )
    zeros = torch.zeros(rows, dtype=torch.int32, device=logits.device)
    first = zeros if starts is None else starts.clamp(0, n)
    last = zeros + n if ends is None else ends.clamp(0, n)
    columns: Tensor = module.top_k_ragged_transform(
        scores, first, (last - first).clamp_min_(0), k, tie_break=LOWER,
        row_starts=None if starts is None else first,
    )  # fmt: skip
    found = scores.gather(1, columns.clamp_min(0).long()) > -torch.inf
    return _to_the_front(columns, found & (columns >= 0))


def _to_the_front(columns: Tensor, kept: Tensor) -> Tensor:
    """The `kept` entries of `columns` [rows, k] in their order, then -1."""
    k = columns.shape[1]
    place = torch.where(kept, kept.cumsum(1) - 1, k)
    out = torch.full((columns.shape[0], k + 1), -1, dtype=columns.dtype, device=columns.device)
    return out.scatter_(1, place, columns)[:, :k]
