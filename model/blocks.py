"""Weights as FP8 by blocks, the way published checkpoints store them."""

from __future__ import annotations

import torch
from torch import Tensor

from dsa_hal.model.config import BLOCK
from dsa_hal.model.schema import blocks

_FP8_MAX = 448.0


def quantize_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 [out, in] to e4m3 [out, in] and fp32 scales [ceil(out/128), ceil(in/128)], each the
    least power of two that keeps its block within 448."""
    rows, columns = blocks(tuple(weight.shape))
    padded = torch.zeros(rows * BLOCK, columns * BLOCK)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    tiles = padded.view(rows, BLOCK, columns, BLOCK)
    mantissa, exponent = torch.frexp(tiles.abs().amax(dim=(1, 3)).clamp(min=1e-4) / _FP8_MAX)
    scale = torch.ldexp(torch.ones_like(mantissa), exponent - (mantissa == 0.5).int())
    values = (tiles / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    values = values.view(rows * BLOCK, columns * BLOCK)[: weight.shape[0], : weight.shape[1]]
    return values.contiguous(), scale
