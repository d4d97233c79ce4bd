"""Norms, rotations, gates and scatters: what happens to each row by itself.

Sources: op-plugin, docs/zh/custom_APIs/torch_npu, the page of each op.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ci.ascend.emulated._need import FLOATS, need, of


def npu_rms_norm(input: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """(x over its root mean square times gamma, the reciprocal of the root in fp32)."""
    need(input.dtype in FLOATS, f"input is {input.dtype}")
    need(2 <= input.dim() <= 8, f"input is {list(input.shape)}: 2 to 8 axes")
    of("gamma", gamma, (input.dtype, torch.float32), input.shape[-1])
    wide = input.float()
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return (wide * rstd * gamma.float()).to(input.dtype), rstd


def npu_rotary_mul(
    input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str, rotate: Tensor | None
) -> Tensor:
    """input [B, S, N, D] times r1 plus its rotation by a quarter times r2; pairs are halves apart,
    or neighbours under "interleave". Only BSND, with r1 and r2 for all heads alike."""
    need(rotate is None, "a matrix of rotation is not emulated")
    need(rotary_mode in ("half", "interleave"), f"rotary_mode is {rotary_mode}")
    of("input", input, FLOATS, None, None, None, None)
    batch, rows, heads, width = input.shape
    need(width % 2 == 0 and width < 896, f"width is {width}: even and below 896")
    if rotary_mode == "interleave":
        need(batch * heads < 1000, f"{batch} x {heads} heads: below 1000 under interleave")
        batches: tuple[int, ...] = (1,)
    else:
        need(batch < 1000 and heads < 1000, f"{batch} x {heads} heads: below 1000 each")
        batches = (1, batch)
    of("r1", r1, (input.dtype,), None, rows, 1, width)
    of("r2", r2, (input.dtype,), *r1.shape)
    need(r1.shape[0] in batches, f"r1 is {list(r1.shape)}")
    need(bool((r1.abs() <= 1).all() and (r2.abs() <= 1).all()), "r1 and r2 must be in [-1, 1]")
    wide = input.float()
    if rotary_mode == "half":
        first, second = wide.chunk(2, -1)
        turned = torch.cat([-second, first], -1)
    else:
        turned = torch.stack([-wide[..., 1::2], wide[..., ::2]], -1).flatten(-2)
    return (r1.float() * wide + r2.float() * turned).to(input.dtype)


def npu_swiglu(input: Tensor, dim: int) -> Tensor:
    """silu of the first half of an axis times the second."""
    need(input.dtype in FLOATS, f"input is {input.dtype}")
    need(1 <= input.dim() <= 8, f"input is {list(input.shape)}: 1 to 8 axes")
    need(input.shape[dim] % 2 == 0, f"axis {dim} has {input.shape[dim]} elements")
    gate, up = input.float().chunk(2, dim)
    return (torch.nn.functional.silu(gate) * up).to(input.dtype)


def npu_scatter_nd_update_(input: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """input[indices] = updates. Which of two updates of one place wins is not documented, so that
    they must be the same bytes."""
    kinds = (*FLOATS, torch.bool, torch.int64, torch.int8)
    need(input.dtype in kinds, f"input is {input.dtype}, must be among {kinds}")
    need(indices.dtype in (torch.int32, torch.int64), f"indices are {indices.dtype}")
    need(indices.dim() >= 2 and indices.shape[-1] <= input.dim(), f"indices {list(indices.shape)}")
    depth = indices.shape[-1]
    of("updates", updates, (input.dtype,), *indices.shape[:-1], *input.shape[depth:])
    sizes = torch.tensor(input.shape[:depth])
    need(bool(((indices >= 0) & (indices < sizes)).all()), "indices leave the input")
    at = indices.long().flatten(0, -2).unbind(-1)
    new = updates.flatten(0, indices.dim() - 2)
    input[at] = new
    raw = torch.uint8 if input.dtype != torch.bool else torch.bool
    same = torch.equal(input[at].contiguous().view(raw), new.contiguous().view(raw))
    need(same, "two updates of one place differ")
    return input
