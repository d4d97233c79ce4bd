"""unpermute on Ascend, in plain torch: the device's sum knows no absent rows, and takes weights
only in the rows' dtype."""

from torch import Tensor

from dsa_hal.backends.npu._rows import by_chunks
from dsa_hal.ops.moe import unpermute


@unpermute.impl("npu", "torch", contract=1, rank=-1)
def by_tokens(
    rows: Tensor, position: Tensor, weights: Tensor, shared: Tensor | None = None
) -> Tensor:
    """Some tokens at a time, their rows gathered in fp32."""

    def some(tokens: slice) -> tuple[Tensor]:
        mine = None if shared is None else shared[tokens]
        return (unpermute.reference(rows, position[tokens], weights[tokens], mine),)

    gathered = 12 * position.shape[1] * rows.shape[1]
    (out,) = by_chunks(position.shape[0], gathered, some)
    return out
