"""Stand-ins for libraries that need a GPU: the signatures, conventions and habits that adapters
must cope with, and the references' arithmetic. What a real library would read out of bounds, or
leave undefined, fails an assertion or is NaN here."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from dsa_hal.ops import (
    fp8_gemm,
    indexer_logits,
    indexer_logits_paged,
    sparse_mla,
    sparse_mla_paged,
)

E4M3 = torch.float8_e4m3fn
LN2 = 0.6931471805599453


def module(**names: Any) -> ModuleType:
    made = ModuleType("fake")
    made.__dict__.update(names)
    return made


# -- FlashMLA -----------------------------------------------------------------------------------


def _dense_rows(*tensors: Any) -> bool:
    return all(t.stride(-1) == 1 for t in tensors if isinstance(t, Tensor))


def _sparse(q: Tensor, kv: Tensor, indices: Tensor, scale: float, **more: Any) -> Any:
    assert _dense_rows(q, kv, indices, *more.values())
    assert q.shape[1] in (64, 128) and indices.shape[2] % 128 == 0 and kv.shape[1] == 1
    return sparse_mla.reference(q, kv[:, 0], indices[:, 0], softmax_scale=scale, **more)


def _paged(q: Tensor, cache: Tensor, indices: Tensor, scale: float, **more: Any) -> Any:
    """Only -1 is masked: every other number is an address."""
    assert _dense_rows(q, cache, indices, *more.values())
    assert q.shape[2] in (64, 128) and indices.shape[2] % 64 == 0
    assert cache.dtype == E4M3 and cache.shape[2:] == (1, 656)
    assert int(indices.min()) >= -1 and int(indices.max()) < cache.shape[0] * cache.shape[1]
    return sparse_mla_paged.reference(
        q, cache[:, :, 0].view(torch.uint8), indices, layout="latent_fp8/512+64",
        softmax_scale=scale, **more,
    )  # fmt: skip


def flash_mla_2025() -> ModuleType:
    """Base 2, empty rows -inf, no sink, no lengths, a plan made from lengths."""

    def flash_mla_sparse_fwd(
        q: Tensor, kv: Tensor, indices: Tensor, sm_scale: float, d_v: int = 512
    ) -> Any:
        out, top, lse = _sparse(q, kv, indices, sm_scale, dim_v=d_v)
        lse = lse.masked_fill(lse == torch.inf, -torch.inf)
        return out, top / LN2, lse / LN2

    def get_mla_metadata(
        cache_seqlens: Tensor, num_q_tokens_per_head_k: int, num_heads_k: int,
        num_heads_q: int | None = None, is_fp8_kvcache: bool = False, topk: int | None = None,
    ) -> Any:  # fmt: skip
        assert cache_seqlens.dtype == torch.int32 and num_heads_k == 1 and is_fp8_kvcache and topk
        return torch.zeros(1, 8, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)

    def flash_mla_with_kvcache(
        q: Tensor, k_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor, head_dim_v: int,
        tile_scheduler_metadata: Tensor, num_splits: Tensor, softmax_scale: float | None = None,
        causal: bool = False, is_fp8_kvcache: bool = False, indices: Tensor | None = None,
    ) -> Any:  # fmt: skip
        assert block_table.shape[0] == cache_seqlens.shape[0] == q.shape[0]
        assert k_cache.shape[1] == 64 and indices is not None and softmax_scale is not None
        return _paged(q, k_cache, indices, softmax_scale, dim_v=head_dim_v)

    return module(**{name: fn for name, fn in locals().items() if callable(fn)})


def flash_mla_2026(*, fork: bool) -> ModuleType:
    """Natural logarithms, sinks, and prefill's lengths; decoding rejects lengths on Hopper."""

    def sparse(
        q: Tensor, kv: Tensor, indices: Tensor, sm_scale: float, d_v: int = 512,
        attn_sink: Tensor | None = None, topk_length: Tensor | None = None,
    ) -> Any:  # fmt: skip
        return _sparse(
            q, kv, indices, sm_scale, dim_v=d_v, attn_sink=attn_sink, topk_length=topk_length
        )

    def decode(
        q: Tensor, k_cache: Tensor, block_table: None, cache_seqlens: None, head_dim_v: int,
        tile_scheduler_metadata: SimpleNamespace, num_splits: None = None,
        softmax_scale: float | None = None, causal: bool = False, is_fp8_kvcache: bool = False,
        indices: Tensor | None = None, attn_sink: Tensor | None = None,
        topk_length: Tensor | None = None,
    ) -> Any:  # fmt: skip
        shape = (*q.shape[:3], k_cache.shape[1])
        assert getattr(tile_scheduler_metadata, "shape", shape) == shape, "another call's plan"
        tile_scheduler_metadata.shape = shape
        assert topk_length is None and is_fp8_kvcache and indices is not None and softmax_scale
        return _paged(q, k_cache, indices, softmax_scale, dim_v=head_dim_v, attn_sink=attn_sink)

    def sparse_legacy(*args: Any, use_legacy: bool = False) -> Any:
        assert use_legacy
        return sparse(*args)

    def decode_legacy(*args: Any, use_legacy: bool = False, **more: Any) -> Any:
        assert use_legacy
        return decode(*args, **more)

    def get_mla_metadata(*_: Any) -> Any:
        return SimpleNamespace(), None

    return module(
        flash_mla_sparse_fwd=sparse_legacy if fork else sparse,
        flash_mla_with_kvcache=decode_legacy if fork else decode,
        get_mla_metadata=get_mla_metadata,
    )


