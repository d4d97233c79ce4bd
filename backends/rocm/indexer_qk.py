"""indexer_qk on AMD Instinct."""

from torch import Tensor

from dsa_hal.backends.portable.rows import wide_head
from dsa_hal.backends.rocm._tiles import ARCHES, NEEDS
from dsa_hal.ops.fused import indexer_qk


def _why_not(
    q: Tensor, k: Tensor, weights: Tensor, k_weight: Tensor, k_bias: Tensor, positions: Tensor,
    cos_sin: Tensor, *, interleaved: bool = False, quantize: str = "fp8", pow2: bool = True,
    eps: float = 1e-6,
) -> str | None:  # fmt: skip
    if quantize == "int8":
        return "queries are to be int8; it makes FP8 or floats"
    return wide_head(k.shape[1])


@indexer_qk.impl("rocm", "triton", contract=2, arch=ARCHES, needs=NEEDS, why_not=_why_not)
def forward(
    q: Tensor, k: Tensor, weights: Tensor, k_weight: Tensor, k_bias: Tensor, positions: Tensor,
    cos_sin: Tensor, *, interleaved: bool = False, quantize: str = "fp8", pow2: bool = True,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """All steps of queries, keys and weights in one launch."""
    from dsa_hal.backends.portable._kernels.preattention import indexer

    return indexer(
        q, k, weights, k_weight, k_bias, positions, cos_sin, interleaved=interleaved,
        quantize=quantize == "fp8", pow2=pow2, eps=eps,
    )  # fmt: skip
