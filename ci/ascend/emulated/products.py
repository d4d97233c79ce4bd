"""Quantisation to int8 and to FP8 in blocks, and products of what came of it.

Sources: op-plugin, docs/zh/custom_APIs/torch_npu, the page of each op.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ci.ascend.emulated._need import FLOATS, HALVES, dense, dtype_of, is_950, need, of, undefined

E4M3 = torch.float8_e4m3fn
BLOCK = 128
LARGEST = 65535
"""Of a matrix's last axis."""


def rounded(x: Tensor, scale: Tensor) -> Tensor:
    """x [..., k] over scale [..., 1] as int8; a row whose scale is 0 is 0 / 0, of which nothing is
    said."""
    codes = (x / scale).round().clamp(-128, 127).nan_to_num(0).to(torch.int8)
    return torch.where(scale == 0, undefined(1, dtype=torch.int8), codes)


def npu_dynamic_quant(
    input: Tensor, smooth_scales: Tensor | None, group_index: Tensor | None, dst_type: int | None
) -> tuple[Tensor, Tensor]:
    """int8 codes and a fp32 scale per row."""
    need(input.dtype in HALVES, f"input is {input.dtype}, must be bf16 or fp16")
    need(input.dim() > 1, f"input is {list(input.shape)}, must have more than one axis")
    need(smooth_scales is None and group_index is None, "smooth_scales are not emulated")
    need(dtype_of(dst_type, torch.int8) == torch.int8, "only int8 is emulated")
    wide = input.float()
    scale = wide.abs().amax(-1, keepdim=True) / 127
    return rounded(wide, scale), scale[..., 0]


