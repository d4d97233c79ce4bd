"""indexer_topk_paged on AMD Instinct."""

from torch import Tensor

from dsa_hal.backends.portable import layouts
from dsa_hal.backends.portable.index_select import paged
from dsa_hal.backends.portable.indexer_logits import paged_into
from dsa_hal.backends.portable.select import largest_into
from dsa_hal.backends.rocm import topk as _  # noqa: F401  which states how rows are cut
from dsa_hal.backends.rocm._tiles import ARCHES, NEEDS
from dsa_hal.ops.index_select import indexer_topk_paged


def _why_not(
    q: Tensor, pages: Tensor, weights: Tensor, context_lens: Tensor, block_table: Tensor,
    topk: int, *, layout: str, max_context_len: int, ties: str = "any", logits_mb: int = 64,
) -> str | None:  # fmt: skip
    return layouts.unknown(layout)


@indexer_topk_paged.impl(
    "rocm", "triton", contract=1, arch=ARCHES, needs=NEEDS,
    promises=("deterministic", "ties=lower"), why_not=_why_not,
)  # fmt: skip
def chunked(
    q: Tensor, pages: Tensor, weights: Tensor, context_lens: Tensor, block_table: Tensor,
    topk: int, *, layout: str, max_context_len: int, ties: str = "any", logits_mb: int = 64,
) -> Tensor:  # fmt: skip
    """Requests in chunks, whose scores share a workspace."""
    return paged(
        q, pages, weights, context_lens, block_table, topk, layout=layout,
        max_context_len=max_context_len, logits_mb=logits_mb, scores=paged_into,
        select=largest_into,
    )  # fmt: skip
