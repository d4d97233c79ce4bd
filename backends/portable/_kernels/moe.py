"""Tokens to their experts' rows and back, as Triton kernels that never ask the host.

A program per token, or per part of a wide one, reads it once and writes all its rows; rows that
nobody fills are found and zeroed. Where slots (tokens times experts chosen) are few, each program
counts all of them itself; where they are many, a count per stretch of slots and a second pass say
where each slot goes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

FEW = 1024
"""Slots up to which every program counts all of them: one launch instead of five."""

STRETCH = 512
"""Slots that one program counts where they are many."""

PART, LARGE_PART = 2048, 4096
"""Bytes of a token that one program moves: more where each program counts first."""

EMPTY = 16
"""Rows that one program looks at for empty ones."""

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def dense(t: Tensor) -> Tensor:
    """t itself where its last axis is dense, else a copy."""
    return t if t.stride(-1) == 1 else t.contiguous()


def permuted(
    x: Tensor, ids: Tensor, *, experts: int, align: int, rows: int, scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """`permute`: `rows` rows, their layout and positions; beside them the rows' scales, where the
    tokens come with `scale` [tokens, groups] fp32. Ids of no expert count as -1."""
    (tokens, topk), device = ids.shape, x.device
    made = torch.empty(rows, x.shape[1], dtype=x.dtype, device=device)
    layout = torch.empty(rows, dtype=torch.int32, device=device)
    position = torch.empty(ids.shape, dtype=torch.int32, device=device)
    groups = 0 if scale is None else scale.shape[1]
    scales = None if scale is None else torch.empty(rows, groups, device=device)
    if not rows:
        return made, layout, position, scales
    ids, scale = ids.contiguous(), None if scale is None else dense(scale)
    # Bytes are moved as whole numbers of their width; what is wider than 8 bytes as several of 8.
    kind = _INTEGERS.get(x.element_size(), torch.int64)
    source, target = dense(x).view(kind), made.view(kind)
    dim, width = source.shape[1], triton.next_power_of_2(experts)
    slots = tokens * topk
    part = LARGE_PART if slots <= FEW else PART
    block = min(part // source.element_size(), triton.next_power_of_2(max(1, dim)))
    fixed = dict(
        BLOCK=block, TOPK=triton.next_power_of_2(max(1, topk)), SCALED=scale is not None,
        GROUPS=triton.next_power_of_2(max(1, groups)),
    )  # fmt: skip
    moved = (
        source, scale, ids, target, scales, layout, position, source.stride(0),
        0 if scale is None else scale.stride(0), tokens, topk, experts, dim, groups,
    )  # fmt: skip
    parts, empty = max(1, triton.cdiv(dim, block)), triton.cdiv(rows, EMPTY)
    if slots <= FEW:
        _permute_few[(tokens + empty, parts)](
            *moved, rows, align, SLOTS=triton.next_power_of_2(max(16, slots)),
            EXPERTS=max(16, width), EMPTY=EMPTY, **fixed, num_warps=4,
        )  # fmt: skip
        return made, layout, position, scales
    stretches = triton.cdiv(slots, STRETCH)
    counts = torch.empty(stretches, experts, dtype=torch.int32, device=device)
    filled = torch.zeros(rows, dtype=torch.int8, device=device)
    _count[(stretches,)](ids, counts, slots, experts, EXPERTS=width, STRETCH=STRETCH, num_warps=4)
    _place[(stretches,)](
        ids, counts, filled, position, slots, stretches, experts, align,
        EXPERTS=width, STRETCH=STRETCH, PART=32, num_warps=8,
    )  # fmt: skip
    _scatter[(tokens, parts)](*moved, **fixed, num_warps=4)
    _clear[(empty, parts)](
        target, scales, layout, filled, rows, dim, groups, BLOCK=block, GROUPS=fixed["GROUPS"],
        SCALED=fixed["SCALED"], EMPTY=EMPTY, num_warps=4,
    )  # fmt: skip
    return made, layout, position, scales


def summed(rows: Tensor, position: Tensor, weights: Tensor, shared: Tensor | None) -> Tensor:
    """`unpermute`. Positions of no row count as -1."""
    (tokens, topk), dim = position.shape, rows.shape[1]
    rows, position, weights = dense(rows), dense(position), dense(weights)
    shared = None if shared is None else dense(shared)
    out = torch.empty(tokens, dim, dtype=rows.dtype, device=rows.device)
    if out.numel():
        # Few tokens fill the device only with many programs each.
        block = min(1024 if tokens < 256 else 2048, triton.next_power_of_2(dim))
        _unpermute[(tokens, triton.cdiv(dim, block))](
            rows, position, weights, shared, out, rows.stride(0), position.stride(0),
            weights.stride(0), 0 if shared is None else shared.stride(0), rows.shape[0], dim,
            TOPK=topk, SHARED=shared is not None, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return out


@triton.jit
def _counted(own, experts, EXPERTS: tl.constexpr):
    """How often each expert is chosen."""
    known = (own >= 0) & (own < experts)
    return tl.histogram(tl.where(known, own, 0), EXPERTS, mask=known)


@triton.jit
def _send(
    source, scale, target, scales, layout, row_stride, scale_stride, token, row, choice, real, dim,
    groups, BLOCK: tl.constexpr, GROUPS: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """A program's part of a token to its rows [TOPK], those that are `real`."""
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < dim
    values = tl.load(source + token.to(tl.int64) * row_stride + column, mask=inside, other=0)
    where = row.to(tl.int64)[:, None]
    tl.store(target + where * dim + column[None, :], values[None, :],
             mask=real[:, None] & inside[None, :])  # fmt: skip
    if tl.program_id(1) == 0:
        tl.store(layout + row, choice, mask=real)
        if SCALED:
            group = tl.arange(0, GROUPS)
            factors = tl.load(scale + token.to(tl.int64) * scale_stride + group,
                              mask=group < groups, other=0.0)  # fmt: skip
            tl.store(scales + where * groups + group[None, :], factors[None, :],
                     mask=real[:, None] & (group < groups)[None, :])  # fmt: skip


