"""How well a model predicts text: the mean negative log-likelihood of each next token."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsa_hal.model.quality.selectors import selecting
from dsa_hal.model.transformer import PREFILL_CHUNK, Transformer

Advance = Callable[[int], None]
"""Called with the number of tokens that a model has read since the last call."""

LOGITS = 256 << 20
"""Bytes of fp32 logits that may exist at a time."""

BUCKETS = 8


@dataclass(frozen=True)
class Perplexity:
    """exp(mean negative log-likelihood per token) of one model under one selector.

    weights    "unquantised" or "fp8"
    selector   as in `selecting`
    tokens     how many were predicted
    whole      of all of them
    late       of those in the last quarter of the windows, where most keys are left out
    positions  of those in each eighth of the windows
    """

    weights: str
    selector: str
    tokens: int
    whole: float
    late: float
    positions: tuple[float, ...]

    def __truediv__(self, other: Perplexity) -> tuple[float, float]:
        """How many times the other's: of the whole, and of the last quarter."""
        return self.whole / other.whole, self.late / other.late


def perplexity(
    model: Transformer,
    windows: Sequence[Tensor],
    *,
    weights: str,
    selector: str,
    seed: int = 0,
    advance: Advance | None = None,
) -> Perplexity:
    """Of `windows`, int64 [tokens] each and all of one length. What a token is predicted from is
    its own window alone."""
    rows = []
    with selecting(model, selector, seed):
        for window in windows:
            rows.append(losses(model, window))
            if advance is not None:
                advance(len(window))
    lost = torch.stack(rows)
    return Perplexity(
        weights=weights,
        selector=selector,
        tokens=lost.numel(),
        whole=_exp(lost),
        late=_exp(lost[:, lost.shape[1] * 3 // 4 :]),
        positions=tuple(_exp(part) for part in lost.tensor_split(BUCKETS, 1)),
    )


def losses(model: Transformer, window: Tensor) -> Tensor:
    """-log p(token | those before it), fp32 [tokens - 1] on the CPU, for a window int64
    [tokens]. Logits exist for a step of the prefill only."""
    window = model.checked(window)
    chunk = max(1, min(PREFILL_CHUNK, LOGITS // (4 * model.config.vocab_size)))
    cache, contexts = model.new_cache([len(window)])
    parts = []
    for (piece,), logits in model.prefill(cache, contexts, [window], chunk=chunk, every=True):
        following = window[piece.start + 1 : piece.stop + 1].to(logits.device)
        predicted = logits[: len(following)]
        lost = torch.nn.functional.cross_entropy(predicted, following, reduction="none")
        parts.append(lost.cpu())
    return torch.cat(parts)


def _exp(lost: Tensor) -> float:
    return math.exp(lost.double().mean())
