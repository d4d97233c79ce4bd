"""indexer_topk on NVIDIA GPUs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from dsa_hal.autotune.space import Space
from dsa_hal.backends.cuda import _nvrtc
from dsa_hal.backends.cuda.indexer_logits import scores_into
from dsa_hal.backends.cuda.topk import run
from dsa_hal.ops.index_select import indexer_topk, rows_within

WORKSPACE = 64
"""MiB of scores at a time: the selection finds most of them in the cache of 50 MB, and there are
few ends of kernels at which processors wait."""


@dataclass(frozen=True)
class Config:
    """How many workspaces share the budget. With two, a stream of its own selects from one while
    the other is filled: smaller chunks, but the ends of one kernel are filled by the other."""

    workspaces: int


def _legal(*, chunks: int) -> list[Config]:
    return [Config(1)] if chunks == 1 else [Config(1), Config(2)]


SPACE = Space("indexer_topk/cuda", Config, _legal)


@indexer_topk.impl("cuda", "cuda", contract=1, arch=("sm90",),
                   needs=(*_nvrtc.NEEDS, "triton>=3.6"), rank=1,
                   promises=("deterministic", "ties=lower"))  # fmt: skip
def select(
    q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, ks: Tensor, ke: Tensor, topk: int, *,
    ties: str = "any", logits_mb: int = 64,
) -> Tensor:  # fmt: skip
    """Rows in chunks: their scores go into a workspace, from which the best are selected before
    another chunk's overwrite them."""
    tokens, context = q.shape[0], k.shape[0]
    out = torch.empty(tokens, topk, dtype=torch.int32, device=q.device)
    width = -(-context // 4) * 4  # rows begin at multiples of 16 bytes
    whole = min(tokens, rows_within(min(logits_mb, WORKSPACE), width))
    count = SPACE.pick(chunks=-(-tokens // max(1, whole))).workspaces
    step = max(1, whole // count)
    workspaces = torch.empty(count, step, width, dtype=torch.float32, device=q.device)

    def score(rows: slice, workspace: Tensor) -> Tensor:
        scores = workspace[: rows.stop - rows.start, :context]
        scores_into(q[rows], k, k_scale, weights[rows], ks[rows], ke[rows], scores, clean=False)
        return scores

    def best(rows: slice, scores: Tensor) -> None:
        run(scores, topk, ks[rows], ke[rows], out[rows])

    chunks = [slice(at, min(at + step, tokens)) for at in range(0, tokens, step)]
    if count == 1:
        for rows in chunks:
            best(rows, score(rows, workspaces[0]))
    else:
        with torch.cuda.device(q.device):
            _in_turns(chunks, workspaces, score, best)
    return out


def _in_turns(
    chunks: Sequence[slice], workspaces: Tensor, score: Callable[[slice, Tensor], Tensor],
    best: Callable[[slice, Tensor], None],
) -> None:  # fmt: skip
    """Scores chunks on the current stream and selects from them on another, which the current one
    waits for in the end: the workspaces are its own again, and a captured graph is whole."""
    here, side = torch.cuda.current_stream(), _side(workspaces.device.index)
    taken: list[torch.cuda.Event | None] = [None] * workspaces.shape[0]
    for turn, rows in enumerate(chunks):
        own = turn % len(taken)
        if (event := taken[own]) is not None:
            here.wait_event(event)
        scores = score(rows, workspaces[own])
        side.wait_stream(here)
        with torch.cuda.stream(side):
            best(rows, scores)
        taken[own] = side.record_event()
    here.wait_stream(side)


@cache
def _side(device: int) -> torch.cuda.Stream:
    """The stream that selects beside the current one."""
    return torch.cuda.Stream(device)
