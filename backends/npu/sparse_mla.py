"""sparse_mla on Ascend."""

import torch
from torch import Tensor

from dsa_hal.backends.npu._attention import compacted, keyed, meta, rows_call
from dsa_hal.backends.npu._library import call, refusal
from dsa_hal.backends.npu._rows import by_chunks
from dsa_hal.ops.attention import sparse_mla


def _why_not(
    q: Tensor, kv: Tensor, indices: Tensor, *, softmax_scale: float, dim_v: int = 512,
    attn_sink: Tensor | None = None, topk_length: Tensor | None = None,
) -> str | None:  # fmt: skip
    return refused(q, kv.shape[0], kv.dtype, indices, softmax_scale, dim_v, attn_sink)


def refused(
    q: Tensor, keys: int, dtype: torch.dtype, indices: Tensor, softmax_scale: float, dim_v: int,
    attn_sink: Tensor | None,
) -> str | None:  # fmt: skip
    """Why the device's attention does not take queries [..., heads, dim] and `keys` rows."""
    if attn_sink is not None:
        return "has no sinks"
    heads, dim = q.shape[-2:]
    tokens = q.shape[:-2].numel()
    name, arguments = rows_call(
        meta(tokens, heads, dim_v, dtype=q.dtype), meta(tokens, heads, dim - dim_v, dtype=q.dtype),
        meta(keys, dim_v, dtype=dtype), meta(keys, dim - dim_v, dtype=dtype),
        meta(tokens, indices.shape[-1]), ends=meta(1), lengths=meta(1),
        softmax_scale=softmax_scale,
    )  # fmt: skip
    return refusal(name, **arguments)


@sparse_mla.impl(
    "npu", "sparse_flash_attention", contract=1, why_not=_why_not, promises=("lse=natural",)
)
def sparse(
    q: Tensor, kv: Tensor, indices: Tensor, *, softmax_scale: float, dim_v: int = 512,
    attn_sink: Tensor | None = None, topk_length: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """All rows are one request. Keys are copied, as both parts must lie without gaps."""
    listed = compacted(indices, topk_length)
    return attend(q, kv[:, :dim_v].contiguous(), kv[:, dim_v:].contiguous(), listed, softmax_scale)


def attend(
    q: Tensor, latent: Tensor, rope: Tensor, indices: Tensor, softmax_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """out, max_logits and lse, as `sparse_mla` has them, of rows latent [rows, lora] and rope
    [rows, rope_dim]; `indices` [tokens, k] have keys first."""
    (tokens, heads, _), (keys, lora) = q.shape, latent.shape
    if not tokens or not keys:
        top = torch.full((tokens, heads), -torch.inf, device=q.device)
        return q.new_zeros(tokens, heads, lora), top, -top
    listed, nobody = keyed(indices)
    one = torch.ones(1, dtype=torch.int32, device=q.device)
    name, arguments = rows_call(
        q[..., :lora].contiguous(), q[..., lora:].contiguous(), latent, rope, listed,
        ends=one * tokens, lengths=one * keys, softmax_scale=softmax_scale,
    )  # fmt: skip
    out, top, total = call(name, **arguments)
    lse = top[0] + total[0].log()
    return (
        torch.where(nobody[..., None], 0, out),
        torch.where(nobody, -torch.inf, top[0]),
        torch.where(nobody, torch.inf, lse),
    )


@sparse_mla.impl("npu", "torch", contract=1, rank=-1, promises=("deterministic", "lse=natural"))
def gathered(
    q: Tensor, kv: Tensor, indices: Tensor, *, softmax_scale: float, dim_v: int = 512,
    attn_sink: Tensor | None = None, topk_length: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Some queries at a time, whose keys are gathered."""

    def some(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        return sparse_mla.reference(
            q[rows], kv, indices[rows], softmax_scale=softmax_scale, dim_v=dim_v,
            attn_sink=attn_sink, topk_length=None if topk_length is None else topk_length[rows],
        )  # fmt: skip

    tokens, heads, dim = q.shape
    out, top, lse = by_chunks(tokens, 4 * indices.shape[1] * (dim + heads), some)
    return out, top, lse
