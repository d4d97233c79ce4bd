"""e4m3 without a device that knows it: codes are bytes, and what they mean is looked up or worked
out on fp32 bits. torch_npu documents no conversion of e4m3 on A2 and A3, so none is asked for."""

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from dsa_hal.backends.npu._rows import chunks
from dsa_hal.ops.gemm import BLOCK
from dsa_hal.ops.quant import spread

SUBNORMAL = 2.0**-6
"""e4m3 numbers below this have less than 3 bits behind the leading one."""

NAN = 0x7F


@cache
def _meanings(device: torch.device) -> Tensor:
    """What each of the 256 codes means, fp32."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().to(device)


def widen(codes: Tensor) -> Tensor:
    """e4m3 as fp32, exactly. Of every byte nine more exist meanwhile."""
    flat = codes.contiguous().view(torch.uint8).flatten().int()
    return _meanings(codes.device).index_select(0, flat).view(codes.shape)


def narrow(x: Tensor) -> Tensor:
    """fp32 within +-448 as e4m3, rounded half to even; NaN stays NaN.

    Adding 1.5 * 2^20 times a number's power of two leaves the sum just the bits that e4m3 keeps.
    """
    power = x.abs().clamp_min(SUBNORMAL).view(torch.int32).bitwise_and(0x7F800000)
    much = power.view(torch.float32) * (1.5 * 2**20)
    size = ((x + much) - much).abs()
    normal = (size.view(torch.int32) >> 20) - (120 << 3)  # fp32's exponent is e4m3's plus 120
    code = torch.where(size < SUBNORMAL, (size * 2**9).int(), normal)
    code = torch.where(x.isnan(), NAN, code)
    code = torch.where(x.view(torch.int32) < 0, code + 128, code)
    return code.to(torch.uint8).view(torch.float8_e4m3fn)


def strips(
    values: Tensor, scale: Tensor, *, group: int = BLOCK, block_rows: int = BLOCK
) -> Iterator[tuple[int, slice, Tensor]]:
    """A weight [experts, n, k] in blocks of `block_rows` x `group` as (expert, rows, those rows in
    fp32): so few at a time that no fp32 copy of a large weight exists."""
    experts, n, k = values.shape
    for expert in range(experts):
        for part in chunks(scale.shape[1], 10 * block_rows * k):
            rows = slice(part.start * block_rows, min(n, part.stop * block_rows))
            wide = widen(values[expert, rows])
            full = spread(scale[expert, part], wide.shape[0], k, block_rows, group)
            yield expert, rows, wide.mul_(full)


def multiplied_out(
    values: Tensor, scale: Tensor, dtype: torch.dtype, *, group: int = BLOCK,
    block_rows: int = BLOCK,
) -> Tensor:  # fmt: skip
    """Values [..., n, k] times their blocks' scales in a float dtype, rounded once."""
    out = torch.empty(values.shape, dtype=dtype, device=values.device)
    if not out.numel():
        return out
    whole, factors, made = (t.reshape(-1, *t.shape[-2:]) for t in (values, scale, out))
    for expert, rows, wide in strips(whole, factors, group=group, block_rows=block_rows):
        made[expert, rows] = wide
    return out
