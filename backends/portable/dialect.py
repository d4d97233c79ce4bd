"""FP8's dialects. What is stored, sent and exchanged is e4m3fn: range 448, NaN 0x7F and 0xFF. Some
matrix units multiply e4m3fnuz instead: range 240, one NaN 0x80, no -0. The same code means half as
much there, so that every number of e4m3fn has a code in e4m3fnuz: its own, -0 and NaN apart. The
conversion is exact, and a scale twice as large makes up for the half."""

import torch
from torch import Tensor

from dsa_hal.selection import selection

_NAN, _SIGN, _FNUZ_NAN = 0x7F, 0x80, 0x80


def is_fnuz() -> bool:
    """Whether the matrix units of the target in force multiply e4m3fnuz."""
    limits = selection().target.limits
    return limits is not None and limits.fp8 == torch.float8_e4m3fnuz


def to_fnuz(values: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """values float8_e4m3fn of any shape and their fp32 scales, as float8_e4m3fnuz and scales: the
    same numbers exactly, but for -0, which becomes 0."""
    bits = values.view(torch.uint8)
    size = bits & _NAN
    bits = torch.where(size == _NAN, _FNUZ_NAN, torch.where(size == 0, 0, bits)).to(torch.uint8)
    return bits.view(torch.float8_e4m3fnuz), 2 * scale
