"""FP8 with block scales: the activations' 1x128 groups and the weights' 128x128 blocks. And int8,
symmetric, with a scale per group of a row.

A scale always multiplies: x is about values * scale. Partial blocks at the right and lower edge are
ordinary blocks with fewer elements (kv_a_proj has 576 rows: 4.5 blocks).
"""

import torch
from torch import Tensor

from dsa_hal.case import Cost, Inputs, Maker, case
from dsa_hal.check import bitwise, each
from dsa_hal.registry import op

FP8_MAX = 448.0
"""Largest finite e4m3fn value."""

AMAX_FLOOR = 1e-4
"""Groups whose largest magnitude is below this are scaled as if it were this (the model's own
rule)."""

INT8_MAX = 127.0
"""Largest code of symmetric int8; -128 has no counterpart and is not used."""


def blocks(size: int, block: int) -> int:
    """How many blocks cover an axis, the last one perhaps in part."""
    return -(-size // block)


def spread(scale: Tensor, rows: int, cols: int, block_rows: int, group: int) -> Tensor:
    """Block scales [..., row blocks, col blocks] repeated to elements [..., rows, cols], as a
    copy."""
    scale = scale.repeat_interleave(group, -1)[..., :cols]
    return scale if block_rows == 1 else scale.repeat_interleave(block_rows, -2)[..., :rows, :]


def power_of_two(scale: Tensor) -> Tensor:
    """The smallest power of two that is not below `scale` (fp32, positive, normal), worked out on
    the bits: exact powers stay, any mantissa adds one to the exponent."""
    bits = scale.view(torch.int32)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0)
    return (exponent << 23).view(torch.float32)


