"""Tokens into a cache's pages and back, for every layout: where a part of a record lies is told in
numbers, so one pair of kernels serves both orders of `ops/layout.py`."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsa_hal.backends.portable._kernels.quant import encoded, scale_of
from dsa_hal.backends.portable.rows import RowTile, dense, pick, power_of_two
from dsa_hal.errors import BadInput
from dsa_hal.ops.layout import SCALE, KVLayout, Part

_TYPES = {
    torch.float8_e4m3fn: tl.float8e4nv, torch.float32: tl.float32, torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}  # fmt: skip


def stored(op: str, pages: Tensor, values: Tensor, slots: Tensor, layout: str, pow2: bool) -> None:
    """`store_latent` and `store_index_key`, with the tile of the op called `op`."""
    known = _checked(op, pages, layout)
    tokens = slots.shape[0]
    if not tokens or not pages.numel():
        return
    values = dense(values)
    tile, parts = _plan(op, known, pages, tokens)
    _store[(triton.cdiv(tokens, tile.rows),)](
        pages, values, dense(slots), tokens, pages.shape[0] * pages.shape[1], pages.shape[1],
        pages.stride(0) * pages.element_size(), values.stride(0), POW2=pow2, ROWS=tile.rows,
        **parts, **tile.options,
    )  # fmt: skip


def gathered(
    op: str, pages: Tensor, slots: Tensor, layout: str, out_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    """`gather_latent` (values in `out_dtype`), or without one `gather_index_key`: the first part as
    stored, and its scales."""
    known = _checked(op, pages, layout)
    tokens = slots.shape[0]
    raw = out_dtype is None
    kind = known.parts[0].dtype if out_dtype is None else out_dtype
    out = torch.empty(tokens, known.width, dtype=kind, device=pages.device)
    scale = torch.empty(tokens, dtype=torch.float32, device=pages.device) if raw else None
    if not tokens:
        return out, scale
    tile, parts = _plan(op, known, pages, tokens)
    _gather[(triton.cdiv(tokens, tile.rows),)](
        pages, dense(slots), out, scale, tokens, pages.shape[0] * pages.shape[1], pages.shape[1],
        pages.stride(0) * pages.element_size(), ROWS=tile.rows, **parts, **tile.options,
    )  # fmt: skip
    return out, scale


def _checked(op: str, pages: Tensor, layout: str) -> KVLayout:
    """The layout, once strides and alignment of `pages` are known to fit it."""
    known = KVLayout.parse(layout)
    if (reason := known.why_not(pages)) is not None:
        raise BadInput(f"{op}: {reason}")
    return known


def _plan(op: str, known: KVLayout, pages: Tensor, tokens: int) -> tuple[RowTile, dict[str, Any]]:
    """The tile, and the kernels' description of a record: GROUPS times GROUP values of the first
    part, and a tail if there is one."""
    first, tail = known.data[0], known.data[1] if len(known.data) > 1 else None
    group = known.group or power_of_two(first.count)
    groups = power_of_two(triton.cdiv(first.count, group))
    width = power_of_two(group)
    described = dict(
        COUNT=first.count, GROUP=group, WIDTH=width, GROUPS=groups, SCALED=known.group > 0,
        TAIL=tail.count if tail else 0, TAIL_WIDTH=power_of_two(tail.count) if tail else 0,
        VALUE_TYPE=_TYPES[first.dtype], TAIL_TYPE=_TYPES[tail.dtype] if tail else None,
    )  # fmt: skip
    tile = pick(op, tokens, groups * width)
    at = 0
    for part in known.parts:
        role = _role(part, first)
        if known.order == "token":
            place, step = at, known.token_bytes
        else:
            place, step = at * pages.shape[1], part.bytes
        described[f"{role}_AT"] = place // part.dtype.itemsize
        described[f"{role}_STEP"] = step // part.dtype.itemsize
        at += part.bytes
    for role in ("SCALE", "TAIL"):
        described.setdefault(f"{role}_AT", 0)
        described.setdefault(f"{role}_STEP", 0)
    return tile, described


def _role(part: Part, first: Part) -> str:
    return "SCALE" if part.name == SCALE else "VALUE" if part is first else "TAIL"


@triton.jit
def _places(slots, token, ok, room, page_size, page_bytes):
    """Pages as bytes from the pool's start, offsets in them, and which slots are real. What lies
    outside the pool counts as no slot."""
    slot = tl.load(slots + token, mask=ok, other=-1)
    real = (slot >= 0) & (slot < room)
    slot = tl.where(real, slot, 0)
    return (slot // page_size).to(tl.int64) * page_bytes, (slot % page_size).to(tl.int64), real


@triton.jit
def _at(pages, page, offset, dtype: tl.constexpr, AT: tl.constexpr, STEP: tl.constexpr):
    """Pointers to one part of each token's record."""
    base = pages.to(tl.pointer_type(dtype))
    return base + page // (dtype.primitive_bitwidth // 8) + (AT + offset * STEP)


