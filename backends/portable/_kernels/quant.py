"""FP8 codes and their scales, to the bit as the reference has them."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsa_hal.backends.portable.overlap import overlaps
from dsa_hal.backends.portable.rows import dense, flat, pick, power_of_two
from dsa_hal.ops import quant

FP8_MAX = tl.constexpr(quant.FP8_MAX)
AMAX_FLOOR = tl.constexpr(quant.AMAX_FLOOR)


def quantized(x: Tensor, *, group: int, block_rows: int, pow2: bool) -> tuple[Tensor, Tensor]:
    """`quantize_fp8`."""
    columns = quant.blocks(x.shape[-1], group)
    down = () if x.dim() == 1 else (quant.blocks(x.shape[-2], block_rows),)
    values = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(*x.shape[:-2], *down, columns, dtype=torch.float32, device=x.device)
    if not values.numel():
        return values, scale
    x3 = flat(x)[None] if block_rows == 1 else _matrices(x)
    _, rows, dim = x3.shape
    width, height = power_of_two(group), power_of_two(block_rows)
    tile = pick("quantize_fp8", scale.numel(), width * height)
    count = tile.rows if block_rows == 1 else 1
    _quantize[(triton.cdiv(scale.numel(), count),)](
        x3, values, scale, scale.numel(), rows, dim, quant.blocks(rows, block_rows), columns,
        x3.stride(0), x3.stride(1), GROUP=group, BLOCK_ROWS=block_rows, WIDTH=width, HEIGHT=height,
        POW2=pow2, BLOCKS=count, OVERLAPS=overlaps(), **tile.options,
    )  # fmt: skip
    return values, scale


def dequantized(
    values: Tensor, scale: Tensor, *, group: int, block_rows: int, out_dtype: torch.dtype
) -> Tensor:
    """`dequantize_fp8`."""
    out = torch.empty(values.shape, dtype=out_dtype, device=values.device)
    if not out.numel():
        return out
    one = block_rows == 1
    v3, s3 = (flat(t)[None] if one else _matrices(t) for t in (values, scale))
    batch, rows, dim = v3.shape
    columns, width = quant.blocks(dim, group), power_of_two(group)
    tile = pick("dequantize_fp8", batch * rows * columns, width)
    grid = (batch * triton.cdiv(rows, tile.rows) * columns,)
    _dequantize[grid](
        v3, s3, out, rows, dim, triton.cdiv(rows, tile.rows), columns, v3.stride(0), v3.stride(1),
        s3.stride(0), s3.stride(1), GROUP=group, BLOCK_ROWS=block_rows, WIDTH=width,
        ROWS=tile.rows, **tile.options,
    )  # fmt: skip
    return out


def _matrices(t: Tensor) -> Tensor:
    """t [..., rows, cols] as [batch, rows, cols]."""
    return dense(t.reshape(-1, *t.shape[-2:]))


@triton.jit
def scale_of(amax, POW2: tl.constexpr):
    """The scale of values up to `amax`; on the bits, as `power_of_two` of the reference."""
    scale = tl.maximum(amax, AMAX_FLOOR) * (1 / FP8_MAX)
    if POW2:
        bits = scale.to(tl.int32, bitcast=True)
        exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32)
        scale = (exponent << 23).to(tl.float32, bitcast=True)
    return scale


@triton.jit
def encoded(wide, scale, POW2: tl.constexpr, factor=1.0):
    """wide * factor / scale as e4m3. The quotient cannot exceed 448 by more than rounding, as
    `scale` was made from these values, so nothing is clamped and NaN stays NaN."""
    if POW2:
        # The reciprocal of a power of two is exact, and so is the product with it.
        exponent = scale.to(tl.int32, bitcast=True) >> 23
        inverse = (tl.maximum(254 - exponent, 0) << 23).to(tl.float32, bitcast=True)
        quotient = wide * (factor * inverse)
    else:
        quotient = tl.math.div_rn(wide * factor, tl.broadcast_to(scale, wide.shape))
    return quotient.to(tl.float8e4nv)


@triton.jit(do_not_specialize=["blocks", "rows", "row_blocks"])
def _quantize(
    x, values, scale, blocks, rows, dim, row_blocks, col_blocks, batch_stride, row_stride,
    GROUP: tl.constexpr, BLOCK_ROWS: tl.constexpr, WIDTH: tl.constexpr, HEIGHT: tl.constexpr,
    POW2: tl.constexpr, BLOCKS: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """BLOCKS blocks, each one row [HEIGHT * WIDTH] of the tile."""
    if OVERLAPS:  # the product behind this makes itself ready meanwhile
        tl.extra.cuda.gdc_launch_dependents()
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    item = tl.arange(0, HEIGHT * WIDTH)
    row = block // col_blocks
    first_row = row % row_blocks * BLOCK_ROWS
    batch = (row // row_blocks).to(tl.int64)
    first_col = block % col_blocks * GROUP
    column = first_col[:, None] + (item % WIDTH)[None, :]
    inside = (block < blocks)[:, None] & (item % WIDTH < GROUP)[None, :] & (column < dim)
    start = batch * batch_stride + first_row.to(tl.int64) * row_stride + first_col
    target = (batch * rows + first_row) * dim + first_col
    source_at, target_at = item % WIDTH, item % WIDTH
    if HEIGHT > 1:
        down = (item // WIDTH).to(tl.int64)
        inside &= (down < BLOCK_ROWS)[None, :] & (first_row[:, None] + down[None, :] < rows)
        source_at, target_at = source_at + down * row_stride, target_at + down * dim
    wide = tl.load(x + start[:, None] + source_at[None, :], mask=inside, other=0.0).to(tl.float32)
    own = scale_of(tl.max(tl.abs(wide), 1), POW2)
    code = encoded(wide, own[:, None], POW2)
    tl.store(values + target[:, None] + target_at[None, :], code, mask=inside)
    tl.store(scale + block, own, mask=block < blocks)


@triton.jit(do_not_specialize=["rows", "row_tiles"])
def _dequantize(
    values, scale, out, rows, dim, row_tiles, col_blocks, batch_stride, row_stride,
    scale_batch_stride, scale_row_stride, GROUP: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One block of columns of ROWS rows."""
    col_block = tl.program_id(0) % col_blocks
    row_tile = tl.program_id(0) // col_blocks
    batch = (row_tile // row_tiles).to(tl.int64)
    row = row_tile % row_tiles * ROWS + tl.arange(0, ROWS)
    item = tl.arange(0, WIDTH)
    column = col_block * GROUP + item
    inside = (row < rows)[:, None] & ((item < GROUP) & (column < dim))[None, :]
    start = batch * batch_stride + row.to(tl.int64) * row_stride
    code = tl.load(values + start[:, None] + column[None, :], mask=inside, other=0.0)
    scale_at = batch * scale_batch_stride + (row // BLOCK_ROWS).to(tl.int64) * scale_row_stride
    factor = tl.load(scale + scale_at + col_block, mask=row < rows, other=0.0)
    wide = code.to(tl.float32) * factor[:, None]
    target = (batch * rows + row) * dim
    tl.store(out + target[:, None] + column[None, :], wide.to(out.dtype.element_ty), mask=inside)
