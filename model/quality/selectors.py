"""Other ways to choose keys than the model's own indexer, put in its place to measure it by."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from dsa_hal.errors import BadInput
from dsa_hal.model.transformer import Transformer
from dsa_hal.ops.varlen import limits_of, requests_of

SELECTORS = ("dsa", "dense", "recent", "random")


def label(selector: str, topk: int) -> str:
    """A selector's name for people."""
    named = {"dsa": "DSA", "recent": f"latest {topk}", "random": f"random {topk}"}
    return named.get(selector, selector)


Choose = Callable[[Tensor, Tensor, int], Tensor]
"""(ks, ke, topk) -> int32 [tokens, topk]: of the keys ks <= i < ke of each token, at most topk;
then -1."""


@contextmanager
def selecting(model: Transformer, selector: str, seed: int = 0) -> Iterator[None]:
    """Within the block every layer of `model` chooses its keys by `selector`.

    "dsa"     the model's own indexer
    "dense"   every earlier key
    "recent"  the latest index_topk
    "random"  index_topk of the earlier ones, drawn anew for each layer and token from `seed`

    The model must serve nobody else meanwhile.
    """
    ops, config = model.attention_ops, model.config
    own, record = dict(vars(ops)), model.record
    if selector not in SELECTORS:
        raise BadInput(f"unknown selector {selector!r}; known are {', '.join(SELECTORS)}")
    try:
        model.record = record and selector == "dsa"  # drawing keys waits for the host
        if selector == "dense":  # a step of no more keys than index_topk asks no indexer
            model.config = replace(config, index_topk=model.max_context)
        elif selector != "dsa":
            choose = recent if selector == "recent" else drawn(seed, model.device)
            ops.indexer_topk, ops.indexer_topk_paged = _ragged(choose), _paged(choose)
            ops.indexer_topk_varlen = _varlen(choose)
        yield
    finally:
        model.config, model.record = config, record
        vars(ops).clear()
        vars(ops).update(own)


def recent(ks: Tensor, ke: Tensor, topk: int) -> Tensor:
    at = ke[:, None] - 1 - torch.arange(topk, dtype=torch.int32, device=ke.device)
    return at.masked_fill(at < ks[:, None], -1)


def drawn(seed: int, device: torch.device) -> Choose:
    """Random keys, each of a token's keys as likely as the other."""
    generator = torch.Generator(device).manual_seed(seed)

    def choose(ks: Tensor, ke: Tensor, topk: int) -> Tensor:
        count = (ke - ks)[:, None]
        width = int(count.max())
        lots = torch.rand(len(ks), width, generator=generator, device=ks.device)
        lots.masked_fill_(torch.arange(width, device=ks.device) >= count, -1)
        best, at = lots.topk(min(topk, width))
        rows = (at.int() + ks[:, None]).masked_fill(best < 0, -1)
        return torch.nn.functional.pad(rows, (0, topk - rows.shape[1]), value=-1)

    return choose


def _ragged(choose: Choose) -> Callable[..., Tensor]:
    """`choose` with the signature of `indexer_topk`."""

    def indexer_topk(
        q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, ks: Tensor, ke: Tensor, topk: int
    ) -> Tensor:
        return choose(ks, ke, topk)

    return indexer_topk


def _paged(choose: Choose) -> Callable[..., Tensor]:
    """`choose` with the signature of `indexer_topk_paged`."""

    def indexer_topk_paged(
        q: Tensor, pages: Tensor, weights: Tensor, context_lens: Tensor, block_table: Tensor,
        topk: int, *, layout: str, max_context_len: int,
    ) -> Tensor:  # fmt: skip
        limits = context_lens.flatten()
        return choose(torch.zeros_like(limits), limits, topk)

    return indexer_topk_paged


def _varlen(choose: Choose) -> Callable[..., Tensor]:
    """`choose` with the signature of `indexer_topk_varlen`."""

    def indexer_topk_varlen(
        q: Tensor, pages: Tensor, weights: Tensor, cu_seqlens_q: Tensor, context_lens: Tensor,
        block_table: Tensor, topk: int, *, layout: str, max_context_len: int,
    ) -> Tensor:  # fmt: skip
        limits = limits_of(cu_seqlens_q, context_lens, requests_of(cu_seqlens_q, q.shape[0]))
        return choose(torch.zeros_like(limits), limits, topk)

    return indexer_topk_varlen
