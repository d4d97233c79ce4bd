"""sparse_mla_bwd on NVIDIA GPUs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsa_hal.autotune.space import Space
from dsa_hal.backends.cuda._dense import power_of_two, without_gaps
from dsa_hal.backends.cuda._limits import LIMITS, REPEATING
from dsa_hal.backends.portable.sparse_mla import backward
from dsa_hal.ops.training import sparse_mla_bwd


@dataclass(frozen=True)
class Config:
    """Keys of a tile, warps and stages of a program."""

    keys: int
    warps: int
    stages: int


def _legal(*, rows: int, width: int) -> list[Config]:
    """For programs of so many heads with so many columns of a value."""
    if width <= 128:
        return [Config(32, 4, 1)]
    found = [Config(32, 8, 1), Config(16, 8, 1)]
    return [*found, Config(32, 8, 2)] if rows <= 16 else found  # two tiles of keys, if they fit


SPACE = Space("sparse_mla_bwd/triton", Config, _legal)


def _triton_why_not(
    q: Tensor, kv: Tensor, indices: Tensor, out: Tensor, lse: Tensor, dout: Tensor, *,
    softmax_scale: float, dim_v: int = 512, topk_length: Tensor | None = None,
    deterministic: bool = False,
) -> str | None:  # fmt: skip
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"q is {q.dtype}; it takes bfloat16 and float16"
    if dim_v > 512 or q.shape[2] - dim_v > 128:
        return f"keys have {dim_v} and {q.shape[2] - dim_v} columns; it takes up to 512 and 128"
    return None


@sparse_mla_bwd.impl(
    "cuda", "triton", contract=1, arch=("sm90",), needs=("triton>=3.6",), rank=2, promises=(),
    why_not=_triton_why_not,
)  # fmt: skip
def tiled(
    q: Tensor, kv: Tensor, indices: Tensor, out: Tensor, lse: Tensor, dout: Tensor, *,
    softmax_scale: float, dim_v: int = 512, topk_length: Tensor | None = None,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A program per query and block of heads; gradients of keys are added up atomically."""
    from dsa_hal.backends.portable._kernels import sparse_mla as kernels

    (tokens, heads, dim), k = q.shape, indices.shape[1]
    q, kv, indices, out, lse, dout = (without_gaps(t) for t in (q, kv, indices, out, lse, dout))
    lengths = None if topk_length is None else without_gaps(topk_length)
    dq = torch.empty(tokens, heads, dim, dtype=q.dtype, device=q.device)
    dkv = torch.zeros(kv.shape, device=q.device)
    if tokens == 0:
        return dq, dkv
    block = 16 if heads <= 16 else 32 if heads <= 32 else 64
    config = SPACE.pick(rows=block, width=dim_v)
    kernels.differentiate[(tokens * -(-heads // block),)](
        q, kv, indices, lengths, out, lse, dout, dq, dkv,
        q.stride(0), q.stride(1), kv.stride(0), indices.stride(0), out.stride(0), out.stride(1),
        lse.stride(0), dout.stride(0), dout.stride(1), kv.shape[0], heads, k, softmax_scale,
        WIDTH=dim, VALUES=dim_v, VALUE_BLOCK=power_of_two(dim_v),
        REST_BLOCK=power_of_two(dim - dim_v), HAS_LENGTHS=lengths is not None,
        HEADS_BLOCK=block, KEYS_BLOCK=config.keys, num_warps=config.warps,
        num_stages=config.stages,
    )  # fmt: skip
    return dq, dkv


@sparse_mla_bwd.impl("cuda", "torch", contract=1, rank=1, promises=())
def gradients(
    q: Tensor, kv: Tensor, indices: Tensor, out: Tensor, lse: Tensor, dout: Tensor, *,
    softmax_scale: float, dim_v: int = 512, topk_length: Tensor | None = None,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Products of bf16 as they are, of other dtypes in fp32."""
    return backward(
        q, kv, indices, out, lse, dout, softmax_scale=softmax_scale, dim_v=dim_v,
        topk_length=topk_length, limits=LIMITS,
    )  # fmt: skip


@sparse_mla_bwd.impl("cuda", "deterministic", contract=1)
def repeating(
    q: Tensor, kv: Tensor, indices: Tensor, out: Tensor, lse: Tensor, dout: Tensor, *,
    softmax_scale: float, dim_v: int = 512, topk_length: Tensor | None = None,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same, but gathered keys' gradients are sorted before they are summed."""
    return backward(
        q, kv, indices, out, lse, dout, softmax_scale=softmax_scale, dim_v=dim_v,
        topk_length=topk_length, limits=REPEATING,
    )  # fmt: skip
