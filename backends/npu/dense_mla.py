"""dense_mla on Ascend, in plain torch: no model runs it there."""

from torch import Tensor

from dsa_hal.backends.npu._rows import by_chunks
from dsa_hal.ops.dense import dense_mla


@dense_mla.impl("npu", "torch", contract=1, rank=-1, promises=("deterministic", "lse=natural"))
def by_rows(
    q: Tensor, kv: Tensor, ks: Tensor, ke: Tensor, *, softmax_scale: float, dim_v: int = 512
) -> tuple[Tensor, Tensor]:
    """Some queries at a time, with all keys."""

    def some(rows: slice) -> tuple[Tensor, Tensor]:
        return dense_mla.reference(
            q[rows], kv, ks[rows], ke[rows], softmax_scale=softmax_scale, dim_v=dim_v
        )

    out, lse = by_chunks(q.shape[0], 4 * q.shape[1] * (kv.shape[0] + 1), some)
    return out, lse
