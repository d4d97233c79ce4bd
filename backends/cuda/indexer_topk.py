"""indexer_topk on NVIDIA GPUs."""

import torch
from torch import Tensor

from dsa_hal.backends.cuda import _nvrtc
from dsa_hal.backends.cuda.indexer_logits import scores_into
from dsa_hal.backends.cuda.topk import run
from dsa_hal.ops.index_select import indexer_topk, rows_within

WORKSPACE = 64
"""MiB of scores at a time: the selection finds most of them in the cache of 50 MB, and there are
few ends of kernels at which processors wait."""


@indexer_topk.impl("cuda", "cuda", contract=1, arch=("sm90",),
                   needs=(*_nvrtc.NEEDS, "triton>=3.6"), rank=1,
                   promises=("deterministic", "ties=lower"))  # fmt: skip
def select(
    q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, ks: Tensor, ke: Tensor, topk: int, *,
    ties: str = "any", logits_mb: int = 64,
) -> Tensor:  # fmt: skip
    """Rows in chunks: their scores go into one workspace, from which the best are selected before
    the next chunk's overwrite them."""
    tokens, context = q.shape[0], k.shape[0]
    out = torch.empty(tokens, topk, dtype=torch.int32, device=q.device)
    width = -(-context // 4) * 4  # rows begin at multiples of 16 bytes
    step = min(tokens, rows_within(min(logits_mb, WORKSPACE), width))
    workspace = torch.empty(step, width, dtype=torch.float32, device=q.device)
    for at in range(0, tokens, max(1, step)):
        some = slice(at, min(at + step, tokens))
        scores = workspace[: some.stop - at, :context]
        scores_into(q[some], k, k_scale, weights[some], ks[some], ke[some], scores, clean=False)
        run(scores, topk, ks[some], ke[some], out[some])
    return out
