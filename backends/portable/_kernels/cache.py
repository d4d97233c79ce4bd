"""Tokens into a cache's pages and back, for every layout: where a part of a record lies is told in
numbers, so one pair of kernels serves both orders of `ops/layout.py`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsa_hal.backends.portable._kernels.quant import encoded, scale_of
from dsa_hal.backends.portable.rows import dense, pick, power_of_two
from dsa_hal.errors import BadInput
from dsa_hal.ops.layout import SCALE, KVLayout, Part

CHUNK = 128
"""Values moved as one row of a tile where a layout has no groups."""

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
    _store[(triton.cdiv(tokens * parts["PARTS"], tile.rows),)](
        pages, values, dense(slots), tokens, pages.shape[0] * pages.shape[1], pages.shape[1],
        pages.stride(0) * pages.element_size(), values.stride(0), POW2=pow2, BLOCKS=tile.rows,
        **parts, num_warps=tile.warps,
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
    _gather[(triton.cdiv(tokens * parts["PARTS"], tile.rows),)](
        pages, dense(slots), out, scale, tokens, pages.shape[0] * pages.shape[1], pages.shape[1],
        pages.stride(0) * pages.element_size(), BLOCKS=tile.rows, **parts, num_warps=tile.warps,
    )  # fmt: skip
    return out, scale


def _checked(op: str, pages: Tensor, layout: str) -> KVLayout:
    """The layout, once strides and alignment of `pages` are known to fit it."""
    known = KVLayout.parse(layout)
    if (reason := known.why_not(pages)) is not None:
        raise BadInput(f"{op}: {reason}")
    return known


def _plan(op: str, known: KVLayout, pages: Tensor, tokens: int):  # type: ignore[no-untyped-def]
    """The tile, and the kernels' description of a record: PARTS blocks of GROUP values of the first
    part, then of the tail if there is one."""
    first, tail = known.data[0], known.data[1] if len(known.data) > 1 else None
    group = known.group or min(CHUNK, power_of_two(first.count))
    heads = triton.cdiv(first.count, group)
    tails = triton.cdiv(tail.count, group) if tail else 0
    tile = pick(op, tokens * (heads + tails), power_of_two(group))
    described = dict(
        COUNT=first.count, TAIL=tail.count if tail else 0, GROUP=group,
        WIDTH=power_of_two(group), HEADS=heads, PARTS=heads + tails, SCALED=known.group > 0,
        VALUE_TYPE=_TYPES[first.dtype], TAIL_TYPE=_TYPES[tail.dtype] if tail else None,
    )  # fmt: skip
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


@triton.jit(do_not_specialize=["tokens", "room"])
def _store(
    pages, values, slots, tokens, room, page_size, page_bytes, stride, POW2: tl.constexpr,
    BLOCKS: tl.constexpr, COUNT: tl.constexpr, TAIL: tl.constexpr, GROUP: tl.constexpr,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, PARTS: tl.constexpr, SCALED: tl.constexpr,
    VALUE_TYPE: tl.constexpr, TAIL_TYPE: tl.constexpr, VALUE_AT: tl.constexpr,
    VALUE_STEP: tl.constexpr, SCALE_AT: tl.constexpr, SCALE_STEP: tl.constexpr,
    TAIL_AT: tl.constexpr, TAIL_STEP: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    token, part = (block // PARTS).to(tl.int64), block % PARTS
    page, offset, real = _places(slots, token, token < tokens, room, page_size, page_bytes)
    item = tl.arange(0, WIDTH)
    head = part < HEADS
    column = part[:, None] * GROUP + item[None, :]
    inside = (item < GROUP)[None, :] & (column < COUNT) & (real & head)[:, None]
    source = values + token[:, None] * stride
    wide = tl.load(source + column, mask=inside, other=0.0).to(tl.float32)
    target = _at(pages, page, offset, VALUE_TYPE, VALUE_AT, VALUE_STEP)
    if SCALED:
        scale = scale_of(tl.max(tl.abs(wide), 1), POW2)
        made = encoded(wide, scale[:, None], POW2)
        scales = _at(pages, page, offset, tl.float32, SCALE_AT, SCALE_STEP)
        tl.store(scales + part, scale, mask=real & head)
    else:
        made = wide.to(VALUE_TYPE)
    tl.store(target[:, None] + column, made, mask=inside)
    if TAIL:
        behind = (part - HEADS)[:, None] * GROUP + item[None, :]
        inside = (item < GROUP)[None, :] & (behind < TAIL) & (real & (part >= HEADS))[:, None]
        left = tl.load(source + COUNT + behind, mask=inside, other=0.0)
        target = _at(pages, page, offset, TAIL_TYPE, TAIL_AT, TAIL_STEP)
        tl.store(target[:, None] + behind, left.to(tl.float32).to(TAIL_TYPE), mask=inside)


@triton.jit(do_not_specialize=["tokens", "room"])
def _gather(
    pages, slots, out, scale_out, tokens, room, page_size, page_bytes, BLOCKS: tl.constexpr,
    COUNT: tl.constexpr, TAIL: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr,
    HEADS: tl.constexpr, PARTS: tl.constexpr, SCALED: tl.constexpr, VALUE_TYPE: tl.constexpr,
    TAIL_TYPE: tl.constexpr, VALUE_AT: tl.constexpr, VALUE_STEP: tl.constexpr,
    SCALE_AT: tl.constexpr, SCALE_STEP: tl.constexpr, TAIL_AT: tl.constexpr,
    TAIL_STEP: tl.constexpr,
):  # fmt: skip
    """With `scale_out`, codes and scales as they are stored; else values."""
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    token, part = (block // PARTS).to(tl.int64), block % PARTS
    ok = token < tokens
    page, offset, real = _places(slots, token, ok, room, page_size, page_bytes)
    item = tl.arange(0, WIDTH)
    head = part < HEADS
    column = part[:, None] * GROUP + item[None, :]
    inside = (item < GROUP)[None, :] & (column < COUNT) & (ok & head)[:, None]
    source = _at(pages, page, offset, VALUE_TYPE, VALUE_AT, VALUE_STEP)
    made = tl.load(source[:, None] + column, mask=inside & real[:, None], other=0.0)
    scale = real.to(tl.float32)
    if SCALED:
        scales = _at(pages, page, offset, tl.float32, SCALE_AT, SCALE_STEP)
        scale = tl.load(scales + part, mask=real & head, other=0.0)
    if scale_out is not None:
        tl.store(scale_out + token, scale, mask=ok & (part == 0))
    elif SCALED:
        made = made.to(tl.float32) * scale[:, None]
    target = out + token[:, None] * (COUNT + TAIL)
    tl.store(target + column, made.to(out.dtype.element_ty), mask=inside)
    if TAIL:
        behind = (part - HEADS)[:, None] * GROUP + item[None, :]
        inside = (item < GROUP)[None, :] & (behind < TAIL) & (ok & (part >= HEADS))[:, None]
        source = _at(pages, page, offset, TAIL_TYPE, TAIL_AT, TAIL_STEP)
        left = tl.load(source[:, None] + behind, mask=inside & real[:, None], other=0.0)
        tl.store(target + COUNT + behind, left.to(tl.float32).to(out.dtype.element_ty), mask=inside)
