"""Writing and reading records by slot without looking at the slots on the host."""

import torch
from torch import Tensor

from dsa_hal.backends.npu._attention import meta, meta_pool
from dsa_hal.backends.npu._library import call, refusal
from dsa_hal.errors import BadInput
from dsa_hal.ops.layout import KVLayout


def write(op: str, pages: Tensor, values: Tensor, slots: Tensor, layout: str, pow2: bool) -> None:
    """Store `values` [tokens, width] in their slots, for the op called `op`.

    The device's scatter takes no slot of -1. Which tokens have one is not known on the host, so
    such a token becomes a second copy of another that has a slot: the same bytes go to the same
    place twice. Where no token has one, slot 0 is given what it holds already.

    Raises BadInput for a pool whose pages lie apart.
    """
    if not pages.is_contiguous():
        raise BadInput(
            f"{op}: pages have strides {list(pages.stride())}; the device's scatter takes a pool"
            " that is contiguous as a whole"
        )
    if not slots.numel() or not pages.numel():
        return
    placed = slots >= 0
    token = torch.arange(slots.shape[0], device=slots.device)
    token = torch.where(placed, token, placed.to(torch.int32).argmax())
    target = slots[token].clamp_min(0)
    for room, rows in _pieces(pages, values, KVLayout.parse(layout), pow2):
        updates = torch.where(placed.any(), rows[token], room[:1])
        call("npu_scatter_nd_update_", input=room, indices=target[:, None], updates=updates)


def _pieces(
    pages: Tensor, values: Tensor, form: KVLayout, pow2: bool
) -> list[tuple[Tensor, Tensor]]:
    """(a piece of the pool [slots, n], what `values` put into it [tokens, n]) of one dtype each:
    part by part in split order, else whole records."""
    parts = form.encode(values, pow2=pow2)
    if form.order == "split":
        views = form.views(pages)
        return [(view.flatten(0, 1), parts[name]) for name, view in views.items()]
    if form.element == torch.uint8:  # which the scatter does not know
        records = torch.cat([parts[part.name].view(torch.int8) for part in form.parts], -1)
        return [(pages.view(torch.int8).flatten(0, 1), records)]
    return [(pages.flatten(0, 1), torch.cat([parts[part.name] for part in form.parts], -1))]


def read(pages: Tensor, slots: Tensor, layout: str) -> dict[str, Tensor]:
    """The parts of the records in some slots [tokens, count]; zeros for slot -1."""
    form = KVLayout.parse(layout)
    nothing = (slots < 0)[:, None]
    if not pages.numel() or not slots.numel():
        shapes = {part.name: (slots.shape[0], part.count, part.dtype) for part in form.parts}
        return {
            n: pages.new_zeros(tokens, size, dtype=d) for n, (tokens, size, d) in shapes.items()
        }
    at = slots.clamp_min(0)
    if form.order == "split":
        views = form.views(pages)
        found = {name: view.flatten(0, 1).index_select(0, at) for name, view in views.items()}
    else:
        records = pages.flatten(0, 1).index_select(0, at)
        found = {name: part[0] for name, part in form.views(records[None]).items()}
    return {name: part.masked_fill(nothing, 0) for name, part in found.items()}


def unfit(layout: str) -> str | None:
    """Why records in `layout` cannot be stored or read one by one here, or None."""
    form = KVLayout.parse(layout)
    if form.order in ("token", "split") and form.codes != "fp8":
        return None
    return (
        f"layout {layout} is of {form.codes} in {form.order} order; records here are of floats or"
        " int8, in token or split order"
    )


def refused(pages: Tensor, values: Tensor, layout: str) -> str | None:
    """Why `values` [tokens, width] cannot be scattered into `pages`, or None."""
    if (reason := unfit(layout)) is not None:
        return reason
    empty = meta(*values.shape, dtype=values.dtype)
    target = meta(values.shape[0], 1)
    for room, rows in _pieces(meta_pool(pages), empty, KVLayout.parse(layout), True):
        reason = refusal("npu_scatter_nd_update_", input=room, indices=target, updates=rows)
        if reason is not None:
            return reason
    return None
