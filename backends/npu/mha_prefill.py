"""mha_prefill on Ascend, in plain torch: its model attends in the absorbed form alone."""

from torch import Tensor

from dsa_hal.backends.npu._rows import by_chunks
from dsa_hal.ops.dense import mha_prefill


@mha_prefill.impl("npu", "torch", contract=1, rank=-1, promises=("deterministic", "lse=natural"))
def by_rows(
    q: Tensor, k: Tensor, v: Tensor, ks: Tensor, ke: Tensor, indices: Tensor | None = None, *,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Some queries at a time, with all keys."""

    def some(rows: slice) -> tuple[Tensor, Tensor]:
        named = None if indices is None else indices[rows]
        return mha_prefill.reference(
            q[rows], k, v, ks[rows], ke[rows], named, softmax_scale=softmax_scale
        )

    out, lse = by_chunks(q.shape[0], 4 * q.shape[1] * (k.shape[0] + 1), some)
    return out, lse
