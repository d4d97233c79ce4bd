"""latent_qkv on AMD Instinct."""

from torch import Tensor

from dsa_hal.backends.portable.rows import too_wide
from dsa_hal.backends.rocm._tiles import ARCHES, NEEDS
from dsa_hal.ops.fused import latent_qkv


def _why_not(
    q_a: Tensor, kv_a: Tensor, q_weight: Tensor, kv_weight: Tensor, positions: Tensor,
    cos_sin: Tensor, *, eps: float = 1e-6,
) -> str | None:  # fmt: skip
    return too_wide(max(q_a.shape[1], kv_a.shape[1]), "a row")


@latent_qkv.impl("rocm", "triton", contract=1, arch=ARCHES, needs=NEEDS, why_not=_why_not)
def forward(
    q_a: Tensor, kv_a: Tensor, q_weight: Tensor, kv_weight: Tensor, positions: Tensor,
    cos_sin: Tensor, *, eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Both norms and the rotation in one launch."""
    from dsa_hal.backends.portable._kernels.norm import latents

    return latents(q_a, kv_a, q_weight, kv_weight, positions, cos_sin, eps)