@triton.jit
def _zero(
    target, scales, layout, row, empty, dim, groups,
    BLOCK: tl.constexpr, GROUPS: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """A program's part of those of its rows [EMPTY] that are `empty`."""
    if tl.max(empty.to(tl.int32), 0) > 0:
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        where = row.to(tl.int64)[:, None]
        tl.store(target + where * dim + column[None, :], 0,
                 mask=empty[:, None] & (column < dim)[None, :])  # fmt: skip
        if tl.program_id(1) == 0:
            tl.store(layout + row, -1, mask=empty)
            if SCALED:
                group = tl.arange(0, GROUPS)
                tl.store(scales + where * groups + group[None, :], 0.0,
                         mask=empty[:, None] & (group < groups)[None, :])  # fmt: skip


@triton.jit
def _permute_few(
    source, scale, ids, target, scales, layout, position, row_stride, scale_stride, tokens, topk,
    experts, dim, groups, rows, align, SLOTS: tl.constexpr, EXPERTS: tl.constexpr,
    EMPTY: tl.constexpr, BLOCK: tl.constexpr, TOPK: tl.constexpr, SCALED: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """The first programs move a token each, the others look for empty rows."""
    slots = tokens * topk
    slot = tl.arange(0, SLOTS)
    expert = tl.arange(0, EXPERTS)
    own = tl.load(ids + slot, mask=slot < slots, other=-1)
    counts = tl.where(expert < experts, _counted(own, experts, EXPERTS), 0)
    room = (counts + align - 1) // align * align
    ends = tl.cumsum(room, 0)
    token = tl.program_id(0)
    if token < tokens:
        nth = tl.arange(0, TOPK)
        mine = token * topk + nth
        choice = tl.load(ids + mine, mask=nth < topk, other=-1)
        real = (choice >= 0) & (choice < experts)
        before = (own[None, :] == choice[:, None]) & (slot[None, :] < mine[:, None])
        start = tl.gather(ends - room, tl.where(real, choice, 0), 0)
        row = start + tl.sum(before.to(tl.int32), 1)
        if tl.program_id(1) == 0:
            tl.store(position + mine, tl.where(real, row, -1), mask=nth < topk)
        _send(
            source, scale, target, scales, layout, row_stride, scale_stride, token, row, choice,
            real, dim, groups, BLOCK, GROUPS, SCALED,
        )  # fmt: skip
    else:
        place = (token - tokens) * EMPTY + tl.arange(0, EMPTY)
        beyond = ends[None, :] <= place[:, None]
        at = tl.sum(beyond.to(tl.int32), 1)  # the expert in whose room a row is
        begin = tl.max(tl.where(beyond, ends[None, :], 0), 1)
        count = tl.sum(tl.where(expert[None, :] == at[:, None], counts[None, :], 0), 1)
        empty = (place < rows) & (place - begin >= count)
        _zero(target, scales, layout, place, empty, dim, groups, BLOCK, GROUPS, SCALED)


@triton.jit
def _count(
    ids, counts, slots, experts, EXPERTS: tl.constexpr, STRETCH: tl.constexpr
):  # fmt: skip
    """counts[stretch, expert]: slots of a stretch that chose an expert."""
    stretch = tl.program_id(0)
    slot = stretch * STRETCH + tl.arange(0, STRETCH)
    expert = tl.arange(0, EXPERTS)
    own = tl.load(ids + slot, mask=slot < slots, other=-1)
    found = _counted(own, experts, EXPERTS)
    tl.store(counts + stretch * experts + expert, found, mask=expert < experts)


@triton.jit
def _place(
    ids, counts, filled, position, slots, stretches, experts, align,
    EXPERTS: tl.constexpr, STRETCH: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """A slot's row: where its expert starts, plus the slots before it that chose the same."""
    stretch = tl.program_id(0)
    expert = tl.arange(0, EXPERTS)
    total = tl.zeros([EXPERTS], tl.int32)
    earlier = tl.zeros([EXPERTS], tl.int32)
    for at in range(0, stretches, PART):
        part = at + tl.arange(0, PART)
        known = tl.load(
            counts + part[:, None] * experts + expert[None, :],
            mask=(part < stretches)[:, None] & (expert < experts)[None, :], other=0,
        )  # fmt: skip
        total += tl.sum(known, 0)
        earlier += tl.sum(tl.where((part < stretch)[:, None], known, 0), 0)
    room = (total + align - 1) // align * align
    base = tl.cumsum(room, 0) - room + earlier
    slot = stretch * STRETCH + tl.arange(0, STRETCH)
    inside = slot < slots
    own = tl.load(ids + slot, mask=inside, other=-1)
    rank = tl.zeros([STRETCH], tl.int32)
    for at in range(0, STRETCH, PART):
        other = stretch * STRETCH + at + tl.arange(0, PART)
        choice = tl.load(ids + other, mask=other < slots, other=-1)
        alike = (choice[None, :] == own[:, None]) & (other[None, :] < slot[:, None])
        rank += tl.sum(alike.to(tl.int32), 1)
    known = (own >= 0) & (own < experts)
    row = rank + tl.gather(base, tl.where(known, own, 0), 0)
    tl.store(position + slot, tl.where(known, row, -1), mask=inside)
    tl.store(filled + row, 1, mask=known)


@triton.jit
def _scatter(
    source, scale, ids, target, scales, layout, position, row_stride, scale_stride, tokens, topk,
    experts, dim, groups, BLOCK: tl.constexpr, TOPK: tl.constexpr, SCALED: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    nth = tl.arange(0, TOPK)
    row = tl.load(position + token * topk + nth, mask=nth < topk, other=-1)
    choice = tl.load(ids + token * topk + nth, mask=nth < topk, other=-1)
    _send(
        source, scale, target, scales, layout, row_stride, scale_stride, token, row, choice,
        row >= 0, dim, groups, BLOCK, GROUPS, SCALED,
    )  # fmt: skip


@triton.jit
def _clear(
    target, scales, layout, filled, rows, dim, groups, BLOCK: tl.constexpr, GROUPS: tl.constexpr,
    SCALED: tl.constexpr, EMPTY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * EMPTY + tl.arange(0, EMPTY)
    empty = tl.load(filled + row, mask=row < rows, other=1) == 0
    _zero(target, scales, layout, row, empty, dim, groups, BLOCK, GROUPS, SCALED)


@triton.jit
def _unpermute(
    rows, position, weights, shared, out, row_stride, position_stride, weight_stride,
    shared_stride, count, dim, TOPK: tl.constexpr, SHARED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows are added in the order of a token's experts, the shared one last."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < dim
    total = tl.zeros([BLOCK], tl.float32)
    for at in tl.static_range(TOPK):
        row = tl.load(position + token * position_stride + at)
        real = (row >= 0) & (row < count)
        weight = tl.load(weights + token * weight_stride + at, mask=real, other=0.0)
        values = tl.load(rows + row.to(tl.int64) * row_stride + column, mask=inside & real,
                         other=0.0)  # fmt: skip
        total += weight * values.to(tl.float32)
    if SHARED:
        total += tl.load(shared + token * shared_stride + column, mask=inside, other=0.0).to(
            tl.float32
        )
    tl.store(out + token * dim + column, total.to(out.dtype.element_ty), mask=inside)
