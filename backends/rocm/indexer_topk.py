"""indexer_topk on AMD Instinct."""

from torch import Tensor

from dsa_hal.backends.portable import layouts
from dsa_hal.backends.portable.index_select import ragged
from dsa_hal.backends.portable.indexer_logits import ragged_into
from dsa_hal.backends.portable.select import largest_into
from dsa_hal.backends.rocm import topk as _  # noqa: F401  which states how rows are cut
from dsa_hal.backends.rocm._tiles import ARCHES, NEEDS
from dsa_hal.ops.index_select import indexer_topk


def _why_not(
    q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, ks: Tensor, ke: Tensor, topk: int, *,
    ties: str = "any", logits_mb: int = 64,
) -> str | None:  # fmt: skip
    return layouts.coded(q)


@indexer_topk.impl(
    "rocm", "triton", contract=1, arch=ARCHES, needs=NEEDS,
    promises=("deterministic", "ties=lower"), why_not=_why_not,
)  # fmt: skip
def chunked(
    q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, ks: Tensor, ke: Tensor, topk: int, *,
    ties: str = "any", logits_mb: int = 64,
) -> Tensor:  # fmt: skip
    """Rows in chunks, whose scores share a workspace."""
    return ragged(
        q, k, k_scale, weights, ks, ke, topk, logits_mb=logits_mb, scores=ragged_into,
        select=largest_into,
    )  # fmt: skip
