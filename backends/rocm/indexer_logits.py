"""indexer_logits on AMD Instinct."""

from torch import Tensor

from dsa_hal.backends.portable import indexer_logits as portable
from dsa_hal.backends.portable import layouts
from dsa_hal.backends.rocm._tiles import ARCHES, NEEDS
from dsa_hal.ops.indexer import indexer_logits


def _why_not(
    q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, ks: Tensor, ke: Tensor
) -> str | None:
    return layouts.coded(q)


@indexer_logits.impl("rocm", "triton", contract=1, arch=ARCHES, needs=NEEDS, why_not=_why_not)
def tiled(q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, ks: Tensor, ke: Tensor) -> Tensor:
    """Any dtype; a program per tile of keys and some rows."""
    return portable.ragged(q, k, k_scale, weights, ks, ke)


from dsa_hal.backends.rocm._adapters import aiter  # noqa: E402, F401