# -- DeepGEMM -----------------------------------------------------------------------------------

Pair = tuple[Tensor, Tensor]


def _product(a: Pair, b: Pair) -> Tensor:
    assert all(t.is_contiguous() for t in (*a, *b))
    return fp8_gemm.reference(*a, *b)


def deep_gemm(*, year: int) -> ModuleType:
    """2025: one length per request in the paged scores. 2026: one per query."""

    def fp8_gemm_nt(a: Pair, b: Pair, d: Tensor) -> None:
        assert d.dtype == torch.bfloat16
        d.copy_(_product(a, b))

    def m_grouped_fp8_gemm_nt_contiguous(a: Pair, b: Pair, d: Tensor, layout: Tensor) -> None:
        assert layout.dtype == torch.int32 and layout.shape[0] == d.shape[0]
        d.fill_(torch.nan)
        for at in range(0, d.shape[0], 128):  # a tile belongs to the group of its first row
            rows, group = slice(at, at + 128), int(layout[at])
            own = layout[rows]
            assert bool(((own == group) | (own == -1)).all()), "groups start at multiples of 128"
            if group >= 0:
                some = (a[0][rows].contiguous(), a[1][rows].contiguous())
                d[rows] = _product(some, (b[0][group], b[1][group]))

    def m_grouped_fp8_gemm_nt_masked(
        a: Pair, b: Pair, d: Tensor, masked_m: Tensor, expected_m: int
    ) -> None:
        assert expected_m > 0 and d.shape[1] % 128 == 0, "tiles of 128 rows are written whole"
        d.fill_(torch.nan)
        for group, count in enumerate(masked_m.tolist()):
            rows = slice(0, -(-count // 128) * 128)
            some = (a[0][group, rows].contiguous(), a[1][group, rows].contiguous())
            d[group, rows] = _product(some, (b[0][group], b[1][group]))

    def fp8_mqa_logits(
        q: Tensor, kv: Pair, weights: Tensor, ks: Tensor, ke: Tensor, clean_logits: bool = True
    ) -> Tensor:
        tokens, context = q.shape[0], kv[0].shape[0]
        assert clean_logits and int(ks.min()) >= 0 and int(ke.max()) <= context
        assert all(t.is_contiguous() for t in (q, *kv, weights))
        out = torch.full((tokens, context + 256), torch.nan)[:, :context]
        return out.copy_(indexer_logits.reference(q, *kv, weights, ks, ke))

    def get_paged_mqa_logits_metadata(lengths: Tensor, block: int, num_sms: int) -> Tensor:
        assert lengths.dim() == (1 if year == 2025 else 2) and lengths.is_contiguous()
        assert block == 64
        return torch.zeros(num_sms + 1, 2, dtype=torch.int32)

    def paged(
        q: Tensor, kv_cache: Tensor, weights: Tensor, context_lens: Tensor, block_table: Tensor,
        schedule_meta: Tensor, max_context_len: int, clean_logits: bool = True,
    ) -> Tensor:  # fmt: skip
        batch, next_n = q.shape[:2]
        assert not clean_logits and kv_cache.shape[1:3] == (64, 1)
        assert schedule_meta.shape == (133, 2) and weights.is_contiguous()
        assert _dense_rows(block_table) and q.is_contiguous()
        if year == 2025:
            assert next_n == 1 and context_lens.shape == (batch,)
            context_lens = context_lens[:, None]
        out = indexer_logits_paged.reference(
            q, kv_cache[:, :, 0], weights, context_lens, block_table,
            layout=f"index_fp8/{q.shape[3]}", max_context_len=max_context_len,
        )  # fmt: skip
        return out.masked_fill(out == -torch.inf, torch.nan)

    def paged_2026(*args: Any, clean_logits: bool = False, indices: None = None) -> Tensor:
        return paged(*args, clean_logits=clean_logits)

    names: dict[str, Any] = {
        fn.__name__: fn
        for fn in (
            fp8_gemm_nt, m_grouped_fp8_gemm_nt_contiguous, m_grouped_fp8_gemm_nt_masked,
            fp8_mqa_logits, get_paged_mqa_logits_metadata,
        )
    }  # fmt: skip
    names["fp8_paged_mqa_logits"] = paged if year == 2025 else paged_2026
    return module(get_num_sms=lambda: 132, **names)


# -- AITER --------------------------------------------------------------------------------------


def aiter() -> dict[str, ModuleType]:
    """Modules of AITER by name, with the signatures of its commit e4048607a535."""

    def fp8_mqa_logits(
        Q: Tensor, KV: Tensor, kv_scales: Tensor, weights: Tensor, cu_starts: Tensor,
        cu_ends: Tensor, clean_logits: bool = True,
    ) -> Tensor:  # fmt: skip
        assert all(size & (size - 1) == 0 for size in Q.shape[1:]) and Q.shape[1] >= 16
        assert KV.shape[0] and kv_scales.is_contiguous() and cu_starts.dtype == torch.int32
        assert bool((cu_starts <= cu_ends).all()) and clean_logits
        tokens, context = Q.shape[0], KV.shape[0]
        out = torch.full((tokens, -(-context // 256) * 256), -torch.inf)[:, :context]
        return out.copy_(indexer_logits.reference(Q, KV, kv_scales, weights, cu_starts, cu_ends))

    def deepgemm_fp8_paged_mqa_logits(
        q_fp8: Tensor, kv_cache: Tensor, weights: Tensor, out_logits: Tensor, context_lens: Tensor,
        kv_indices: Tensor, max_model_len: int, Preshuffle: bool = False, KVBlockSize: int = 1,
        ChunkK: int = 256, TotalCuCount: int | None = None, WavePerEU: int = 2,
        VarCtxSchedule: Tensor | None = None,
    ) -> str:  # fmt: skip
        """One length per request; positions at and beyond it are not written. Every entry of the
        table may be loaded. The plain kernel takes each page as one token."""
        batch, next_n, heads, dim = q_fp8.shape
        blocks, size, one, record = kv_cache.shape
        assert size == KVBlockSize and one == 1 and heads >= 32
        assert ChunkK % KVBlockSize == 0 or KVBlockSize % ChunkK == 0
        assert KVBlockSize % 16 == 0 if Preshuffle else KVBlockSize == 1
        assert context_lens.shape == (batch,) and kv_indices.shape[0] == batch
        assert all(t.is_contiguous() for t in (q_fp8, kv_cache, weights, kv_indices, context_lens))
        assert out_logits.shape == (batch * next_n, max_model_len)
        assert int(kv_indices.min()) >= 0 and int(kv_indices.max()) < blocks
        pages = kv_cache.view(blocks, size * record).clone()
        if Preshuffle:  # the inverse of shuffle_weight, byte by byte
            for at in range(size * dim):
                token, element = divmod(at, dim)
                square = (token // 16) * 16 * dim + (element // 16) * 256
                source = square + (token % 16) * 16 + element % 16
                pages[:, at] = kv_cache.view(blocks, size * record)[:, source]
        limits = context_lens[:, None] - next_n + 1 + torch.arange(next_n)
        found = indexer_logits_paged.reference(
            q_fp8, pages.view(blocks, size, record), weights, limits.int(), kv_indices,
            layout=f"index_fp8/{dim}", max_context_len=max_model_len,
        )  # fmt: skip
        out_logits.copy_(torch.where(found > -torch.inf, found, out_logits))
        return "hash of the kernel"

    def top_k_per_row_prefill(
        logits: Tensor, rowStarts: Tensor, rowEnds: Tensor, indices: Tensor, values: Tensor | None,
        numRows: int, stride0: int, stride1: int, k: int = 2048, stable: bool = False,
    ) -> None:  # fmt: skip
        """Keys are the scores' bits, so that NaN is a number and -0.0 is below 0.0."""
        assert logits.dtype == torch.float32 and logits.is_contiguous() and stable
        assert (numRows, stride0, stride1) == (*logits.shape, 1) and values is None
        assert indices.dtype == torch.int32 and indices.is_contiguous()
        for row in range(numRows):
            start, end = int(rowStarts[row]), int(rowEnds[row])
            assert 0 <= start <= end <= stride0
            bits = logits[row, start:end].view(torch.int32).long()
            rank = torch.where(bits < 0, -(bits & 0x7FFFFFFF) - 1, bits)
            best = rank.sort(descending=True, stable=True).indices[:k].sort().values
            indices[row] = -1
            indices[row, : len(best)] = best + start

    def gemm_a8w8_blockscale(
        XQ: Tensor, WQ: Tensor, x_scale: Tensor, w_scale: Tensor,
        dtype: torch.dtype = torch.bfloat16, isBpreshuffled: bool = False,
    ) -> Tensor:  # fmt: skip
        assert dtype in (torch.bfloat16, torch.float16) and not isBpreshuffled
        assert XQ.shape[0] and all(t.is_contiguous() for t in (XQ, WQ, x_scale, w_scale))
        return fp8_gemm.reference(XQ, x_scale, WQ, w_scale, out_dtype=dtype)

    attention = "aiter.ops.triton.attention"
    return {
        f"{attention}.fp8_mqa_logits": module(fp8_mqa_logits=fp8_mqa_logits),
        f"{attention}.pa_mqa_logits": module(
            deepgemm_fp8_paged_mqa_logits=deepgemm_fp8_paged_mqa_logits
        ),
        "aiter.ops.topk": module(top_k_per_row_prefill=top_k_per_row_prefill),
        "aiter.ops.gemm_op_a8w8": module(gemm_a8w8_blockscale=gemm_a8w8_blockscale),
    }


# -- FlashInfer and cuBLAS ----------------------------------------------------------------------


def flashinfer() -> ModuleType:
    """NaN ranks above everything, -inf is selected where nothing better is, ties go to lower
    columns; rows with fewer than k entries are filled up with -1."""

    def top_k_ragged_transform(
        input: Tensor, offsets: Tensor, lengths: Tensor, k: int, deterministic: bool = False,
        tie_break: int = 0, dsa_graph_safe: bool = False, row_starts: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        assert input.is_contiguous() and tie_break == 1
        assert all(t.dtype == torch.int32 and int(t.min()) >= 0 for t in (offsets, lengths))
        out = torch.full((input.shape[0], k), -1, dtype=torch.int32)
        for row, (offset, length) in enumerate(
            zip(offsets.tolist(), lengths.tolist(), strict=True)
        ):
            start = 0 if row_starts is None else int(row_starts[row])
            assert start + length <= input.shape[1]
            own = input[row, start : start + length].float().nan_to_num(nan=torch.inf)
            best = own.sort(descending=True, stable=True).indices[:k]
            out[row, : len(best)] = best + offset
        return out

    return module(top_k_ragged_transform=top_k_ragged_transform)


def scaled_mm(
    a: Tensor, b: Tensor, a_scale: Tensor, kind_a: Any, b_scale: Tensor, kind_b: Any, *,
    output_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """torch's, with the strides that its cuBLAS path demands."""
    (m, k), n = a.shape, b.shape[1]
    blocks, padded = -(-k // 128), -(-k // 512) * 4
    assert a.is_contiguous() and b.t().is_contiguous() and n % 16 == 0 and m % 4 == 0
    assert a_scale.shape == (m, blocks) and _strides(a_scale, (1, m))
    assert b_scale.shape == (padded, -(-n // 128)) and _strides(b_scale, (1, padded))
    return fp8_gemm.reference(a, a_scale, b.t(), b_scale[:blocks].t(), out_dtype=output_dtype)


def _strides(tensor: Tensor, wanted: Sequence[int]) -> bool:
    return all(
        size == 1 or stride == want
        for size, stride, want in zip(tensor.shape, tensor.stride(), wanted, strict=True)
    )