@triton.jit
def _items(ok, COUNT: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """Columns [1, groups, width] of the first part, and which exist [rows, groups, width]."""
    item = tl.arange(0, WIDTH)[None, None, :]
    column = tl.arange(0, GROUPS)[None, :, None] * GROUP + item
    return column, ok[:, None, None] & (item < GROUP) & (column < COUNT)


@triton.jit(do_not_specialize=["tokens", "room"])
def _store(
    pages, values, slots, tokens, room, page_size, page_bytes, stride, POW2: tl.constexpr,
    ROWS: tl.constexpr, COUNT: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr,
    GROUPS: tl.constexpr, SCALED: tl.constexpr, TAIL: tl.constexpr, TAIL_WIDTH: tl.constexpr,
    VALUE_TYPE: tl.constexpr, TAIL_TYPE: tl.constexpr, VALUE_AT: tl.constexpr,
    VALUE_STEP: tl.constexpr, SCALE_AT: tl.constexpr, SCALE_STEP: tl.constexpr,
    TAIL_AT: tl.constexpr, TAIL_STEP: tl.constexpr,
):  # fmt: skip
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    page, offset, real = _places(slots, token, token < tokens, room, page_size, page_bytes)
    source = values + token * stride
    column, inside = _items(real, COUNT, GROUP, GROUPS, WIDTH)
    wide = tl.load(source[:, None, None] + column, mask=inside, other=0.0).to(tl.float32)
    if TAIL:
        behind = tl.arange(0, TAIL_WIDTH)[None, :]
        left_ok = real[:, None] & (behind < TAIL)
        left = tl.load(source[:, None] + COUNT + behind, mask=left_ok, other=0.0).to(tl.float32)
        target = _at(pages, page, offset, TAIL_TYPE, TAIL_AT, TAIL_STEP)
        tl.store(target[:, None] + behind, left.to(TAIL_TYPE), mask=left_ok)
    if SCALED:
        scale = scale_of(tl.max(tl.abs(wide), 2), POW2)
        made = encoded(wide, scale[:, :, None], POW2)
        group = tl.arange(0, GROUPS)[None, :]
        target = _at(pages, page, offset, tl.float32, SCALE_AT, SCALE_STEP)
        tl.store(target[:, None] + group, scale, mask=real[:, None] & (group * GROUP < COUNT))
    else:
        made = wide.to(VALUE_TYPE)
    target = _at(pages, page, offset, VALUE_TYPE, VALUE_AT, VALUE_STEP)
    tl.store(target[:, None, None] + column, made, mask=inside)


@triton.jit(do_not_specialize=["tokens", "room"])
def _gather(
    pages, slots, out, scale_out, tokens, room, page_size, page_bytes, ROWS: tl.constexpr,
    COUNT: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr,
    SCALED: tl.constexpr, TAIL: tl.constexpr, TAIL_WIDTH: tl.constexpr, VALUE_TYPE: tl.constexpr,
    TAIL_TYPE: tl.constexpr, VALUE_AT: tl.constexpr, VALUE_STEP: tl.constexpr,
    SCALE_AT: tl.constexpr, SCALE_STEP: tl.constexpr, TAIL_AT: tl.constexpr,
    TAIL_STEP: tl.constexpr,
):  # fmt: skip
    """With `scale_out`, codes and the one scale as they are stored; else values."""
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    ok = token < tokens
    page, offset, real = _places(slots, token, ok, room, page_size, page_bytes)
    column, inside = _items(ok, COUNT, GROUP, GROUPS, WIDTH)
    source = _at(pages, page, offset, VALUE_TYPE, VALUE_AT, VALUE_STEP)
    made = tl.load(source[:, None, None] + column, mask=inside & real[:, None, None], other=0.0)
    if SCALED:
        scales = _at(pages, page, offset, tl.float32, SCALE_AT, SCALE_STEP)
    if scale_out is not None:
        scale = tl.load(scales, mask=real, other=0.0) if SCALED else real.to(tl.float32)
        tl.store(scale_out + token, scale, mask=ok)
    elif SCALED:
        group = tl.arange(0, GROUPS)[None, :]
        scale_ok = real[:, None] & (group * GROUP < COUNT)
        scale = tl.load(scales[:, None] + group, mask=scale_ok, other=0.0)
        made = made.to(tl.float32) * scale[:, :, None]
    target = out + token * (COUNT + TAIL)
    if TAIL:
        behind = tl.arange(0, TAIL_WIDTH)[None, :]
        left_ok = ok[:, None] & (behind < TAIL)
        source = _at(pages, page, offset, TAIL_TYPE, TAIL_AT, TAIL_STEP)
        left = tl.load(source[:, None] + behind, mask=left_ok & real[:, None], other=0.0)
        left = left.to(tl.float32).to(out.dtype.element_ty)
        tl.store(target[:, None] + COUNT + behind, left, mask=left_ok)
    tl.store(target[:, None, None] + column, made.to(out.dtype.element_ty), mask=inside)
