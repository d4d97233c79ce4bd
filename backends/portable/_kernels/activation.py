"""The gated activation, with or without the quantisation that the next product wants."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsa_hal.backends.portable._kernels.quant import encoded, scale_of
from dsa_hal.backends.portable.rows import dense, pick

GROUP = tl.constexpr(128)


def gated(x: Tensor) -> Tensor:
    """`silu_mul`."""
    out = torch.empty(x.shape[0], x.shape[1] // 2, dtype=x.dtype, device=x.device)
    _launch("silu_mul", x, out, None, False)
    return out


def gated_quantized(x: Tensor, pow2: bool) -> tuple[Tensor, Tensor]:
    """`silu_mul_quantize`."""
    tokens, inter = x.shape[0], x.shape[1] // 2
    values = torch.empty(tokens, inter, dtype=torch.float8_e4m3fn, device=x.device)
    groups = triton.cdiv(inter, GROUP.value)
    scale = torch.empty(tokens, groups, dtype=torch.float32, device=x.device)
    _launch("silu_mul_quantize", x, values, scale, pow2)
    return values, scale


def _launch(op: str, x: Tensor, out: Tensor, scale: Tensor | None, pow2: bool) -> None:
    """Groups of columns are the rows of a tile; all are of one token."""
    if not out.numel():
        return
    x = dense(x)
    tokens, inter = out.shape
    groups = triton.cdiv(inter, GROUP.value)
    tile = pick(op, tokens * groups, GROUP.value)
    chunks = triton.cdiv(groups, tile.rows)
    _gated[(tokens * chunks,)](
        x, out, scale, inter, chunks, x.stride(0), POW2=pow2, GROUPS=tile.rows,
        **tile.options,
    )  # fmt: skip


@triton.jit
def _gated(
    x, out, scale, inter, chunks, x_stride, POW2: tl.constexpr, GROUPS: tl.constexpr
):  # fmt: skip
    token = (tl.program_id(0) // chunks).to(tl.int64)
    group = tl.program_id(0) % chunks * GROUPS + tl.arange(0, GROUPS)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = column < inter
    at = x + token * x_stride + column
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + inter, mask=inside, other=0.0).to(tl.float32)
    made = gate / (1.0 + tl.exp(-gate)) * up
    target = out + token * inter + column
    if scale is None:
        tl.store(target, made.to(out.dtype.element_ty), mask=inside)
    else:
        # Rounded first, as where the two steps are two ops: codes do not depend on the fusion.
        made = made.to(x.dtype.element_ty).to(tl.float32)
        own = scale_of(tl.max(tl.abs(made), 1), POW2)
        tl.store(target, encoded(made, own[:, None], POW2), mask=inside)
        groups = tl.cdiv(inter, GROUP)
        tl.store(scale + token * groups + group, own, mask=group < groups)
