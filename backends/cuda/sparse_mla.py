"""sparse_mla on NVIDIA GPUs."""

from torch import Tensor

from dsa_hal.backends.cuda import _prefill
from dsa_hal.backends.portable import sparse_attention
from dsa_hal.backends.portable.sparse_attention import SPACE, STEPS, Steps, Tile
from dsa_hal.ops.attention import sparse_mla


def tiles(limits: object, *, heads: int, width: int, bytes: int) -> list[Tile]:
    """Tiles whose mean, [heads, width] in fp32, stays in registers."""
    block = 16 if heads <= 16 else 32 if heads <= 32 else 64
    large = width > 128
    return [Tile(block, 32 if large else 64, 8 if large and block == 64 else 4, 2)]


def in_steps(limits: object, *, heads: int, width: int, bytes: int) -> list[Steps]:
    """Products of fp32 made of three of TF32, which take registers."""
    return [Steps(16 if heads <= 16 else 32, 64, 4, 2, 32)]


SPACE.on("cuda", tiles)
STEPS.on("cuda", in_steps)


def _triton_why_not(
    q: Tensor, kv: Tensor, indices: Tensor, *, softmax_scale: float, dim_v: int = 512,
    attn_sink: Tensor | None = None, topk_length: Tensor | None = None,
) -> str | None:  # fmt: skip
    return sparse_attention.why_not(q.dtype, q.shape[2], dim_v)


@sparse_mla.impl(
    "cuda", "triton", contract=1, arch=("sm90",), needs=("triton>=3.6",), rank=1,
    promises=("deterministic", "lse=natural"), why_not=_triton_why_not,
)  # fmt: skip
def tiled(
    q: Tensor, kv: Tensor, indices: Tensor, *, softmax_scale: float, dim_v: int = 512,
    attn_sink: Tensor | None = None, topk_length: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """A program per query and block of heads; selected keys are gathered row by row."""
    return sparse_attention.attended(
        q, kv, indices, softmax_scale=softmax_scale, dim_v=dim_v, attn_sink=attn_sink,
        topk_length=topk_length, precision="tf32x3",
    )  # fmt: skip


def _cuda_why_not(
    q: Tensor, kv: Tensor, indices: Tensor, *, softmax_scale: float, dim_v: int = 512,
    attn_sink: Tensor | None = None, topk_length: Tensor | None = None,
) -> str | None:  # fmt: skip
    return _prefill.why_not(q.dtype, q.shape[2], dim_v)


@sparse_mla.impl(
    "cuda", "cuda", contract=1, arch=("sm90",), needs=_prefill.NEEDS, rank=2,
    promises=("deterministic", "lse=natural"), why_not=_cuda_why_not,
)  # fmt: skip
def staged(
    q: Tensor, kv: Tensor, indices: Tensor, *, softmax_scale: float, dim_v: int = 512,
    attn_sink: Tensor | None = None, topk_length: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Persistent blocks for 64 heads of a query, filled up where there are fewer: four warpgroups
    gather, score and mix at the same time."""
    return _prefill.selected(
        q, kv, indices, softmax_scale=softmax_scale, attn_sink=attn_sink, topk_length=topk_length
    )


from dsa_hal.backends.cuda._adapters import flashmla  # noqa: E402, F401
