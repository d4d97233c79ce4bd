"""rope on Ascend."""

import torch
from torch import Tensor

from dsa_hal.backends.npu._attention import meta
from dsa_hal.backends.npu._library import call, refusal
from dsa_hal.ops.norm import rope


def _why_not(
    x: Tensor, positions: Tensor, cos_sin: Tensor, *, interleaved: bool, offset: int = 0
) -> str | None:
    heads = x.shape[1] if x.dim() == 3 else 1
    return refused(x.shape[0], heads, cos_sin.shape[1], interleaved)


def refused(tokens: int, heads: int, width: int, interleaved: bool) -> str | None:
    """Why the device's rotation does not take `width` columns of these heads, or None."""
    turned = meta(1, tokens, heads, width, dtype=torch.float32)
    angle = meta(1, tokens, 1, width, dtype=torch.float32)
    return refusal(
        "npu_rotary_mul", input=turned, r1=angle, r2=angle, rotary_mode=_mode(interleaved)
    )


@rope.impl("npu", "rotary_mul", contract=1, why_not=_why_not)
def rotate(
    x: Tensor, positions: Tensor, cos_sin: Tensor, *, interleaved: bool, offset: int = 0
) -> Tensor:
    """The rotated columns alone go through the kernel, in fp32. It keeps the order of columns in
    both modes; `npu_interleave_rope` would give interleaved pairs back as halves."""
    width = cos_sin.shape[1]
    if not x.numel():
        return x.clone()
    cos, sin = (_whole(t, interleaved) for t in cos_sin[positions.long()].chunk(2, -1))
    turn = x[..., offset : offset + width].float().contiguous()
    batch = turn[None] if x.dim() == 3 else turn[None, :, None]
    turned = call(
        "npu_rotary_mul", input=batch, r1=cos, r2=sin, rotary_mode=_mode(interleaved)
    ).view(turn.shape)
    return torch.cat([x[..., :offset], turned.to(x.dtype), x[..., offset + width :]], -1)


def _whole(half: Tensor, interleaved: bool) -> Tensor:
    """[tokens, pairs] once per pair as [1, tokens, 1, 2 * pairs] once per column."""
    whole = half.repeat_interleave(2, -1) if interleaved else half.repeat(1, 2)
    return whole[None, :, None]


def _mode(interleaved: bool) -> str:
    return "interleave" if interleaved else "half"
