"""indexer_topk on NVIDIA GPUs."""

import torch
from torch import Tensor

from dsa_hal.backends.cuda import _nvrtc, _sift
from dsa_hal.backends.cuda.indexer_logits import scores_into, scores_why_not
from dsa_hal.backends.cuda.topk import run
from dsa_hal.backends.portable import layouts
from dsa_hal.backends.portable.index_select import ragged
from dsa_hal.backends.portable.indexer_logits import ragged_into
from dsa_hal.backends.portable.select import largest_into
from dsa_hal.ops.index_select import indexer_topk, rows_within

WORKSPACE = 64
"""MiB of scores at a time: the selection finds most of them in the cache of 50 MB, and there are
few ends of kernels at which processors wait."""


def _why_not(
    q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, ks: Tensor, ke: Tensor, topk: int, *,
    ties: str = "any", logits_mb: int = 64,
) -> str | None:  # fmt: skip
    return layouts.coded(q)


@indexer_topk.impl("cuda", "cuda", contract=1, arch=("sm90",),
                   needs=(*_nvrtc.NEEDS, "triton>=3.6"), rank=1,
                   promises=("deterministic", "ties=lower"), why_not=_why_not)  # fmt: skip
def select(
    q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, ks: Tensor, ke: Tensor, topk: int, *,
    ties: str = "any", logits_mb: int = 64,
) -> Tensor:  # fmt: skip
    """Many rows of long contexts keep few of their scores (`_sift`). Others go in chunks: scores
    into one workspace, from which the best are selected before the next chunk's overwrite them."""
    tokens, context = q.shape[0], k.shape[0]
    out = torch.empty(tokens, topk, dtype=torch.int32, device=q.device)
    budget = min(logits_mb, WORKSPACE)
    if scores_why_not(q, k, k_scale, weights, ks, ke) is None:
        plan = _sift.plan(tokens, context, q.shape[1], topk, budget)
        if plan is not None:
            _sift.select(q, k, k_scale, weights, ks, ke, out, plan, budget)
            return out
    width = -(-context // 4) * 4  # rows begin at multiples of 16 bytes
    step = min(tokens, rows_within(budget, width))
    workspace = torch.empty(step, width, dtype=torch.float32, device=q.device)
    for at in range(0, tokens, max(1, step)):
        some = slice(at, min(at + step, tokens))
        scores = workspace[: some.stop - at, :context]
        part = (q[some], k, k_scale, weights[some], ks[some], ke[some])
        scores_into(*part, scores, clean=False, overlap=at > 0)
        run(scores, topk, ks[some], ke[some], out[some], overlap=True)
    return out


@indexer_topk.impl("cuda", "triton", contract=1, needs=("triton>=3.6",),
                   promises=("deterministic", "ties=lower"), why_not=_why_not)  # fmt: skip
def portable(
    q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, ks: Tensor, ke: Tensor, topk: int, *,
    ties: str = "any", logits_mb: int = 64,
) -> Tensor:  # fmt: skip
    """Rows in chunks, whose scores share a workspace; Triton alone."""
    return ragged(
        q, k, k_scale, weights, ks, ke, topk, logits_mb=logits_mb, scores=ragged_into,
        select=largest_into,
    )  # fmt: skip
