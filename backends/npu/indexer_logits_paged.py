"""indexer_logits_paged on Ascend, in plain torch: its indexer gives positions and never scores."""

from torch import Tensor

from dsa_hal.ops.indexer import indexer_logits_paged


@indexer_logits_paged.impl("npu", "torch", contract=1, rank=-1)
def by_requests(
    q: Tensor, pages: Tensor, weights: Tensor, context_lens: Tensor, block_table: Tensor, *,
    layout: str, max_context_len: int,
) -> Tensor:  # fmt: skip
    """The reference: one request after another, whose pages are gathered."""
    return indexer_logits_paged.reference(
        q, pages, weights, context_lens, block_table, layout=layout,
        max_context_len=max_context_len,
    )  # fmt: skip
