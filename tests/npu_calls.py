"""Calls of torch_npu's ops as the model makes them, on meta tensors, for the tests of the
constraint table: right ones, wrong ones, and what of a right one may vary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsa_hal.backends.npu._constraints import DTYPES

Arguments = dict[str, Any]

ALL = "a2 a3 950"


def tensor(dtype: str, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=DTYPES[dtype], device="meta")


def _paged(**arguments: Any) -> Arguments:
    """What ops over pages share: 2 requests of 4 tokens, 64 pages."""
    return dict(
        actual_seq_lengths_query=tensor("int32", 2), block_table=tensor("int32", 2, 30),
        layout_query="TND", sparse_mode=3, **arguments,
    )  # fmt: skip


_latent, _latent_rows = tensor("bf16", 64, 128, 1, 512), tensor("bf16", 900, 1, 512)
_packed, _packed_fp8 = tensor("int8", 64, 128, 1, 656), tensor("e4m3", 64, 128, 1, 656)

_indexer = _paged(
    query=tensor("bf16", 4, 64, 128), key=tensor("bf16", 64, 128, 1, 128),
    weights=tensor("bf16", 4, 64), actual_seq_lengths_key=tensor("int32", 2),
    layout_key="PA_BSND", sparse_count=2048,
)  # fmt: skip
_quant_indexer = _indexer | dict(
    query=tensor("int8", 4, 64, 128), key=tensor("int8", 64, 128, 1, 128),
    weights=tensor("fp16", 4, 64), query_dequant_scale=tensor("fp16", 4, 64),
    key_dequant_scale=tensor("fp16", 64, 128, 1), query_quant_mode=0, key_quant_mode=0,
)  # fmt: skip
_attention = _paged(
    query=tensor("bf16", 4, 128, 512), query_rope=tensor("bf16", 4, 128, 64), key=_latent,
    value=_latent, key_rope=tensor("bf16", 64, 128, 1, 64),
    sparse_indices=tensor("int32", 4, 1, 2048), scale_value=0.135,
    actual_seq_lengths_kv=tensor("int32", 2), layout_kv="PA_BSND", attention_mode=2,
)  # fmt: skip
_quant_attention = _paged(
    query=tensor("bf16", 4, 128, 576), key=_packed, value=_packed,
    sparse_indices=tensor("int32", 4, 1, 2048), scale_value=0.135, key_quant_mode=2,
    value_quant_mode=2, actual_seq_lengths_kv=tensor("int32", 2), layout_kv="PA_BSND",
    attention_mode=2,
)  # fmt: skip
_grouped = dict(
    x=[tensor("bf16", 64, 7168)], weight=[tensor("bf16", 256, 7168, 4096)],
    group_list=tensor("int64", 256), split_item=3, group_type=0, group_list_type=1,
)  # fmt: skip
_grouped_int8 = _grouped | dict(
    x=[tensor("int8", 64, 7168)], weight=[tensor("int8", 256, 7168, 4096)],
    scale=[tensor("bf16", 256, 4096)], per_token_scale=[tensor("fp32", 64)],
    output_dtype=torch.bfloat16,
)  # fmt: skip
_routing = dict(
    x=tensor("bf16", 4, 7168), expert_idx=tensor("int32", 4, 8), expert_num=257,
    active_expert_range=[0, 256], expert_tokens_num_type=1, expert_tokens_num_flag=True,
    quant_mode=-1, row_idx_type=0, active_num=32, drop_pad_mode=0,
)  # fmt: skip


def _turned(batch: int, rows: int, heads: int, width: int, batches: int = 1) -> Arguments:
    angle = tensor("fp32", batches, rows, 1, width)
    turned = tensor("fp32", batch, rows, heads, width)
    return dict(input=turned, r1=angle, r2=angle, rotary_mode="interleave")


CALLS: dict[str, list[tuple[str, Arguments]]] = {
    "npu_lightning_indexer": [
        (ALL, _indexer),
        ("a2 a3", _indexer | dict(weights=tensor("fp32", 4, 64))),
        (ALL, {**_indexer, "key": tensor("bf16", 900, 1, 128), "layout_key": "TND",
               "block_table": None, "return_value": True}),
    ],
    "npu_quant_lightning_indexer": [
        (ALL, _quant_indexer),
        ("950", _quant_indexer | dict(
            query=tensor("e4m3", 4, 64, 128), key=tensor("e4m3", 64, 128, 1, 128),
            weights=tensor("bf16", 4, 64), query_dequant_scale=tensor("fp32", 4, 64),
            key_dequant_scale=tensor("fp32", 64, 128, 1))),
    ],
    "npu_sparse_flash_attention": [
        (ALL, _attention),
        (ALL, {**_attention, "key": _latent_rows, "value": _latent_rows, "layout_kv": "TND",
               "key_rope": tensor("bf16", 900, 1, 64), "block_table": None, "sparse_mode": 0,
               "return_softmax_lse": True}),
    ],
    "npu_kv_quant_sparse_flash_attention": [
        (ALL, _quant_attention),
        ("950", _quant_attention | dict(key=_packed_fp8, value=_packed_fp8)),
    ],
    "npu_quant_matmul": [
        (ALL, dict(
            x1=tensor("int8", 4, 7168), x2=tensor("int8", 7168, 2112), scale=tensor("fp32", 2112),
            pertoken_scale=tensor("fp32", 4), output_dtype=torch.bfloat16)),
        ("950", dict(
            x1=tensor("e4m3", 4, 7168), x2=tensor("e4m3", 2112, 7168).mT,
            scale=tensor("fp32", 17, 56).mT, pertoken_scale=tensor("fp32", 4, 56),
            output_dtype=torch.bfloat16, group_sizes=[1, 128, 128])),
    ],
    "npu_dynamic_quant": [(ALL, dict(input=tensor("bf16", 4, 7168)))],
    "npu_dynamic_block_quant": [
        ("950", dict(x=tensor("bf16", 4, 7168), dst_type=torch.float8_e4m3fn, row_block_size=1,
                     col_block_size=128, min_scale=1e-4 / 448)),
    ],
    "npu_grouped_matmul": [
        (ALL, _grouped),
        (ALL, _grouped_int8),
        ("950", _grouped | dict(
            x=[tensor("e4m3", 64, 7168)], weight=[tensor("e4m3", 256, 4096, 7168).mT],
            scale=[tensor("fp32", 256, 32, 56).mT], per_token_scale=[tensor("fp32", 64, 56)],
            output_dtype=torch.bfloat16)),
    ],
    "npu_moe_gating_top_k": [
        (ALL, dict(
            x=tensor("fp32", 4, 256), k=8, bias=tensor("fp32", 256), k_group=4, group_count=8,
            group_select_mode=1, renorm=0, norm_type=1, routed_scaling_factor=2.5, eps=1e-20)),
    ],
    "npu_moe_init_routing_v2": [(ALL, _routing), (ALL, _routing | dict(quant_mode=1))],
    "npu_moe_finalize_routing": [
        (ALL, dict(
            expanded_permuted_rows=tensor("bf16", 32, 7168), skip1=tensor("bf16", 4, 7168),
            skip2=None, bias=None, scales=tensor("bf16", 4, 8),
            expanded_src_to_dst_row=tensor("int32", 32), export_for_source_row=None,
            drop_pad_mode=2)),
        (ALL, dict(
            expanded_permuted_rows=tensor("bf16", 32, 7168), skip1=tensor("bf16", 4, 7168),
            skip2=tensor("bf16", 4, 7168), bias=tensor("bf16", 256, 7168),
            scales=tensor("bf16", 4, 8), expanded_src_to_dst_row=tensor("int32", 32),
            export_for_source_row=tensor("int32", 4, 8), drop_pad_mode=2)),
    ],
    "npu_rms_norm": [
        (ALL, dict(input=tensor("bf16", 4, 7168), gamma=tensor("fp32", 7168), epsilon=1e-6)),
        (ALL, dict(input=tensor("bf16", 4, 7168), gamma=tensor("bf16", 7168))),
    ],
    "npu_rotary_mul": [
        (ALL, dict(
            input=tensor("fp32", 1, 4, 128, 64), r1=tensor("fp32", 1, 4, 1, 64),
            r2=tensor("fp32", 1, 4, 1, 64), rotary_mode="interleave")),
    ],
    "npu_swiglu": [(ALL, dict(input=tensor("bf16", 4, 4096), dim=-1))],
    "npu_scatter_nd_update_": [
        (ALL, dict(
            input=tensor("bf16", 8192, 512), indices=tensor("int64", 4, 1),
            updates=tensor("bf16", 4, 512))),
    ],
    "npu_format_cast": [(ALL, dict(input=tensor("bf16", 7168, 1536), acl_format=29))],
    "npu_mla_prolog_v3": [
        (ALL, dict(
            token_x=tensor("bf16", 4, 7168), weight_dq=tensor("bf16", 7168, 1536),
            weight_uq_qr=tensor("bf16", 1536, 24576), weight_uk=tensor("bf16", 128, 128, 512),
            weight_dkv_kr=tensor("bf16", 7168, 576), rmsnorm_gamma_cq=tensor("bf16", 1536),
            rmsnorm_gamma_ckv=tensor("bf16", 512), rope_sin=tensor("bf16", 4, 64),
            rope_cos=tensor("bf16", 4, 64), kv_cache=_latent,
            kr_cache=tensor("bf16", 64, 128, 1, 64), cache_index=tensor("int64", 4),
            rmsnorm_epsilon_cq=1e-6, rmsnorm_epsilon_ckv=1e-6, cache_mode="PA_BSND",
            query_norm_flag=True)),
    ],
}  # fmt: skip
"""Op -> the architectures on which a call is right, and its arguments: those of DeepSeek-V3.2."""

_wide = tensor("bf16", 4, 128, 128)
_page64 = tensor("bf16", 64, 64, 1, 512)
_halves = tensor("fp16", 64, 128, 1, 512)

BAD: dict[str, list[tuple[str, Arguments, str]]] = {
    "npu_lightning_indexer": [
        ("a2", dict(actual_seq_lengths_query=None), "actual_seq_lengths_query is not given"),
        ("a2", dict(actual_seq_lengths_key=...), "actual_seq_lengths_key is not given"),
        ("a3", dict(block_table=None), "block_table is not given"),
        ("a3", dict(base=2, block_table=tensor("int32", 2, 30)), "layout_key is 'TND'"),
        ("a2", dict(query=_wide, weights=tensor("bf16", 4, 128)), "heads is 128"),
        ("950", dict(query=tensor("bf16", 4, 48, 128), weights=tensor("bf16", 4, 48)),
         "heads is 48"),
        ("a2", dict(key=tensor("fp16", 64, 128, 1, 128)), "key is fp16"),
        ("a2", dict(weights=tensor("fp16", 4, 64)), "weights is fp16"),
        ("950", dict(weights=tensor("fp32", 4, 64)), "weights is fp32"),
        ("a2", dict(sparse_count=0), "sparse_count is 0"),
        ("a2", dict(sparse_count=3000), "sparse_count is 3000"),
        ("a2", dict(sparse_mode=1), "sparse_mode is 1"),
        ("950", dict(return_value=True), "return_value is True"),
        ("a2", dict(layout_query="BSND"), "layout_query is 'BSND'"),
        ("a2", dict(layout_key="BSND"), "layout_key is 'BSND'"),
        ("a2", dict(key=tensor("bf16", 64, 64, 1, 128)), "page is 64"),
    ],
    "npu_quant_lightning_indexer": [
        ("a3", dict(actual_seq_lengths_query=None), "actual_seq_lengths_query is not given"),
        ("a3", dict(block_table=None), "block_table is not given"),
        ("a3", dict(query_quant_mode=1), "query_quant_mode is 1"),
        ("a3", dict(key_quant_mode=2), "key_quant_mode is 2"),
        ("a2", dict(query=tensor("int8", 4, 128, 128), weights=tensor("fp16", 4, 128),
                    query_dequant_scale=tensor("fp16", 4, 128)), "heads is 128"),
        ("950", dict(query=tensor("int8", 4, 4, 128), weights=tensor("fp16", 4, 4),
                     query_dequant_scale=tensor("fp16", 4, 4)), "heads is 4"),
        ("a2", dict(query=tensor("e4m3", 4, 64, 128), key=tensor("e4m3", 64, 128, 1, 128)),
         "query is e4m3"),
        ("950", dict(key=tensor("e4m3", 64, 128, 1, 128)), "key is e4m3"),
        ("a3", dict(weights=tensor("bf16", 4, 64), query_dequant_scale=tensor("fp32", 4, 64),
                    key_dequant_scale=tensor("fp32", 64, 128, 1)), "weights is bf16"),
        ("a3", dict(query_dequant_scale=tensor("fp32", 4, 64),
                    key_dequant_scale=tensor("fp32", 64, 128, 1)), "query_dequant_scale is fp32"),
        ("a3", dict(key_dequant_scale=tensor("fp32", 64, 128, 1)), "key_dequant_scale is fp32"),
        ("a3", dict(sparse_count=3072), "sparse_count is 3072"),
        ("a3", dict(sparse_mode=2), "sparse_mode is 2"),
        ("a3", dict(layout_query="BSND"), "layout_query is 'BSND'"),
        ("a3", dict(layout_key="TND"), "layout_key is 'TND'"),
        ("a3", dict(key=tensor("int8", 64, 64, 1, 128),
                    key_dequant_scale=tensor("fp16", 64, 64, 1)), "page is 64"),
    ],
    "npu_sparse_flash_attention": [
        ("a2", dict(attention_mode=0), "attention_mode is 0"),
        ("a2", dict(attention_mode=...), "attention_mode is 0"),
        ("a2", dict(actual_seq_lengths_kv=None), "actual_seq_lengths_kv is not given"),
        ("a2", dict(block_table=None), "block_table is not given"),
        ("a3", dict(query=tensor("bf16", 4, 48, 512), query_rope=tensor("bf16", 4, 48, 64)),
         "heads is 48"),
        ("950", dict(query=tensor("bf16", 4, 129, 512), query_rope=tensor("bf16", 4, 129, 64)),
         "heads is 129"),
        ("a2", dict(key=_halves, value=_halves), "key is fp16"),
        ("a2", dict(value=tensor("bf16", 64, 128, 1, 512)), "same(key, value)"),
        ("a2", dict(sparse_mode=4), "sparse_mode is 4"),
        ("a2", dict(return_softmax_lse=True), "return_softmax_lse is True"),
        ("a2", dict(layout_query="BSND"), "layout_query is 'BSND'"),
        ("a2", dict(layout_kv="BSND"), "layout_kv is 'BSND'"),
        ("a2", dict(sparse_block_size=64), "sparse_block_size is 64"),
        ("a2", dict(key=_page64, value=_page64, key_rope=tensor("bf16", 64, 64, 1, 64)),
         "page is 64"),
        ("a2", dict(sinks=tensor("fp32", 128)), "sinks"),
    ],
    "npu_kv_quant_sparse_flash_attention": [
        ("a2", dict(attention_mode=0), "attention_mode is 0"),
        ("a2", dict(key_quant_mode=0), "key_quant_mode is 0"),
        ("a2", dict(value_quant_mode=1), "value_quant_mode is 1"),
        ("a2", dict(quant_scale_repo_mode=0), "quant_scale_repo_mode is 0"),
        ("a2", dict(tile_size=64), "tile_size is 64"),
        ("a2", dict(rope_head_dim=32), "rope_head_dim is 32"),
        ("a2", dict(actual_seq_lengths_query=None), "actual_seq_lengths_query is not given"),
        ("a2", dict(block_table=None), "block_table is not given"),
        ("a2", dict(query=tensor("bf16", 4, 48, 576)), "heads is 48"),
        ("950", dict(query=tensor("bf16", 4, 3, 576)), "heads is 3"),
        ("a3", dict(key=_packed_fp8, value=_packed_fp8), "key is e4m3"),
        ("a2", dict(value=tensor("int8", 64, 128, 1, 656)), "same(key, value)"),
        ("a2", dict(sparse_mode=1), "sparse_mode is 1"),
        ("a2", dict(layout_query="BSND"), "layout_query is 'BSND'"),
        ("a2", dict(layout_kv="TND"), "layout_kv is 'TND'"),
        ("a2", dict(sparse_block_size=16), "sparse_block_size is 16"),
        ("a2", dict(key=_packed[:, :64].contiguous(), value=...), "value is missing"),
        ("a2", dict(key=(small := tensor("int8", 64, 64, 1, 656)), value=small), "page is 64"),
    ],
    "npu_quant_matmul": [
        ("a2", dict(scale=tensor("fp32", 56)), "channels is 56"),
        ("a2", dict(x1=tensor("int8", 4, 65536), x2=tensor("int8", 65536, 2112)), "k is 65536"),
        ("a2", dict(x2=tensor("int8", 7168, 65536), scale=tensor("fp32", 65536)), "n is 65536"),
        ("950", dict(x2=tensor("e4m3", 7168, 2112)), "x2 is e4m3"),
        ("a2", dict(scale=tensor("bf16", 2112), output_dtype=torch.float16), "scale is bf16"),
        ("a2", dict(output_dtype=torch.float32), "output_dtype is torch.float32"),
        ("a2", dict(x1=tensor("e4m3", 4, 7168), x2=tensor("e4m3", 7168, 2112), base=0,
                    scale=tensor("fp32", 56, 17), pertoken_scale=tensor("fp32", 4, 56),
                    group_sizes=[1, 128, 128]), "arch is 'a2'"),
        ("950", dict(base=1, group_sizes=[128, 128, 128]), "group_sizes is [128, 128, 128]"),
        ("950", dict(base=1, scale=tensor("fp32", 56, 16)), "n_blocks is 16"),
        ("950", dict(base=1, output_dtype=torch.int8), "output_dtype is torch.int8"),
        ("950", dict(scale=tensor("fp32", 56, 17), pertoken_scale=tensor("fp32", 4, 56),
                     group_sizes=[1, 128, 128]), "group_sizes is [1, 128, 128]"),
        ("a2", dict(output_dtype=...), "output_dtype is missing"),
    ],
    "npu_dynamic_quant": [("a2", dict(input=tensor("bf16", 7168)), "bf16 [7168]")],
    "npu_dynamic_block_quant": [
        ("a2", dict(), "arch is 'a2'"),
        ("950", dict(dst_type=torch.int8), "dst_type is torch.int8"),
        ("950", dict(min_scale=-1.0), "min_scale is -1.0"),
        ("950", dict(row_block_size=128), "row_block_size is 128"),
        ("950", dict(col_block_size=64), "col_block_size is 64"),
    ],
    "npu_grouped_matmul": [
        ("a2", dict(weight=[tensor("fp16", 256, 7168, 4096)]), "weight is fp16"),
        ("a2", dict(split_item=0), "split_item is 0"),
        ("a2", dict(group_type=...), "group_type is not given"),
        ("a2", dict(group_list_type=2), "group_list_type is 2"),
        ("a2", dict(weight=[tensor("bf16", 1, 7168, 4096)], group_list=tensor("int64", 1)),
         "experts is 1"),
        ("a2", dict(weight=[tensor("bf16", 1025, 8, 8)], group_list=tensor("int64", 1025),
                    x=[tensor("bf16", 64, 8)]), "experts is 1025"),
        ("a2", dict(weight=[tensor("bf16", 2, 65536, 8)], group_list=tensor("int64", 2),
                    x=[tensor("bf16", 64, 65536)]), "k is 65536"),
        ("a2", dict(weight=[tensor("bf16", 2, 8, 65536)], group_list=tensor("int64", 2),
                    x=[tensor("bf16", 64, 8)]), "n is 65536"),
        ("a2", dict(base=1, per_token_scale=None), "per_token_scale is not given"),
        ("a2", dict(base=1, scale=[tensor("fp32", 256, 4096)]), "scale is fp32"),
        ("a2", dict(base=1, output_dtype=torch.float16), "output_dtype is torch.float16"),
        ("a2", dict(scale=[tensor("bf16", 256, 4096)]), "scale is bf16"),
        ("a2", dict(output_dtype=torch.float32), "output_dtype is torch.float32"),
        ("a3", dict(CALLS["npu_grouped_matmul"][2][1]), "arch is 'a3'"),
        ("950", dict(base=2, scale=[tensor("fp32", 256, 56, 31)]), "n_blocks is 31"),
        ("950", dict(base=2, output_dtype=...), "output_dtype is not given"),
    ],
    "npu_moe_gating_top_k": [
        ("a2", dict(bias=tensor("bf16", 256)), "bias is bf16"),
        ("a2", dict(group_count=7), "group_count is 7"),
        ("a2", dict(x=tensor("fp32", 4, 64), bias=None, group_count=32), "group_count is 32"),
        ("a2", dict(x=tensor("fp32", 4, 1024), bias=None, group_count=128, k_group=64),
         "group_count is 128"),
        ("a2", dict(k_group=9), "k_group is 9"),
        ("a2", dict(k=129), "k is 129"),
        ("a2", dict(group_select_mode=2), "group_select_mode is 2"),
        ("a2", dict(renorm=1), "renorm is 1"),
        ("a2", dict(norm_type=2), "norm_type is 2"),
    ],
    "npu_moe_init_routing_v2": [
        ("a2", dict(expert_num=7, active_expert_range=[0, 6]), "expert_num is 7"),
        ("a2", dict(expert_num=10241), "expert_num is 10241"),
        ("a2", dict(active_expert_range=[0, 258]), "active_expert_range is [0, 258]"),
        ("a2", dict(active_expert_range=[256]), "active_expert_range is [256]"),
        ("a2", dict(row_idx_type=2), "row_idx_type is 2"),
        ("a2", dict(base=1, x=tensor("int8", 4, 7168)), "x is int8"),
        ("a2", dict(active_num=...), "active_num is -1"),
        ("a2", dict(expert_tokens_num_type=0), "expert_tokens_num_type is 0"),
        ("a2", dict(expert_tokens_num_flag=False), "expert_tokens_num_flag is False"),
        ("a2", dict(drop_pad_mode=1), "drop_pad_mode is 1"),
        ("a2", dict(quant_mode=0), "quant_mode is 0"),
    ],
    "npu_moe_finalize_routing": [
        ("a2", dict(expanded_permuted_rows=tensor("bf16", 31, 7168),
                    expanded_src_to_dst_row=tensor("int32", 31)), "rows is 31"),
        ("a2", dict(scales=tensor("fp32", 4, 8)), "scales is fp32"),
        ("a2", dict(skip1=tensor("fp32", 4, 7168)), "skip1 is fp32"),
        ("a2", dict(base=1, skip2=tensor("fp32", 4, 7168)), "skip2 is fp32"),
        ("a2", dict(base=1, bias=tensor("fp32", 256, 7168)), "bias is fp32"),
        ("a2", dict(base=1, skip1=None), "skip1 is not given"),
        ("a2", dict(base=1, export_for_source_row=None), "export_for_source_row is not given"),
        ("a2", dict(drop_pad_mode=1), "drop_pad_mode is 1"),
        ("a2", dict(bias=...), "bias is missing"),
    ],
    "npu_rms_norm": [
        ("a2", dict(gamma=tensor("fp16", 7168)), "gamma is fp16"),
        ("a2", dict(input=tensor("bf16", 7168)), "bf16 [7168]"),
    ],
    "npu_rotary_mul": [
        ("a2", dict(rotary_mode="quarter"), "rotary_mode is 'quarter'"),
        ("a2", dict(input=tensor("bf16", 1, 4, 128, 64)), "input is bf16"),
        ("950", dict(r1=tensor("fp32", 2, 4, 1, 64), r2=tensor("fp32", 2, 4, 1, 64)),
         "batches is 2"),
        ("a2", _turned(1, 4, 8, 63), "width is 63"),
        ("a2", _turned(1, 4, 8, 896), "width is 896"),
        ("950", _turned(1, 4, 8, 1026), "width is 1026"),
        ("a2", _turned(1000, 4, 8, 64) | dict(rotary_mode="half"), "batch is 1000"),
        ("a2", _turned(10, 4, 100, 64), "batch is 10"),
        ("a2", _turned(2, 4, 8, 64, batches=2), "batches is 2"),
    ],
    "npu_swiglu": [
        ("a2", dict(input=tensor("bf16", 4, 4095)), "both is 4095"),
        ("a2", dict(dim=0), "dim is 0"),
    ],
    "npu_scatter_nd_update_": [
        ("a2", dict(updates=tensor("fp32", 4, 512)), "updates is fp32"),
    ],
    "npu_format_cast": [("a2", dict(acl_format=0), "acl_format is 0")],
    "npu_mla_prolog_v3": [
        ("a2", dict(token_x=tensor("bf16", 4, 512), weight_dq=tensor("bf16", 512, 1536),
                    weight_dkv_kr=tensor("bf16", 512, 576)), "hidden is 512"),
        ("a2", dict(weight_dq=tensor("bf16", 7168, 768), rmsnorm_gamma_cq=tensor("bf16", 768),
                    weight_uq_qr=tensor("bf16", 768, 24576)), "q_lora is 768"),
        ("a2", dict(weight_uq_qr=tensor("bf16", 1536, 576),
                    weight_uk=tensor("bf16", 3, 128, 512)), "heads is 3"),
        ("a2", dict(weight_uq_qr=tensor("bf16", 1536, 16384),
                    weight_uk=tensor("bf16", 128, 64, 512)), "nope is 64"),
        ("a2", dict(weight_uq_qr=tensor("bf16", 1536, 16384)), "q_width is 16384"),
        ("a2", dict(cache_mode="PA_NZ"), "cache_mode is 'PA_NZ'"),
        ("a2", dict(kv_cache=_page64, kr_cache=tensor("bf16", 64, 64, 1, 64)), "page is 64"),
    ],
}  # fmt: skip
"""Op -> architecture, what of a right call is changed (`base` says which; `...` leaves out), and
words of the refusal."""

MAY_VARY: dict[str, tuple[str, ...]] = {
    "npu_lightning_indexer": (
        "bf16 as fp16", "block_table axis 1 +1", "block_table left out", "fp32 as bf16",
        "key axis 0 +1", "return_value left out", "sparse_count left out", "sparse_mode left out",
        "weights bf16", "weights fp32",
    ),
    "npu_quant_lightning_indexer": (
        "block_table axis 1 +1", "int8 as e4m3", "sparse_count left out", "sparse_mode left out",
    ),
    "npu_sparse_flash_attention": (
        "bf16 as fp16", "block_table axis 1 +1", "block_table left out",
        "return_softmax_lse left out", "sparse_indices axis 2 +1", "sparse_mode left out",
    ),
    "npu_kv_quant_sparse_flash_attention": (
        "block_table axis 1 +1", "e4m3 as int8", "int8 as e4m3", "key axis 0 +1", "key e4m3",
        "key int8", "sparse_indices axis 2 +1", "sparse_mode left out", "value axis 0 +1",
        "value e4m3", "value int8",
    ),
    "npu_quant_matmul": (
        "pertoken_scale gaps", "scale bf16", "scale gaps", "x2 axis 1 +1", "x2 gaps",
    ),
    "npu_dynamic_quant": (
        "bf16 as fp16", "input axis 0 +1", "input axis 1 +1", "input fp16", "input gaps",
        "input rank +1",
    ),
    "npu_dynamic_block_quant": (
        "bf16 as fp16", "col_block_size left out", "min_scale left out",
        "row_block_size left out", "x axis 0 +1", "x axis 1 +1", "x fp16", "x gaps",
    ),
    "npu_grouped_matmul": (
        "bf16 as fp16", "bf16 as fp32", "group_list gaps", "group_list_type left out",
        "per_token_scale gaps", "scale gaps", "weight axis 2 +1", "weight gaps", "x axis 0 +1",
    ),
    "npu_moe_gating_top_k": (
        "bias None", "bias gaps", "bias left out", "eps left out", "fp32 as bf16", "fp32 as fp16",
        "group_select_mode left out", "k_group left out", "norm_type left out", "renorm left out",
        "routed_scaling_factor left out", "x axis 0 +1", "x gaps",
    ),
    "npu_moe_init_routing_v2": (
        "active_expert_range left out", "bf16 as fp16", "bf16 as fp32", "bf16 as int8",
        "drop_pad_mode left out", "expert_idx gaps", "quant_mode left out",
        "row_idx_type left out", "x axis 1 +1", "x fp16", "x fp32", "x gaps", "x int8",
    ),
    "npu_moe_finalize_routing": (
        "bf16 as fp16", "bf16 as fp32", "bias None", "bias axis 0 +1", "bias gaps",
        "drop_pad_mode left out", "expanded_permuted_rows gaps", "expanded_src_to_dst_row gaps",
        "export_for_source_row gaps", "scales gaps", "skip1 None", "skip1 gaps", "skip2 None",
        "skip2 gaps",
    ),
    "npu_rms_norm": (
        "bf16 as fp16", "bf16 as fp32", "epsilon left out", "fp32 as bf16", "gamma bf16",
        "gamma fp32", "gamma gaps", "input axis 0 +1", "input fp16", "input fp32", "input gaps",
        "input rank +1",
    ),
    "npu_rotary_mul": (
        "fp32 as bf16", "fp32 as fp16", "input axis 0 +1", "input axis 2 +1", "input gaps",
        "r1 gaps", "r2 gaps", "rotary_mode left out",
    ),
    "npu_swiglu": (
        "bf16 as fp16", "bf16 as fp32", "dim left out", "input axis 0 +1", "input fp16",
        "input fp32", "input rank +1", "input rank -1",
    ),
    "npu_scatter_nd_update_": (
        "bf16 as fp16", "bf16 as fp32", "bf16 as int64", "bf16 as int8", "indices gaps",
        "indices int32", "input axis 0 +1", "input gaps", "int64 as int32", "updates gaps",
    ),
    "npu_format_cast": (
        "bf16 as fp16", "bf16 as int8", "input axis 0 +1", "input axis 1 +1", "input fp16",
        "input gaps", "input int8", "input rank +1",
    ),
    "npu_mla_prolog_v3": (
        "cache_mode left out", "query_norm_flag left out", "rmsnorm_epsilon_ckv left out",
        "rmsnorm_epsilon_cq left out",
    ),
}  # fmt: skip
"""Op -> every single change (`variations` of the tests) of a right call that is right as well."""
