"""Products with packed weights on Ascend: the forms there are, and the calls they become.

    float   [w [(experts,) n, k]]
    FP8     [e4m3 [(experts,) n, k], fp32 per block]       the checkpoint's own; for the 950
    int8    [int8 [(experts,) k, n], bf16 [(experts,) n]]  W8A8: scales per output and per row of x

Scales of int8 weights are bf16, since the grouped product documents no others for bf16 results;
codes are made with the rounded scale, so that nothing is lost by it.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsa_hal.backends.npu._library import call
from dsa_hal.ops.gemm import BLOCK
from dsa_hal.ops.quant import blocks

HALVES = (torch.bfloat16, torch.float16)
"""Floats that the device quantises, and gives back from int8 and FP8 products."""


def is_float(weight: Sequence[Tensor]) -> bool:
    return len(weight) == 1


def is_int8(weight: Sequence[Tensor]) -> bool:
    return weight[0].dtype == torch.int8


def half(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which rows of `dtype` meet a quantised weight."""
    return dtype if dtype in HALVES else torch.bfloat16


def like(t: Tensor) -> Tensor:
    """`t` without data or gaps, for a question to the table."""
    return torch.empty(t.shape, dtype=t.dtype, device="meta")


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


class Rows(NamedTuple):
    """Rows [m, k] as a product takes them: floats, or codes with their scales [m] (int8) or
    [m, ceil(k / 128)] (FP8)."""

    values: Tensor
    scale: Tensor | None = None

    @classmethod
    def meta(cls, m: int, k: int, weight: Sequence[Tensor], dtype: torch.dtype) -> "Rows":
        """Rows that fit a packed weight, for a question to the table."""
        if is_float(weight):
            return cls(meta(m, k, dtype=dtype))
        scale = (m,) if is_int8(weight) else (m, blocks(k, BLOCK))
        return cls(meta(m, k, dtype=weight[0].dtype), meta(*scale, dtype=torch.float32))


def quantising(x: Tensor, weight: Sequence[Tensor]) -> tuple[str, dict[str, Any]]:
    """The call that makes codes and scales of rows x [m, k] for a quantised weight."""
    if is_int8(weight):
        return "npu_dynamic_quant", dict(input=x)
    return "npu_dynamic_block_quant", dict(
        x=x, dst_type=torch.float8_e4m3fn, row_block_size=1, col_block_size=BLOCK
    )


def quantised(x: Tensor, weight: Sequence[Tensor]) -> Rows:
    """Rows x [m, k] of a dtype of HALVES as the weight wants them.

    What becomes of zeros alone, 0 / 0, is documented nowhere: as int8 it is some number, times 0;
    as FP8 it might be NaN, and is made 0.
    """
    name, arguments = quantising(x.contiguous(), weight)
    values, scale = call(name, **arguments)
    if not is_int8(weight):
        nothing = (scale == 0).repeat_interleave(BLOCK, 1)[:, : x.shape[1]]
        values = values.view(torch.uint8).masked_fill(nothing, 0).view(values.dtype)
    return Rows(values, scale)


def product(rows: Rows, weight: Sequence[Tensor], dtype: torch.dtype) -> dict[str, Any]:
    """`npu_quant_matmul`'s arguments: rows [m, k] times a quantised weight, [m, n] in `dtype`."""
    values, scale = weight
    found = dict(x1=rows.values, pertoken_scale=rows.scale, output_dtype=dtype)
    if is_int8(weight):
        return dict(found, x2=values, scale=scale.to(scale_dtype(dtype)))
    return dict(found, x2=values.mT, scale=scale.mT, group_sizes=[1, BLOCK, BLOCK])


def stretches(layout: Tensor) -> list[tuple[int, slice]]:
    """Rows of equal groups in `layout` [m], those of -1 left out. The host waits for it."""
    groups, counts = (t.tolist() for t in layout.unique_consecutive(return_counts=True))
    ends = accumulate(counts)
    found = zip(groups, counts, ends, strict=True)
    return [(group, slice(end - count, end)) for group, count, end in found if group >= 0]


def scale_dtype(dtype: torch.dtype) -> torch.dtype:
    """What scales of int8 weights are passed as for a result of `dtype`."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
