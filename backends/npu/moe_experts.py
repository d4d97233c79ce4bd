"""moe_experts on Ascend: routing, two grouped products around the gate, and the weighted sum."""

from typing import Any

import torch
from torch import Tensor

from dsa_hal.backends.npu._grouped import Dispatched, dispatched, product, product_refused, refused
from dsa_hal.backends.npu._library import call, refusal
from dsa_hal.backends.npu._products import Rows, half, is_float, is_int8, meta, quantised
from dsa_hal.ops.moe import moe_experts


def _why_not(
    x: Tensor, ids: Tensor, weights: Tensor, w13: list[Tensor], w2: list[Tensor],
    shared: Tensor | None = None, *, act: str = "none",
) -> str | None:  # fmt: skip
    (topk, dim), dtype = (ids.shape[1], x.shape[1]), _computed(x, w13)
    if is_float(w13) != is_float(w2) or is_int8(w13) != is_int8(w2):
        return "w13 and w2 are packed in unlike forms"
    if not is_float(w13) and not is_int8(w13) and act == "none":
        return "activations are not to be rounded; the device would round them to FP8"
    both = w13[0].shape[2 if is_int8(w13) else 1]
    slots = meta(topk, dim, dtype=dtype)
    skip = None if shared is None else meta(1, dim, dtype=dtype)
    return (
        refused(dim, topk, w13, dtype)
        or product_refused(both // 2, w2, dtype)
        or refusal("npu_swiglu", input=meta(1, both, dtype=dtype), dim=-1)
        or refusal(
            "npu_moe_finalize_routing",
            **_sum(slots, meta(topk, dtype=torch.int32), meta(1, topk, dtype=dtype), skip),
        )
    )


@moe_experts.impl("npu", "grouped_matmul", contract=1, why_not=_why_not)
def experts(
    x: Tensor, ids: Tensor, weights: Tensor, w13: list[Tensor], w2: list[Tensor],
    shared: Tensor | None = None, *, act: str = "none",
) -> Tensor:  # fmt: skip
    """Whatever form the weights have: rows are quantised as they want it, or not at all. The
    weights of the sum are rounded to the rows' dtype, as the device's sum takes them."""
    if not ids.numel():
        return x.new_zeros(x.shape) if shared is None else shared.clone()
    dtype = _computed(x, w13)
    first, second = ([part.contiguous() for part in weight] for weight in (w13, w2))
    sent = dispatched(x.to(dtype), ids.contiguous(), first)
    both = product(sent.rows, first, sent.counts, dtype)
    hidden = call("npu_swiglu", input=both, dim=-1)
    rows = Rows(hidden) if is_float(second) else quantised(hidden, second)
    done = product(rows, second, sent.counts, dtype)
    skip = None if shared is None else shared.to(dtype).contiguous()
    out: Tensor = call("npu_moe_finalize_routing", **_present(done, sent, ids, weights, skip))
    return out.to(x.dtype)


def _computed(x: Tensor, weight: list[Tensor]) -> torch.dtype:
    return x.dtype if is_float(weight) else half(x.dtype)


def _present(
    done: Tensor, sent: Dispatched, ids: Tensor, weights: Tensor, skip: Tensor | None
) -> dict[str, Any]:
    """The sum's arguments: experts that are not here count row 0 nothing. That row is anything if
    no expert of any token is here, and 0 times anything is not 0: it is cleared then."""
    done[:1].masked_fill_(sent.counts.sum() == 0, 0)
    scales = torch.where(ids < 0, 0, weights).to(done.dtype)
    return _sum(done, sent.place.clamp_min(0), scales, skip)


def _sum(rows: Tensor, place: Tensor, scales: Tensor, skip: Tensor | None) -> dict[str, Any]:
    return dict(
        expanded_permuted_rows=rows, skip1=skip, skip2=None, bias=None, scales=scales,
        expanded_src_to_dst_row=place, export_for_source_row=None, drop_pad_mode=2,
    )  # fmt: skip
