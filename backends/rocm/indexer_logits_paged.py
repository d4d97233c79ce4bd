"""indexer_logits_paged on AMD Instinct."""

from torch import Tensor

from dsa_hal.backends.portable import indexer_logits as portable
from dsa_hal.backends.portable import layouts
from dsa_hal.backends.rocm._tiles import ARCHES, NEEDS
from dsa_hal.ops.indexer import indexer_logits_paged


def _why_not(
    q: Tensor, pages: Tensor, weights: Tensor, context_lens: Tensor, block_table: Tensor, *,
    layout: str, max_context_len: int,
) -> str | None:  # fmt: skip
    return layouts.unknown(layout)


@indexer_logits_paged.impl("rocm", "triton", contract=1, arch=ARCHES, needs=NEEDS, why_not=_why_not)
def tiled(
    q: Tensor, pages: Tensor, weights: Tensor, context_lens: Tensor, block_table: Tensor, *,
    layout: str, max_context_len: int,
) -> Tensor:  # fmt: skip
    """Any dtype and page size; a program per request and tile of positions."""
    return portable.paged(q, pages, weights, context_lens, block_table, layout, max_context_len)


from dsa_hal.backends.rocm._adapters import aiter  # noqa: E402, F401
