"""indexer_topk_paged on NVIDIA GPUs."""

import torch
from torch import Tensor

from dsa_hal.backends.cuda import _nvrtc
from dsa_hal.backends.cuda.indexer_logits_paged import scores_into
from dsa_hal.backends.cuda.indexer_topk import WORKSPACE
from dsa_hal.backends.cuda.topk import run
from dsa_hal.backends.portable import layouts
from dsa_hal.backends.portable.index_select import paged
from dsa_hal.backends.portable.indexer_logits import paged_into
from dsa_hal.backends.portable.select import largest_into
from dsa_hal.ops.index_select import indexer_topk_paged, rows_within


def _why_not(
    q: Tensor, pages: Tensor, weights: Tensor, context_lens: Tensor, block_table: Tensor,
    topk: int, *, layout: str, max_context_len: int, ties: str = "any", logits_mb: int = 64,
) -> str | None:  # fmt: skip
    return layouts.unknown(layout)


@indexer_topk_paged.impl("cuda", "cuda", contract=1, arch=("sm90",),
                         needs=(*_nvrtc.NEEDS, "triton>=3.6"), rank=1,
                         promises=("deterministic", "ties=lower"), why_not=_why_not)  # fmt: skip
def select(
    q: Tensor, pages: Tensor, weights: Tensor, context_lens: Tensor, block_table: Tensor,
    topk: int, *, layout: str, max_context_len: int, ties: str = "any", logits_mb: int = 64,
) -> Tensor:  # fmt: skip
    """Requests in chunks, as in `indexer_topk`."""
    batch, next_n = q.shape[:2]
    out = torch.empty(batch * next_n, topk, dtype=torch.int32, device=q.device)
    width = -(-max_context_len // 4) * 4
    step = min(batch, rows_within(min(logits_mb, WORKSPACE), next_n * width))
    workspace = torch.empty(step * next_n, width, dtype=torch.float32, device=q.device)
    for at in range(0, batch, max(1, step)):
        some = slice(at, min(at + step, batch))
        rows = slice(at * next_n, some.stop * next_n)
        scores = workspace[: rows.stop - rows.start, :max_context_len]
        lens = context_lens[some]
        scores_into(
            q[some],
            pages,
            weights[rows],
            lens,
            block_table[some],
            scores,
            layout=layout,
            clean=False,
            overlap=at > 0,
        )
        run(scores, topk, None, lens.reshape(-1), out[rows], overlap=True)
    return out


@indexer_topk_paged.impl("cuda", "triton", contract=1, needs=("triton>=3.6",),
                         promises=("deterministic", "ties=lower"), why_not=_why_not)  # fmt: skip
def portable(
    q: Tensor, pages: Tensor, weights: Tensor, context_lens: Tensor, block_table: Tensor,
    topk: int, *, layout: str, max_context_len: int, ties: str = "any", logits_mb: int = 64,
) -> Tensor:  # fmt: skip
    """Requests in chunks, whose scores share a workspace; Triton alone."""
    return paged(
        q, pages, weights, context_lens, block_table, topk, layout=layout,
        max_context_len=max_context_len, logits_mb=logits_mb, scores=paged_into,
        select=largest_into,
    )  # fmt: skip
