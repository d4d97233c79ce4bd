"""sparse_mla on NVIDIA GPUs."""

import torch
from torch import Tensor

from dsa_hal.backends.cuda import _prefill
from dsa_hal.backends.cuda._dense import power_of_two, without_gaps
from dsa_hal.backends.cuda._limits import LIMITS
from dsa_hal.backends.portable.sparse_mla import forward
from dsa_hal.ops.attention import sparse_mla

WIDEST = 512
"""Columns of a value that the Triton body holds in registers."""


@sparse_mla.impl("cuda", "torch", contract=1, promises=("deterministic", "lse=natural"))
def sparse(
    q: Tensor, kv: Tensor, indices: Tensor, *, softmax_scale: float, dim_v: int = 512,
    attn_sink: Tensor | None = None, topk_length: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Products of bf16 as they are, of other dtypes in fp32."""
    return forward(
        q, kv, indices, softmax_scale=softmax_scale, dim_v=dim_v, attn_sink=attn_sink,
        topk_length=topk_length, limits=LIMITS,
    )  # fmt: skip


def _triton_why_not(
    q: Tensor, kv: Tensor, indices: Tensor, *, softmax_scale: float, dim_v: int = 512,
    attn_sink: Tensor | None = None, topk_length: Tensor | None = None,
) -> str | None:  # fmt: skip
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"q is {q.dtype}; it takes bfloat16 and float16"
    if dim_v > WIDEST or q.shape[2] - dim_v > WIDEST:
        return (
            f"keys have {dim_v} and {q.shape[2] - dim_v} columns; it takes up to {WIDEST} of each"
        )
    return None


@sparse_mla.impl(
    "cuda", "triton", contract=1, arch=("sm90",), needs=("triton>=3.6",), rank=1,
    promises=("deterministic", "lse=natural"), why_not=_triton_why_not,
)  # fmt: skip
def tiled(
    q: Tensor, kv: Tensor, indices: Tensor, *, softmax_scale: float, dim_v: int = 512,
    attn_sink: Tensor | None = None, topk_length: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """A program per query and block of heads; selected keys are gathered row by row."""
    from dsa_hal.backends.portable._kernels import sparse_mla as kernels

    (tokens, heads, dim), k = q.shape, indices.shape[1]
    q, kv, indices = without_gaps(q), without_gaps(kv), without_gaps(indices)
    lengths = None if topk_length is None else without_gaps(topk_length)
    sink = None if attn_sink is None else without_gaps(attn_sink)
    out = torch.empty(tokens, heads, dim_v, dtype=q.dtype, device=q.device)
    top = torch.empty(tokens, heads, device=q.device)
    lse = torch.empty(tokens, heads, device=q.device)
    if tokens == 0:
        return out, top, lse
    large = dim_v > 128
    block = 16 if heads <= 16 else 32 if heads <= 32 else 64
    kernels.attend[(tokens * -(-heads // block),)](
        q, kv, indices, lengths, sink, out, top, lse,
        q.stride(0), q.stride(1), kv.stride(0), indices.stride(0), kv.shape[0], heads, k,
        softmax_scale, WIDTH=dim, VALUES=dim_v, VALUE_BLOCK=power_of_two(dim_v),
        REST_BLOCK=power_of_two(dim - dim_v), HAS_LENGTHS=lengths is not None,
        HAS_SINK=sink is not None, HEADS_BLOCK=block, KEYS_BLOCK=32 if large else 64,
        num_warps=8 if large and block == 64 else 4, num_stages=2,
    )  # fmt: skip
    return out, top, lse


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