def npu_dynamic_block_quant(
    x: Tensor, min_scale: float, round_mode: str, dst_type: int, row_block_size: int,
    col_block_size: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Codes of x [rows, k], a fp32 scale for 128 columns of a row each, at least `min_scale`."""
    need(x.dtype in HALVES and x.dim() == 2, f"x is {x.dtype} {list(x.shape)}")
    need(round_mode == "rint" and min_scale >= 0, "round_mode must be rint, min_scale not negative")
    need((row_block_size, col_block_size) == (1, BLOCK), "blocks must be 1 x 128")
    dtype = dtype_of(dst_type, torch.int8)
    need(dtype == torch.int8 or (is_950() and dtype == E4M3), f"{dtype} codes are not made here")
    rows, k = x.shape
    whole = torch.nn.functional.pad(x.float(), (0, -k % BLOCK)).view(rows, -1, BLOCK)
    top = 127 if dtype == torch.int8 else 448
    scale = (whole.abs().amax(-1, keepdim=True) / top).clamp_min(min_scale)
    codes = rounded(whole, scale) if dtype == torch.int8 else (whole / scale).to(dtype)
    return codes.flatten(1)[:, :k].contiguous(), scale[..., 0]


def _times(left: Tensor, right: Tensor, scale: Tensor | None, rows: Tensor | None) -> Tensor:
    """left [m, k] times right [k, n] in fp32, of floats, or of codes with their scales: one per
    column and one per row of int8, whose sum is exact; of FP8 one per 128 x 128 of `right` and one
    per 128 of a row."""
    k, n = right.shape
    if left.dtype == torch.int8:
        assert scale is not None
        found = (left.double() @ right.double()).float() * scale.float()
        return found if rows is None else found * rows[:, None]
    if left.dtype == E4M3:
        assert scale is not None and rows is not None
        every = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:k, :n]
        left, right = left.float() * rows.repeat_interleave(BLOCK, 1)[:, :k], right.float() * every
    return left.float() @ right.float()


def _codes() -> tuple[torch.dtype, ...]:
    return (torch.int8, E4M3) if is_950() else (torch.int8,)


def _blocks(size: int) -> int:
    return -(-size // BLOCK)


def npu_quant_matmul(
    x1: Tensor, x2: Tensor, scale: Tensor, pertoken_scale: Tensor | None,
    output_dtype: int | None, group_sizes: list[int] | None,
) -> Tensor:  # fmt: skip
    """x1 [m, k] times x2 [k, n], both int8; or FP8 in blocks on 950."""
    of("x1", x1, _codes(), None, None)
    m, k = x1.shape
    of("x2", x2, (x1.dtype,), k, None)
    n = x2.shape[1]
    dense(x1=x1)
    need(x2.is_contiguous() or x2.mT.is_contiguous(), f"x2 has strides {x2.stride()}")
    need(max(k, n) <= LARGEST, f"k is {k}, n is {n}: at most {LARGEST}")
    out = dtype_of(output_dtype, torch.int8)
    if x1.dtype == E4M3:
        need(group_sizes == [1, BLOCK, BLOCK], f"group_sizes are {group_sizes}")
        of("scale", scale, (torch.float32,), _blocks(k), _blocks(n))
        of("pertoken_scale", pertoken_scale, (torch.float32,), m, _blocks(k))
        need(out in FLOATS, f"there is no {out} of FP8")
        return _times(x1, x2, scale, pertoken_scale).to(out)
    need(not group_sizes, "group_sizes are for FP8")
    of("scale", scale, (torch.float32, torch.bfloat16), None)
    need(scale.shape[0] in (1, n), f"scale is {list(scale.shape)} for {n} columns")
    if pertoken_scale is None:
        need(out in (torch.int8, torch.bfloat16), f"without pertoken_scale there is no {out}")
    else:
        of("pertoken_scale", pertoken_scale, (torch.float32,), m)
        need(out in HALVES, f"with pertoken_scale there is no {out}")
    need(out == torch.bfloat16 or scale.dtype == torch.float32, f"scale is {scale.dtype} for {out}")
    found = _times(x1, x2, scale, pertoken_scale)
    return found.round().clamp(-128, 127).to(out) if out == torch.int8 else found.to(out)


def npu_grouped_matmul(
    x: list[Tensor], weight: list[Tensor], scale: list[Tensor] | None,
    per_token_scale: list[Tensor] | None, group_list: Tensor | None, split_item: int | None,
    group_type: int | None, group_list_type: int | None, output_dtype: int | None,
) -> list[Tensor]:  # fmt: skip
    """Rows [m, k], group after group, times the groups' weights [groups, k, n]: [[m, n]]."""
    need(len(x) == len(weight) == 1, "several tensors are not emulated")
    need(split_item in (2, 3), f"split_item is {split_item}: one output takes 2 or 3")
    need(group_type == 0, f"group_type is {group_type}: only rows in groups are emulated")
    rows, w = x[0], weight[0]
    of("x", rows, (*FLOATS, *_codes()), None, None)
    m, k = rows.shape
    of("weight", w, (rows.dtype,), None, k, None)
    groups, _, n = w.shape
    dense(x=rows)
    need(w.is_contiguous() or w.mT.is_contiguous(), f"weight has strides {w.stride()}")
    need(max(k, n) <= LARGEST and groups <= 1024, f"{groups} groups of {k} x {n}")
    scales, row_scales = (None if t is None else t[0] for t in (scale, per_token_scale))
    out = dtype_of(output_dtype, rows.dtype)
    _grouped_scales(rows, w, scales, row_scales, out)
    ends = _ends(group_list, group_list_type, groups, m)
    result = undefined(m, n, dtype=out)
    for group, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        own = None if scales is None else scales[group]
        each = None if row_scales is None else row_scales[start:end]
        result[start:end] = _times(rows[start:end], w[group], own, each).to(out)
    return [result]


def _grouped_scales(
    rows: Tensor, w: Tensor, scale: Tensor | None, row_scale: Tensor | None, out: torch.dtype
) -> None:
    (m, k), (groups, _, n) = rows.shape, w.shape
    if rows.dtype in FLOATS:
        need(scale is None and row_scale is None, "floats take no scales")
        need(out == rows.dtype, f"output_dtype is {out}, x is {rows.dtype}")
    elif rows.dtype == E4M3:
        of("scale", scale, (torch.float32,), groups, _blocks(k), _blocks(n))
        of("per_token_scale", row_scale, (torch.float32,), m, _blocks(k))
        need(out in FLOATS, f"there is no {out} of FP8")
    else:
        of("scale", scale, (torch.float32, torch.bfloat16), groups, n)
        of("per_token_scale", row_scale, (torch.float32,), m)
        assert scale is not None
        pairs = ((torch.bfloat16, torch.bfloat16), (torch.float32, torch.float16))
        need((scale.dtype, out) in pairs, f"scale is {scale.dtype} for a result of {out}")


def _ends(group_list: Tensor | None, kind: int | None, groups: int, rows: int) -> list[int]:
    """Where each group ends; the list holds these (type 0) or the groups' sizes (type 1). The page
    wants them to add up to all rows; vllm-ascend runs it with fewer, as npu_moe_init_routing_v2
    counts them where experts are elsewhere. Nothing is said of the rows behind."""
    of("group_list", group_list, (torch.int64,), groups)
    assert group_list is not None
    need(kind in (0, 1), f"group_list_type {kind} is not emulated")
    need(kind == 0 or groups > 1, "counts of one group: the list must be longer than 1")
    ends = [int(end) for end in (group_list if kind == 0 else group_list.cumsum(0))]
    rising = all(a <= b for a, b in zip([0, *ends], ends, strict=False))
    need(rising and ends[-1] <= rows, f"groups end at {ends} of {rows} rows")
    return ends
