"""Tokens to their experts' rows and back, as Triton kernels that never ask the host.

Every row of `permute` is written by a program of its own, which finds out what belongs there. Where
slots (tokens times experts chosen) are few, each program counts all of them itself; where they are
many, a count per stretch of slots and a second pass say where each slot goes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

FEW = 1024
"""Slots up to which every program counts all of them: one launch instead of four."""

STRETCH = 512
"""Slots that one program counts where they are many."""

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def dense(t: Tensor) -> Tensor:
    """t itself where its last axis is dense, else a copy."""
    return t if t.stride(-1) == 1 else t.contiguous()


def permuted(x: Tensor, ids: Tensor, *, experts: int, align: int, rows: int) -> tuple[Tensor, ...]:
    """`permute`: `rows` rows, their layout and positions. Ids of no expert count as -1."""
    made = torch.empty(rows, x.shape[1], dtype=x.dtype, device=x.device)
    layout = torch.empty(rows, dtype=torch.int32, device=x.device)
    position = torch.empty(ids.shape, dtype=torch.int32, device=x.device)
    ids = ids.contiguous()
    slots, topk = ids.numel(), max(1, ids.shape[1])
    if not rows:
        return made, layout, position
    # Bytes are moved as whole numbers of their width; what is wider than 8 bytes as several of 8.
    kind = _INTEGERS.get(x.element_size(), torch.int64)
    source, target = dense(x).view(kind), made.view(kind)
    dim = source.shape[1]
    block = min(4096, triton.next_power_of_2(max(1, dim)))
    grid = (rows, max(1, triton.cdiv(dim, block)))
    width = triton.next_power_of_2(experts)
    if slots <= FEW:
        _permute_few[grid](
            source, ids, target, layout, position, source.stride(0), slots, topk, experts, dim,
            align, SLOTS=triton.next_power_of_2(max(16, slots)), EXPERTS=max(16, width),
            BLOCK=block, num_warps=4,
        )  # fmt: skip
        return made, layout, position
    stretches = triton.cdiv(slots, STRETCH)
    counts = torch.empty(stretches, experts, dtype=torch.int32, device=x.device)
    slot_of = torch.full((rows,), -1, dtype=torch.int32, device=x.device)
    _count[(stretches,)](ids, counts, slots, experts, EXPERTS=width, STRETCH=STRETCH, num_warps=4)
    _place[(stretches,)](
        ids, counts, slot_of, position, slots, stretches, experts, align,
        EXPERTS=width, STRETCH=STRETCH, PART=32, num_warps=8,
    )  # fmt: skip
    _gather[grid](
        source, ids, slot_of, target, layout, source.stride(0), topk, dim, BLOCK=block, num_warps=4
    )
    return made, layout, position


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
def _ends(counts, align):
    """Where each expert's rows end: each count rounded up to `align`, summed."""
    return tl.cumsum((counts + align - 1) // align * align, 0)


@triton.jit
def _copy(source, target, source_row, row, row_stride, dim, real, BLOCK: tl.constexpr):
    """A program's part of a row, zeros if it is not `real`."""
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < dim
    values = tl.load(source + source_row.to(tl.int64) * row_stride + column, mask=inside & real,
                     other=0)  # fmt: skip
    tl.store(target + row.to(tl.int64) * dim + column, values, mask=inside)


@triton.jit
def _permute_few(
    source, ids, target, layout, position, row_stride, slots, topk, experts, dim, align,
    SLOTS: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    slot = tl.arange(0, SLOTS)
    expert = tl.arange(0, EXPERTS)
    own = tl.load(ids + slot, mask=slot < slots, other=-1)
    counts = _counted(own, experts, EXPERTS)
    ends = _ends(counts, align)
    mine = tl.sum((ends <= row).to(tl.int32), 0)  # `experts` or more behind the last
    start = tl.max(tl.where(expert < mine, ends, 0), 0)
    rank = row - start
    real = rank < tl.sum(tl.where(expert == mine, counts, 0), 0)
    same = own == mine
    before = tl.cumsum(same.to(tl.int32), 0) - 1
    found = tl.sum(tl.where(same & (before == rank), slot, 0), 0)
    if tl.program_id(1) == 0:
        tl.store(layout + row, tl.where(real, mine, -1))
        if real:
            tl.store(position + found, row)
        if row < slots:  # there are at least as many rows as slots
            choice = tl.load(ids + row)
            if (choice < 0) | (choice >= experts):
                tl.store(position + row, -1)
    _copy(source, target, found // topk, row, row_stride, dim, real, BLOCK)


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
    ids, counts, slot_of, position, slots, stretches, experts, align,
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
    tl.store(slot_of + row, slot, mask=known)


@triton.jit
def _gather(
    source, ids, slot_of, target, layout, row_stride, topk, dim, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0)
    slot = tl.load(slot_of + row)
    real = slot >= 0
    if tl.program_id(1) == 0:
        tl.store(layout + row, tl.load(ids + slot, mask=real, other=-1))
    _copy(source, target, tl.maximum(slot, 0) // topk, row, row_stride, dim, real, BLOCK)


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
