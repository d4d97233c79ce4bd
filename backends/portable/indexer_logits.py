"""The indexer's scores in Triton: which tiles, and the launches into a given buffer."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsa_hal.autotune.space import Launched, Space
from dsa_hal.backends.portable.dialect import is_fnuz
from dsa_hal.ops.layout import SCALE, KVLayout


@dataclass(frozen=True)
class Config(Launched):
    """Keys of a tile, rows that it meets one after another (1 for paged keys), warps, stages."""

    keys: int
    rows: int
    warps: int
    stages: int


def legal(*, tokens: int, heads: int, dim: int, bytes: int) -> Sequence[Config]:
    """Tiles whose keys and products stay in registers and shared memory."""
    if bytes == 4:  # products on the processor's own arithmetic
        return [Config(32, 4 if tokens > 4 else 1, 4, 1)]
    rows = (1,) if tokens <= 4 else (16,) if tokens < 1024 else (64, 16)
    keys, stages = (128, 3) if bytes == 1 or dim <= 128 else (64, 2)
    return [*(Config(keys, r, 4, stages) for r in rows), Config(64, rows[-1], 4, 4)]


RAGGED = Space(name="indexer_logits/triton", kind=Config, legal=legal)
PAGED = Space(name="indexer_logits_paged/triton", kind=Config, legal=legal)


def blocks(heads: int, dim: int) -> dict[str, int]:
    """Sizes of tiles that the products of tiles demand: powers of two, 16 at least."""
    block = max(16, min(64, 1 << (heads - 1).bit_length()))
    width = max(32, 1 << (dim - 1).bit_length())
    return {"DIM": dim, "BD": width, "BH": block, "HEAD_BLOCKS": -(-heads // block)}


def _dense(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def ragged_into(
    out: Tensor, q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, ks: Tensor, ke: Tensor
) -> None:
    """`indexer_logits` into `out` [tokens, context] fp32, whose rows may lie apart."""
    from dsa_hal.backends.portable._kernels.indexer_logits import ragged

    (tokens, heads, dim), context = q.shape, k.shape[0]
    if not tokens or not context:
        return
    bucket = 1 << (tokens - 1).bit_length()
    config = RAGGED.pick(tokens=bucket, heads=heads, dim=dim, bytes=q.element_size())
    q, k, weights = _dense(q), _dense(k), _dense(weights)
    ragged[-(-tokens // config.rows), -(-context // config.keys)](
        q, k, _dense(k_scale), weights, _dense(ks), _dense(ke), out,
        q.stride(0), q.stride(1), k.stride(0), weights.stride(0), out.stride(0),
        tokens, context, heads, **blocks(heads, dim), BN=config.keys, BM=config.rows,
        FNUZ=is_fnuz(), **config.options,
    )  # fmt: skip


def paged_into(
    out: Tensor, q: Tensor, pages: Tensor, weights: Tensor, context_lens: Tensor,
    block_table: Tensor, layout: str,
) -> None:  # fmt: skip
    """`indexer_logits_paged` into `out` [batch * next_n, max_context_len] fp32, whose rows may lie
    apart."""
    from dsa_hal.backends.portable._kernels.indexer_logits import paged

    (batch, next_n, heads, dim), context = q.shape, out.shape[1]
    if not out.numel():
        return
    form = KVLayout.parse(layout)
    views = form.views(pages)
    keys = views[form.data[0].name]
    scale = views.get(SCALE, keys)
    config = PAGED.pick(tokens=1, heads=heads, dim=dim, bytes=q.element_size())
    q, weights, block_table = _dense(q), _dense(weights), _dense(block_table)
    context_lens = _dense(context_lens)
    paged[batch, -(-context // config.keys)](
        q, keys, scale, weights, context_lens, block_table, out, *q.stride()[:3],
        *keys.stride()[:2], *scale.stride()[:2], weights.stride(0), context_lens.stride(0),
        block_table.stride(0), out.stride(0), next_n, context, heads, pages.shape[1],
        pages.shape[0], **blocks(heads, dim), BN=config.keys,
        BQ=1 << (next_n - 1).bit_length(), SCALED=form.group > 0,
        FNUZ=is_fnuz(), **config.options,
    )  # fmt: skip


def ragged(
    q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, ks: Tensor, ke: Tensor
) -> Tensor:
    """`indexer_logits`."""
    out = torch.empty(q.shape[0], k.shape[0], device=q.device)
    ragged_into(out, q, k, k_scale, weights, ks, ke)
    return out


def paged(
    q: Tensor, pages: Tensor, weights: Tensor, context_lens: Tensor, block_table: Tensor,
    layout: str, max_context_len: int,
) -> Tensor:  # fmt: skip
    """`indexer_logits_paged`."""
    out = torch.empty(q.shape[0] * q.shape[1], max_context_len, device=q.device)
    paged_into(out, q, pages, weights, context_lens, block_table, layout)
    return out
