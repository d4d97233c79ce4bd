"""Rows to their experts and through their experts' weights, by the device's routing and its grouped
product. No count comes to the host.

Where ids of -1 leave rows without an expert, counts sum to less than the rows there are. The page
of op-plugin wants them to sum to all; vllm-ascend runs the same with experts on other ranks
(`TokenDispatcherWithAllGather` at 010024d7cbdc). The model has no such ids.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsa_hal.backends.npu._library import call, refusal
from dsa_hal.backends.npu._products import (
    Rows,
    is_float,
    is_int8,
    like,
    meta,
    quantised,
    quantising,
    scale_dtype,
)

AS_THEY_ARE, INT8 = -1, 1
"""Values of `quant_mode`."""


class Dispatched(NamedTuple):
    """rows    [tokens * topk, k], experts ascending; behind the counted ones stands anything
    place   [tokens * topk] int32 row of each slot, -1 for ids of -1
    counts  [experts] int64 rows of each expert
    """

    rows: Rows
    place: Tensor
    counts: Tensor


def outputs(weight: Sequence[Tensor]) -> int:
    """n of a packed weight [experts, ...]."""
    return weight[0].shape[2 if is_int8(weight) else 1]


def dispatched(x: Tensor, ids: Tensor, weight: Sequence[Tensor]) -> Dispatched:
    """Each row of x [tokens, k] once per id in ids [tokens, topk] int32 that is not -1, as the
    packed weight [experts, ...] wants rows. There are tokens and ids."""
    experts, mode = weight[0].shape[0], _mode(weight)
    known = torch.where(ids < 0, experts, ids)
    values, place, counts, scale = call(
        "npu_moe_init_routing_v2", **_routing(x.contiguous(), known, experts, mode)
    )
    if mode == INT8:
        return Dispatched(Rows(values, scale), place, counts)
    rows = Rows(values) if is_float(weight) else quantised(values, weight)
    return Dispatched(rows, place, counts)


def product(rows: Rows, weight: Sequence[Tensor], counts: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows [m, k], `counts` [experts] int64 of each expert, times the transposes of the experts'
    weights: [m, n] in `dtype`, anything behind the counted rows."""
    out: Tensor = call("npu_grouped_matmul", **_product(rows, weight, counts, dtype))[0]
    return out


def by_expert(x: Tensor, weight: Sequence[Tensor], layout: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows x [rows, k] times the transpose of the weight that `layout` [rows] names, in whatever
    order, zero for -1: [rows, n] in `dtype`, as which rows meet the weight."""
    if not x.shape[0]:
        return x.new_zeros(0, outputs(weight))
    dense = [part.contiguous() for part in weight]
    sent = dispatched(x.to(dtype), layout[:, None].contiguous(), dense)
    done = product(sent.rows, dense, sent.counts, dtype)
    back = done.index_select(0, sent.place.clamp_min(0))
    return back.masked_fill((layout < 0)[:, None], 0)


# -- what the table says of them ----------------------------------------------------------------


def refused(k: int, topk: int, weight: Sequence[Tensor], dtype: torch.dtype) -> str | None:
    """Why `dispatched` and `product` cannot serve rows [*, k] with `topk` ids each that meet the
    weight in `dtype`."""
    x, ids = meta(1, k, dtype=dtype), meta(1, topk, dtype=torch.int32)
    return refusal(
        "npu_moe_init_routing_v2", **_routing(x, ids, weight[0].shape[0], _mode(weight))
    ) or product_refused(k, weight, dtype)


def product_refused(k: int, weight: Sequence[Tensor], dtype: torch.dtype) -> str | None:
    """Why `product` cannot serve rows [*, k] that meet the weight in `dtype`."""
    flat = [like(part) for part in weight]
    if is_float(flat) and flat[0].dtype != dtype:
        return f"rows are {dtype}, weights {flat[0].dtype}; npu_grouped_matmul takes one dtype"
    if not is_float(flat):
        name, arguments = quantising(meta(1, k, dtype=dtype), flat)
        if (wrong := refusal(name, **arguments)) is not None:
            return wrong
    rows, counts = Rows.meta(1, k, flat, dtype), meta(flat[0].shape[0], dtype=torch.int64)
    return refusal("npu_grouped_matmul", **_product(rows, flat, counts, dtype))


def _mode(weight: Sequence[Tensor]) -> int:
    return INT8 if is_int8(weight) else AS_THEY_ARE


def _routing(x: Tensor, ids: Tensor, experts: int, quant_mode: int) -> dict[str, Any]:
    """An expert more than there are takes the ids of -1; it is outside the range that gets rows."""
    return dict(
        x=x, expert_idx=ids, expert_num=experts + 1, active_expert_range=[0, experts],
        expert_tokens_num_type=1, expert_tokens_num_flag=True, quant_mode=quant_mode,
        row_idx_type=0, active_num=ids.numel(), drop_pad_mode=0,
    )  # fmt: skip


def _product(
    rows: Rows, weight: Sequence[Tensor], counts: Tensor, dtype: torch.dtype
) -> dict[str, Any]:
    """Counts (type 1) are never to be one alone; one is also its own cumulative sum (type 0)."""
    found: dict[str, Any] = dict(
        x=[rows.values], group_list=counts, split_item=3, group_type=0,
        group_list_type=1 if counts.shape[0] > 1 else 0,
    )  # fmt: skip
    if is_float(weight):
        return dict(found, weight=[weight[0].mT])
    values, scale = weight
    found.update(per_token_scale=[rows.scale], output_dtype=dtype)
    if is_int8(weight):
        return dict(found, weight=[values], scale=[scale.to(scale_dtype(dtype))])
    return dict(found, weight=[values.mT], scale=[scale.mT])
