"""Calls of the device's sparse attention and indexer, and what stands around them.

Each `*_call` gives the name and the keywords of one call. A predicate builds it of meta tensors and
asks `refusal`; the implementation builds it of real ones and runs it: what was judged is what runs.
"""

from typing import Any

import torch
from torch import Tensor

from dsa_hal.ops.layout import SCALE, KVLayout
from dsa_hal.selection import current

Call = tuple[str, dict[str, Any]]

NARROW_WEIGHTS = ("950",)
"""Architectures whose indexer takes its weights in the query's dtype alone; others take fp32. With
bf16 keys a row in some hundreds then selects a score that lies further below the k-th than the op's
check grants (1.3e-3 of the largest one, where 1e-3 are granted); int8 keys, whose weights are fp16,
stay within it."""

TOP_WEIGHT = 2.0**-4
"""What the largest head weight of a token becomes before it is rounded to fp16 for int8 keys. The
manual wants weight times query scale in fp16's range and works its example with values around this
one; from here fp16 keeps ten octaves of weights in full precision."""


def meta(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """A tensor without data, to ask about. An axis of size 0 becomes 1: empty calls run nothing, so
    the kernels' dislike of them is no reason against an implementation."""
    return torch.empty([max(1, size) for size in shape], dtype=dtype, device="meta")


def meta_pool(pages: Tensor) -> Tensor:
    """The pool `pages` without data."""
    return meta(*pages.shape, dtype=pages.dtype)


def held(cu_seqlens_q: Tensor, context_lens: Tensor) -> Tensor:
    """Keys of each request, none of one without new tokens: the contract lets its row of the block
    table be anything, and the kernels' documentation does not say that they leave it alone."""
    return context_lens * (cu_seqlens_q.diff() > 0)


# -- the indexer --------------------------------------------------------------------------------


def index_call(
    q: Tensor, pages: Tensor, weights: Tensor, ends: Tensor, lengths: Tensor, block_table: Tensor,
    topk: int, layout: str,
) -> Call:  # fmt: skip
    """The best positions of every query token among the keys of its own request.

    q            [tokens, heads, dim] without gaps
    pages        a pool in `layout`
    weights      [tokens, heads] fp32
    ends         [requests] int32: the token after each request's last one
    lengths      [requests] int32: keys of each request. The tokens of a request are its last ones
                 and see what stands before them (sparse_mode 3).
    block_table  [requests, max_pages] int32
    """
    parts = KVLayout.parse(layout).views(pages)
    arguments = dict(
        query=q,
        key=parts["key"][:, :, None],
        actual_seq_lengths_query=ends,
        actual_seq_lengths_key=lengths,
        block_table=block_table,
        layout_query="TND",
        layout_key="PA_BSND",
        sparse_count=topk,
        sparse_mode=3,
    )
    if SCALE not in parts:
        narrow = current().arch in NARROW_WEIGHTS
        return "npu_lightning_indexer", arguments | dict(
            weights=weights.to(q.dtype) if narrow else weights.contiguous()
        )
    return "npu_quant_lightning_indexer", arguments | dict(
        weights=shrunk(weights),
        query_dequant_scale=torch.ones_like(weights, dtype=torch.float16),
        key_dequant_scale=parts[SCALE],
        query_quant_mode=0,
        key_quant_mode=0,
    )


def shrunk(weights: Tensor) -> Tensor:
    """Head weights [tokens, heads] fp32 as fp16: each token's own multiple of them, the largest of
    which is TOP_WEIGHT. A common positive factor leaves the order of a token's keys as it is, while
    the weights themselves, which have the queries' scales in them, may be too small for fp16."""
    largest = weights.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return (weights * (TOP_WEIGHT / largest)).to(torch.float16)


def unfit_keys(layout: str) -> str | None:
    """Why the indexer's kernels cannot read index keys in `layout`, or None."""
    form = KVLayout.parse(layout)
    if form.order == "split" or (form.order == "token" and len(form.parts) == 1):
        return None
    return (
        f"layout {layout} keeps keys and scales in {form.order} order; the indexer takes keys in"
        " one piece and scales in another (index_bf16, index_int8_split)"
    )


# -- attention ----------------------------------------------------------------------------------


def attention_call(
    query: Tensor, rope: Tensor, pages: Tensor, layout: str, indices: Tensor, *, ends: Tensor,
    lengths: Tensor, block_table: Tensor, softmax_scale: float, causal: bool,
) -> Call:  # fmt: skip
    """Attention over pages, of absorbed queries [tokens, heads, lora] and rotated parts [tokens,
    heads, rope_dim]; `indices` [tokens, k] are positions in the request, those of keys first.
    Lengths as in `index_call`; causal: a token does not see what stands behind it."""
    form = KVLayout.parse(layout)
    arguments = dict(
        sparse_indices=indices[:, None],
        scale_value=softmax_scale,
        block_table=block_table,
        actual_seq_lengths_query=ends,
        actual_seq_lengths_kv=lengths,
        sparse_block_size=1,
        layout_query="TND",
        layout_kv="PA_BSND",
        sparse_mode=3 if causal else 0,
        attention_mode=2,
    )
    if form.group:
        key = pages.view(torch.int8)[:, :, None]
        return "npu_kv_quant_sparse_flash_attention", arguments | dict(
            query=torch.cat([query, rope], -1),
            key=key,
            value=key,
            key_quant_mode=2,
            value_quant_mode=2,
            quant_scale_repo_mode=1,
            tile_size=form.group,
            rope_head_dim=rope.shape[-1],
        )
    parts = form.views(pages)
    key = parts["latent"][:, :, None]
    return "npu_sparse_flash_attention", arguments | dict(
        query=query, query_rope=rope, key=key, value=key, key_rope=parts["rope"][:, :, None]
    )


def rows_call(
    query: Tensor, rope: Tensor, latent: Tensor, key_rope: Tensor, indices: Tensor, *,
    ends: Tensor, lengths: Tensor, softmax_scale: float,
) -> Call:  # fmt: skip
    """Attention over keys that lie row by row, latent [rows, lora] and key_rope [rows, rope_dim]:
    one request, whose rows `indices` name. Of this form alone the kernel gives the softmax's
    maximum and sum."""
    key = latent[:, None]
    return "npu_sparse_flash_attention", dict(
        query=query,
        query_rope=rope,
        key=key,
        value=key,
        key_rope=key_rope[:, None],
        sparse_indices=indices[:, None],
        scale_value=softmax_scale,
        actual_seq_lengths_query=ends,
        actual_seq_lengths_kv=lengths,
        sparse_block_size=1,
        layout_query="TND",
        layout_kv="TND",
        sparse_mode=0,
        attention_mode=2,
        return_softmax_lse=True,
    )


def unfit_latents(layout: str) -> str | None:
    """Why attention's kernels cannot read latents in `layout`, or None."""
    form = KVLayout.parse(layout)
    if form.order == "split" or form.parts[0].dtype == torch.int8:
        return None
    return (
        f"layout {layout} is not one that the attention reads: latents and rotated parts in a piece"
        " each (latent_bf16_split), or records of int8 (latent_int8)"
    )


def keyed(indices: Tensor) -> tuple[Tensor, Tensor]:
    """`indices` [tokens, k] in which a row without any key names key 0, and which rows these are
    [tokens, 1]. What the kernels do with such a row is not documented: they never see one, and its
    result is written by `where`."""
    nobody = (indices < 0).all(-1, keepdim=True)
    return torch.where(nobody & (_columns(indices) == 0), 0, indices), nobody


def compacted(indices: Tensor, topk_length: Tensor | None) -> Tensor:
    """`indices` [rows, k] with the keys of each row moved to its front, in their order, then -1:
    entries that are -1, or behind the row's length, may stand anywhere before."""
    hole = indices < 0
    if topk_length is not None:
        hole |= _columns(indices) >= topk_length[:, None]
    hole, order = hole.to(torch.int8).sort(dim=-1, stable=True)
    return torch.where(hole > 0, -1, indices.gather(1, order))


def _columns(indices: Tensor) -> Tensor:
    return torch.arange(indices.shape[1], device=indices.device, dtype=torch.int32)


# -- the products on either side ----------------------------------------------------------------


def absorbed(q: Tensor, kv_b: Tensor, nope: int) -> tuple[Tensor, Tensor]:
    """Queries [tokens, heads, nope + rope] as what attention takes: multiplied into the latent
    space [tokens, heads, lora], and the rotated part; both without gaps."""
    into = torch.bmm(q[..., :nope].to(kv_b.dtype).transpose(0, 1), kv_b[:, :nope])
    return into.transpose(0, 1).to(q.dtype).contiguous(), q[..., nope:].contiguous()


def projected(latent: Tensor, kv_b: Tensor, nope: int) -> Tensor:
    """What attention gave [tokens, heads, lora], as the values of the heads [tokens, heads, v]."""
    heads = torch.bmm(latent.transpose(0, 1).to(kv_b.dtype), kv_b[:, nope:].transpose(1, 2))
    return heads.transpose(0, 1).to(latent.dtype)
