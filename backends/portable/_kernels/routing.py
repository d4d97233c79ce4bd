"""The gate of a mixture of experts as one Triton kernel: a program per token."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from dsa_hal.backends.portable._kernels.moe import dense

# The fast exponential would round scores otherwise than torch does, and equal sums of scores, which
# go to the lower number, would no longer be equal. The interpreter knows no libdevice.
_EXACT = tl.constexpr(not triton.knobs.runtime.interpret)

_NOTHING = tl.constexpr(-(2**63))
"""Below every key of a score."""


def routed(
    logits: Tensor, bias: Tensor | None, *, topk: int, groups: int, topk_groups: int, scale: float,
    score: str, normalize: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`route`."""
    tokens, experts = logits.shape
    logits = dense(logits)
    bias = None if bias is None else dense(bias)
    ids = torch.empty(tokens, topk, dtype=torch.int32, device=logits.device)
    weights = torch.empty(tokens, topk, device=logits.device)
    size = experts // groups
    if tokens:
        wide, deep = triton.next_power_of_2(groups), triton.next_power_of_2(size)
        _route[(tokens,)](
            logits, bias, ids, weights, logits.stride(0), scale, size, groups,
            GROUPS=wide, SIZE=deep, TOPK=topk, SLOTS=triton.next_power_of_2(topk),
            KEPT=topk_groups if topk_groups < groups else 0, SIGMOID=score == "sigmoid",
            NORMALIZE=normalize and score == "sigmoid", BIASED=bias is not None, EXACT=_EXACT,
            num_warps=1 if wide * deep <= 512 else 4,
        )  # fmt: skip
    return ids, weights


@triton.jit
def _keys(values, numbers):
    """Whole numbers in the order of fp32 `values`, of equal ones the lower number first."""
    bits = (values + 0.0).to(tl.int32, bitcast=True)  # -0.0 equals 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) + (0x7FFFFFFF - numbers)


@triton.jit
def _number(key):
    return 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def _sigmoid(x, EXACT: tl.constexpr):
    return tl.div_rn(1.0, 1.0 + libdevice.exp(-x)) if EXACT else 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _route(
    logits, bias, ids, weights, row_stride, scale, size, groups,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, TOPK: tl.constexpr, SLOTS: tl.constexpr,
    KEPT: tl.constexpr, SIGMOID: tl.constexpr, NORMALIZE: tl.constexpr, BIASED: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Experts lie as [GROUPS, SIZE], of which [groups, size] exist. KEPT: groups that may be chosen
    from, 0 = all. Each round of a choice takes the largest key and removes it."""
    token = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)
    member = tl.arange(0, SIZE)
    expert = group[:, None] * size + member[None, :]
    here = (group < groups)[:, None] & (member < size)[None, :]
    own = logits + token * row_stride
    x = tl.load(own + expert, mask=here, other=-float("inf"))
    if SIGMOID:
        picking = _sigmoid(x, EXACT)
    else:
        highest = tl.max(x)
        whole = tl.sum(tl.exp(x - highest))
        picking = tl.exp(x - highest) / whole
    if BIASED:
        picking += tl.load(bias + expert, mask=here, other=0.0)
    picking = tl.where(here, picking, -float("inf"))
    keys = tl.where(here, _keys(picking, expert), _NOTHING)
    if KEPT > 0:
        best = tl.max(picking, 1)
        if BIASED and SIZE > 1:  # the two best, one of which may occur twice
            first = tl.max(keys, 1)
            second = tl.max(tl.where(keys == first[:, None], -float("inf"), picking), 1)
            best += second
        left = tl.where(group < groups, _keys(best, group), _NOTHING)
        kept = group < 0
        for _ in range(KEPT):
            most = tl.max(left)
            kept = kept | (left == most)
            left = tl.where(left == most, _NOTHING, left)
        keys = tl.where(kept[:, None], keys, _NOTHING)
    slot = tl.arange(0, SLOTS)
    chosen = tl.zeros([SLOTS], tl.int32)
    for at in range(TOPK):
        most = tl.max(keys)
        keys = tl.where(keys == most, _NOTHING, keys)
        chosen = tl.where(slot == at, _number(most), chosen)
    x = tl.load(own + chosen, mask=slot < TOPK, other=-float("inf"))
    weight = _sigmoid(x, EXACT) if SIGMOID else tl.exp(x - highest) / whole
    if NORMALIZE:
        weight = weight / (tl.sum(weight) + 1e-20)
    at = token * TOPK + slot
    tl.store(ids + at, chosen, mask=slot < TOPK)
    tl.store(weights + at, weight * scale, mask=slot < TOPK)
