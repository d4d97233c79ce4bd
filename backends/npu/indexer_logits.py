"""indexer_logits on Ascend, in plain torch: its indexer gives positions and never scores."""

from torch import Tensor

from dsa_hal.backends.npu._rows import by_chunks
from dsa_hal.ops.indexer import indexer_logits


@indexer_logits.impl("npu", "torch", contract=1, rank=-1)
def by_rows(
    q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, ks: Tensor, ke: Tensor
) -> Tensor:
    """Some query tokens at a time, with all keys."""

    def some(rows: slice) -> tuple[Tensor]:
        found = indexer_logits.reference(q[rows], k, k_scale, weights[rows], ks[rows], ke[rows])
        return (found,)

    (logits,) = by_chunks(q.shape[0], 4 * q.shape[1] * k.shape[0], some)
    return logits