def quantize_int8(
    x: Tensor, *, group: int, scale_dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """x [..., dim] as codes int8 [..., dim] and scales [..., ceil(dim / group)] of `scale_dtype`.

    A scale is max|x| / 127 of its group, rounded to `scale_dtype` before codes are made of it, and
    a code is x / scale in fp32, rounded half to even, at most 127 either way. Where the scale is 0,
    because all of x is or is too small for its dtype, so are the codes.
    """
    padded = torch.nn.functional.pad(x.float(), (0, -x.shape[-1] % group))
    amax = padded.unflatten(-1, (-1, group)).abs().amax(-1)
    scale = (amax / INT8_MAX).clamp_max(torch.finfo(scale_dtype).max).to(scale_dtype)
    full = spread(scale.float(), 1, x.shape[-1], 1, group)
    codes = (x.float() / full).round().clamp(-INT8_MAX, INT8_MAX)
    return torch.where(full > 0, codes, 0).to(torch.int8), scale


def dequantize_groups(values: Tensor, scale: Tensor, *, group: int) -> Tensor:
    """Codes of any type [..., dim] times their scales [..., ceil(dim / group)], in fp32."""
    return values.float() * spread(scale.float(), 1, values.shape[-1], 1, group)


# -- quantize_fp8 -------------------------------------------------------------------------------


def _quantize_inputs(
    make: Maker, *, tokens: int, dim: int, group: int = 128, block_rows: int = 1,
    pow2: bool = True, kind: str = "plain",
) -> Inputs:  # fmt: skip
    x = make.randn(tokens, dim, dtype=torch.float32 if kind == "fp32" else torch.bfloat16)
    if kind == "zeros" and tokens:
        x[::2] = 0
    if kind == "outliers":
        x[..., ::31] *= 300
    if kind == "tiny":
        x *= 1e-6
    if kind == "exact":  # amax / 448 is a power of two already and must stay
        x[..., 0] = FP8_MAX * 0.25
        x.clamp_(-FP8_MAX * 0.25, FP8_MAX * 0.25)
    return dict(x=x, group=group, block_rows=block_rows, pow2=pow2)


def _quantize_cost(x: Tensor, *, group: int = 128, block_rows: int = 1, pow2: bool = True) -> Cost:
    scales = x.numel() / group / block_rows
    return Cost(3.0 * x.numel(), x.numel() * (x.element_size() + 1) + 4 * scales)


def _quantize_invalid(
    x: Tensor, *, group: int = 128, block_rows: int = 1, pow2: bool = True
) -> str | None:
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"x is {x.dtype}; expected bfloat16, float16 or float32"
    if x.dim() < (1 if block_rows == 1 else 2):
        return f"x has shape {list(x.shape)}; blocks of {block_rows} rows need two axes"
    if group < 1 or block_rows < 1:
        return f"blocks of {block_rows} x {group} hold nothing"
    return None


@op(
    version=1,
    constant=("dim", "group", "block_rows", "pow2", "kind"),
    variable={"tokens": "x[0]"},
    inputs=_quantize_inputs,
    cases=(
        case("empty", tokens=0, dim=256),
        case("one", tokens=1, dim=128),
        case("odd", tokens=63, dim=384, pow2=False),
        case("zeros", tokens=5, dim=256, kind="zeros"),
        case("outliers", tokens=65, dim=256, kind="outliers"),
        case("fp32", tokens=9, dim=256, kind="fp32"),
        case("head64", tokens=33, dim=64, group=64),
        case("partial", tokens=3, dim=200),
        case("exact", tokens=7, dim=256, kind="exact", traps=(20,)),
        case("floor", tokens=4, dim=256, kind="tiny", traps=(8,)),
        case("kv_a", tokens=576, dim=256, block_rows=128, pow2=False, traps=(24,)),
        case("decode", model=True, tokens=64, dim=7168),
        case("prefill", model=True, tokens=4096, dim=7168),
    ),
    check=each(values=bitwise, scale=bitwise),
    cost=_quantize_cost,
    outputs=("values", "scale"),
    invalid=_quantize_invalid,
)
def quantize_fp8(
    x: Tensor, *, group: int = 128, block_rows: int = 1, pow2: bool = True
) -> tuple[Tensor, Tensor]:
    """Quantise to e4m3 with one scale per block: 1 x 128 for activations, 128 x 128 for weights.

    x           [..., dim] bf16, fp16 or fp32; with block_rows > 1 [..., rows, dim]
    group       columns per block; the last block may be partial
    block_rows  rows per block
    pow2        scales rounded up to powers of two (any `scale_fmt` that is not None, "ue8m0")
    -> values   [..., dim] float8_e4m3fn, saturated at 448
    -> scale    [..., ceil(rows / block_rows), ceil(dim / group)] fp32 (no rows axis for one row);
                max|x| / 448 of the block, max|x| taken as at least 1e-4

    Source: `act_quant` of the model's demo code.
    """
    dim = x.shape[-1]
    padded = torch.nn.functional.pad(x.float(), (0, -dim % group))
    if block_rows > 1:
        padded = torch.nn.functional.pad(padded, (0, 0, 0, -x.shape[-2] % block_rows))
        tiles = padded.unflatten(-2, (-1, block_rows)).unflatten(-1, (-1, group))
        amax = tiles.abs().amax(dim=(-3, -1))
    else:
        amax = padded.unflatten(-1, (-1, group)).abs().amax(-1)
    scale = amax.clamp_min(AMAX_FLOOR) * (1 / FP8_MAX)
    if pow2:
        scale = power_of_two(scale)
    rows = x.shape[-2] if x.dim() > 1 else 1
    scaled = x.float() / spread(scale, rows, dim, block_rows, group)
    return scaled.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale


# -- dequantize_fp8 -----------------------------------------------------------------------------


def _dequantize_inputs(
    make: Maker, *, tokens: int, dim: int, group: int = 128, block_rows: int = 1,
    fp32: bool = False,
) -> Inputs:  # fmt: skip
    values = make.randn(tokens, dim, scale=100).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    rows = (blocks(tokens, block_rows),) if tokens or block_rows > 1 else (0,)
    scale = make.randn(*rows, blocks(dim, group)).abs() + 1e-3
    out = torch.float32 if fp32 else torch.bfloat16
    return dict(values=values, scale=scale, group=group, block_rows=block_rows, out_dtype=out)


def _dequantize_cost(
    values: Tensor, scale: Tensor, *, group: int = 128, block_rows: int = 1,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Cost:  # fmt: skip
    moved = values.numel() * (1 + out_dtype.itemsize) + scale.numel() * 4
    return Cost(values.numel(), moved)


def _dequantize_invalid(
    values: Tensor, scale: Tensor, *, group: int = 128, block_rows: int = 1,
    out_dtype: torch.dtype = torch.bfloat16,
) -> str | None:  # fmt: skip
    if values.dtype != torch.float8_e4m3fn or scale.dtype != torch.float32:
        return f"values are {values.dtype}, scale {scale.dtype}; expected float8_e4m3fn and float32"
    rows = values.shape[-2:-1] if block_rows == 1 else (blocks(values.shape[-2], block_rows),)
    want = [*values.shape[:-2], *rows, blocks(values.shape[-1], group)]
    if list(scale.shape) != want:
        return f"scale has shape {list(scale.shape)}; {list(values.shape)} values need {want}"
    return None


@op(
    version=1,
    constant=("dim", "group", "block_rows", "fp32"),
    variable={"tokens": "values[0]"},
    inputs=_dequantize_inputs,
    cases=(
        case("empty", tokens=0, dim=128),
        case("groups", tokens=63, dim=384),
        case("head64", tokens=5, dim=64, group=64, fp32=True),
        case("kv_a", tokens=576, dim=300, block_rows=128, fp32=True, traps=(7, 24)),
        case("kv_b", model=True, tokens=32768, dim=512, block_rows=128),
        case("q_b", model=True, tokens=24576, dim=1536, block_rows=128),
    ),
    check=each(out=bitwise),
    cost=_dequantize_cost,
    invalid=_dequantize_invalid,
)
def dequantize_fp8(
    values: Tensor, scale: Tensor, *, group: int = 128, block_rows: int = 1,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fmt: skip
    """values * scale, block by block; the inverse of `quantize_fp8` up to its rounding.

    values     [..., dim] float8_e4m3fn
    scale      [..., ceil(rows / block_rows), ceil(dim / group)] fp32; multiplies, whatever the
               checkpoint calls it (`weight_scale_inv`)
    out_dtype  the product is formed in fp32 and rounded once
    -> out     [..., dim] out_dtype

    Source: `weight_dequant` of the model's demo code, with partial blocks allowed.
    """
    rows = values.shape[-2] if values.dim() > 1 else 1
    full = spread(scale, rows, values.shape[-1], block_rows, group)
    return (values.float() * full).to(out_dtype)
