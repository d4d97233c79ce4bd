"""What the ops return, as outlines: for tensors on "meta", where no torch_npu is there to say it.
Nothing is demanded of a call here. The wheel's own functions are asked in ci/ascend/wheel.

Source: op-plugin, docs/zh/custom_APIs/torch_npu, the page of each op.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ci.ascend.emulated._need import dtype_of

INT32, FP32 = torch.int32, torch.float32


def _like(t: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, dtype=dtype or t.dtype, device=t.device)


def npu_lightning_indexer(
    query: Tensor, sparse_count: int, return_value: bool
) -> tuple[Tensor, Tensor]:
    shape = (query.shape[0], 1, sparse_count)
    return _like(query, *shape, dtype=INT32), _like(query, *(shape if return_value else (0,)))


def npu_quant_lightning_indexer(query: Tensor, sparse_count: int) -> Tensor:
    return _like(query, query.shape[0], 1, sparse_count, dtype=INT32)


def npu_sparse_flash_attention(
    query: Tensor, return_softmax_lse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    lse = (1, *query.shape[:2]) if return_softmax_lse else (0,)
    return torch.empty_like(query), _like(query, *lse, dtype=FP32), _like(query, *lse, dtype=FP32)


def npu_kv_quant_sparse_flash_attention(query: Tensor, rope_head_dim: int) -> Tensor:
    return _like(query, *query.shape[:-1], query.shape[-1] - rope_head_dim)


def npu_dynamic_quant(input: Tensor) -> tuple[Tensor, Tensor]:
    return _like(input, *input.shape, dtype=torch.int8), _like(input, *input.shape[:-1], dtype=FP32)


def npu_dynamic_block_quant(x: Tensor, dst_type: int, col_block_size: int) -> tuple[Tensor, Tensor]:
    rows, k = x.shape
    codes = _like(x, rows, k, dtype=dtype_of(dst_type, torch.int8))
    return codes, _like(x, rows, -(-k // col_block_size), dtype=FP32)


def npu_quant_matmul(x1: Tensor, x2: Tensor, output_dtype: int | None) -> Tensor:
    return _like(x1, x1.shape[0], x2.shape[1], dtype=dtype_of(output_dtype, torch.int8))


def npu_grouped_matmul(
    x: list[Tensor], weight: list[Tensor], output_dtype: int | None
) -> list[Tensor]:
    rows = x[0]
    out = dtype_of(output_dtype, rows.dtype)
    return [_like(rows, rows.shape[0], weight[0].shape[-1], dtype=out)]


def npu_moe_gating_top_k(x: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    chosen = (x.shape[0], k)
    return _like(x, *chosen), _like(x, *chosen, dtype=INT32), _like(x, *x.shape, dtype=FP32)


def npu_moe_init_routing_v2(
    x: Tensor, expert_idx: Tensor, expert_num: int, quant_mode: int, active_expert_range: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    slots, (start, end) = expert_idx.numel(), active_expert_range or (0, expert_num)
    rows = _like(x, slots, x.shape[1], dtype=x.dtype if quant_mode == -1 else torch.int8)
    place, scales = _like(x, slots, dtype=INT32), _like(x, slots, dtype=FP32)
    return rows, place, _like(x, end - start, dtype=torch.int64), scales


def npu_moe_finalize_routing(expanded_permuted_rows: Tensor, scales: Tensor) -> Tensor:
    rows = expanded_permuted_rows
    return _like(rows, scales.shape[0], rows.shape[-1])


def npu_rms_norm(input: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(input), _like(input, *input.shape[:-1], 1, dtype=FP32)


def npu_rotary_mul(input: Tensor) -> Tensor:
    return torch.empty_like(input)


def npu_swiglu(input: Tensor, dim: int) -> Tensor:
    shape = list(input.shape)
    shape[dim] //= 2
    return _like(input, *shape)


def npu_scatter_nd_update_(input: Tensor) -> Tensor:
    return input


def npu_format_cast(input: Tensor) -> Tensor:
    return torch.empty_like(input, memory_format=torch.contiguous_format)


def npu_mla_prolog_v3(
    token_x: Tensor, weight_dq: Tensor, weight_uk: Tensor, rope_sin: Tensor, query_norm_flag: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens, (heads, _, lora) = token_x.shape[0], weight_uk.shape
    query = _like(token_x, tokens, heads, lora)
    normed = (tokens, weight_dq.shape[1]) if query_norm_flag else (1,)
    nothing = [_like(token_x, 1, dtype=FP32) for _ in range(2)]
    rotated = _like(token_x, tokens, heads, rope_sin.shape[1])
    return query, rotated, nothing[0], _like(token_x, *normed), nothing[1]
