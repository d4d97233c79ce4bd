"""topk on AMD Instinct."""

from torch import Tensor

from dsa_hal.backends.portable import select as portable
from dsa_hal.backends.rocm._tiles import ARCHES, NEEDS
from dsa_hal.ops.select import topk
from dsa_hal.target import Architecture


def _pieces(
    limits: Architecture, *, rows: int, n: int, k: int, processors: int
) -> list[portable.Config]:
    """As anywhere, by the lanes of a wavefront, with up to 32 scores to each: with 64 the compiler
    spills."""
    found = portable.legal(rows=rows, n=n, k=k, processors=processors, lanes=limits.lanes)
    return [c for c in found if c.held <= 32 * limits.lanes * c.warps]


portable.SPACE.on("rocm", _pieces)


@topk.impl(
    "rocm", "triton", contract=1, arch=ARCHES, needs=NEEDS,
    promises=("deterministic", "ties=lower"),
)  # fmt: skip
def select(
    logits: Tensor, k: int, starts: Tensor | None = None, ends: Tensor | None = None, *,
    ties: str = "any",
) -> Tensor:  # fmt: skip
    """Columns in ascending order; of equal scores always the lower columns."""
    return portable.largest(logits, k, starts, ends)


from dsa_hal.backends.rocm._adapters import aiter  # noqa: E402, F401
