"""Tokens to experts and back.

Sources: op-plugin, docs/zh/custom_APIs/torch_npu, the page of each op; for the order of equal
scores ops-transformer's golden of moe_gating_top_k, which sorts in a stable way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ci.ascend.emulated._need import FLOATS, dense, need, of, undefined
from ci.ascend.emulated.products import rounded


def _best(scores: Tensor, count: int) -> Tensor:
    """Places of the `count` largest of each row, descending, the lower place first among equals."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def npu_moe_gating_top_k(
    x: Tensor, k: int, bias: Tensor | None, k_group: int, group_count: int, group_select_mode: int,
    renorm: int, norm_type: int, out_flag: bool, routed_scaling_factor: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(weights [tokens, k], experts [tokens, k] int32, normed scores [tokens, experts] fp32).
    Groups and experts are chosen by score plus bias; weights are of scores without it."""
    of("x", x, FLOATS, None, None)
    tokens, experts = x.shape
    if bias is not None:
        of("bias", bias, (x.dtype,), experts)
    need(experts <= 2048 and group_count > 0 and experts % group_count == 0, f"{experts} experts")
    size = experts // group_count
    need(size > 2 and -(-size // 32) * 32 * group_count <= 2048, f"groups of {size}")
    need(1 <= k_group <= group_count and 1 <= k <= size * k_group, f"k is {k}, k_group {k_group}")
    need(group_select_mode in (0, 1) and norm_type in (0, 1) and renorm == 0, "unknown modes")
    wide = x.float()
    normed = wide.sigmoid() if norm_type == 1 else wide.softmax(-1)
    chosen = normed if bias is None else normed + bias.float()
    groups = chosen.view(tokens, group_count, size)
    worth = groups.topk(2).values.sum(-1) if group_select_mode == 1 else groups.amax(-1)
    kept = torch.zeros_like(worth, dtype=torch.bool).scatter(1, _best(worth, k_group), True)
    index = _best(groups.masked_fill(~kept[..., None], -torch.inf).flatten(1), k)
    weights = normed.gather(1, index)
    if norm_type == 1:
        weights = weights / (weights.sum(-1, keepdim=True) + eps)
    out = normed if out_flag else undefined(tokens, experts, dtype=torch.float32)
    return (weights * routed_scaling_factor).to(x.dtype), index.to(torch.int32), out


def npu_moe_init_routing_v2(
    x: Tensor, expert_idx: Tensor, scale: Tensor | None, active_num: int, expert_num: int,
    drop_pad_mode: int, expert_tokens_num_type: int, expert_tokens_num_flag: bool, quant_mode: int,
    active_expert_range: list[int], row_idx_type: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(rows [tokens * chosen, hidden] by expert ascending, where each slot went, rows of each
    expert, scales of the rows). Only experts within the range get rows."""
    of("x", x, (*FLOATS, torch.int8), None, None)
    tokens, hidden = x.shape
    of("expert_idx", expert_idx, (torch.int32,), tokens, None)
    dense(x=x, expert_idx=expert_idx)
    slots = expert_idx.numel()
    start, end = active_expert_range or (0, expert_num)
    need(0 < expert_num <= 10240, f"expert_num is {expert_num}")
    need(0 <= start < end <= expert_num, f"active_expert_range is {active_expert_range}")
    known = bool(((expert_idx >= 0) & (expert_idx < expert_num)).all())
    need(known, f"expert_idx names experts outside [0, {expert_num})")
    need(
        active_num in (-1, 0, slots), f"active_num is {active_num}: part of the rows, not emulated"
    )
    need(drop_pad_mode == 0, "dropping tokens is not emulated")
    need(expert_tokens_num_type == 1 and expert_tokens_num_flag, "only counts are emulated")
    need(quant_mode in (-1, 1) and scale is None, "only dynamic int8 without scale is emulated")
    need(quant_mode == -1 or x.dtype != torch.int8, "codes are not quantised again")
    need(row_idx_type == 0, "only gathering places are emulated")
    flat = expert_idx.flatten()
    order = flat.sort(stable=True).indices
    order = order[(flat[order] >= start) & (flat[order] < end)]
    source = x[order // expert_idx.shape[1]]
    scales = undefined(slots, dtype=torch.float32)
    if quant_mode == 1:
        wide = source.float()
        each = wide.abs().amax(-1, keepdim=True) / 127
        scales[: len(order)], source = each[:, 0], rounded(wide, each)
    rows = undefined(slots, hidden, dtype=source.dtype)
    rows[: len(order)] = source
    place = torch.full((slots,), -1, dtype=torch.int32)
    place[order] = torch.arange(len(order), dtype=torch.int32)
    return rows, place, torch.bincount(flat[order] - start, minlength=end - start), scales


def npu_moe_finalize_routing(
    expanded_permuted_rows: Tensor, skip1: Tensor | None, skip2: Tensor | None,
    bias: Tensor | None, scales: Tensor | None, expanded_src_to_dst_row: Tensor,
    export_for_source_row: Tensor | None, drop_pad_mode: int | None,
) -> Tensor:  # fmt: skip
    """What each token's slots [tokens * chosen] point at, times their scales, summed, plus skips
    [tokens, hidden]. Slots lie token after token in modes 2 and 3, choice after choice in 0 and 1;
    in 1 and 3 rows are [experts, capacity, hidden] and a slot may be -1."""
    need(drop_pad_mode in (0, 1, 2, 3), f"drop_pad_mode is {drop_pad_mode}")
    dropping, dtype = drop_pad_mode in (1, 3), expanded_permuted_rows.dtype
    of("expanded_permuted_rows", expanded_permuted_rows, FLOATS, *((None,) * (2 + dropping)))
    rows = expanded_permuted_rows.flatten(0, -2)
    of("scales", scales, (dtype,), None, None)
    assert scales is not None
    tokens, chosen = scales.shape
    slot = expanded_src_to_dst_row
    of("expanded_src_to_dst_row", slot, (torch.int32,), tokens * chosen)
    need(dropping or rows.shape[0] == slot.shape[0], f"{rows.shape[0]} rows, {slot.shape[0]} slots")
    inside = bool(((slot >= -int(dropping)) & (slot < rows.shape[0])).all())
    need(inside, f"expanded_src_to_dst_row leaves [{-int(dropping)}, {rows.shape[0]})")
    need(bias is None and export_for_source_row is None, "bias is not emulated")
    need(skip2 is None or skip1 is not None, "skip2 is not given without skip1")
    total = torch.zeros(tokens, rows.shape[1])
    for name, skip in (("skip1", skip1), ("skip2", skip2)):
        if skip is not None:
            of(name, skip, (dtype,), tokens, rows.shape[1])
            total += skip.float()
    places = slot.view(tokens, chosen) if drop_pad_mode in (2, 3) else slot.view(chosen, tokens).T
    for choice in range(chosen):
        at = places[:, choice].long()
        found = torch.where((at < 0)[:, None], 0.0, rows[at.clamp_min(0)].float())
        total += scales[:, choice, None].float() * found
    return total.to(dtype)
