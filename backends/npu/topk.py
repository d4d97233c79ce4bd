"""topk on Ascend, in plain torch: the device's selections have no ranges and no rule for ties."""

from torch import Tensor

from dsa_hal.backends.npu._rows import by_chunks
from dsa_hal.ops.select import topk


@topk.impl("npu", "torch", contract=1, rank=-1, promises=("deterministic", "ties=lower"))
def by_rows(
    logits: Tensor, k: int, starts: Tensor | None = None, ends: Tensor | None = None, *,
    ties: str = "any",
) -> Tensor:  # fmt: skip
    """Some rows at a time, sorted as a whole and stably: of equal scores the lower column is
    first."""

    def some(rows: slice) -> tuple[Tensor]:
        first, last = (None if bound is None else bound[rows] for bound in (starts, ends))
        return (topk.reference(logits[rows], k, first, last, ties=ties),)

    (columns,) = by_chunks(logits.shape[0], 16 * logits.shape[1], some)
    return columns
