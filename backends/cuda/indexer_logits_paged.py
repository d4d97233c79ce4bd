"""indexer_logits_paged on NVIDIA GPUs."""

from torch import Tensor

from dsa_hal.backends.portable import indexer_logits as portable
from dsa_hal.ops.indexer import indexer_logits_paged


@indexer_logits_paged.impl("cuda", "triton", contract=1, needs=("triton>=3.6",), rank=1)
def tiled(
    q: Tensor, pages: Tensor, weights: Tensor, context_lens: Tensor, block_table: Tensor, *,
    layout: str, max_context_len: int,
) -> Tensor:  # fmt: skip
    """Any dtype and page size; a program per request and tile of positions."""
    return portable.paged(q, pages, weights, context_lens, block_table, layout, max_context_len)


def into(
    out: Tensor, q: Tensor, pages: Tensor, weights: Tensor, context_lens: Tensor,
    block_table: Tensor, layout: str,
) -> None:  # fmt: skip
    """Scores into `out` [batch * next_n, columns] fp32, whose rows may lie apart; all of it is
    written. Limits are clipped to its columns."""
    portable.paged_into(out, q, pages, weights, context_lens, block_table, layout)
