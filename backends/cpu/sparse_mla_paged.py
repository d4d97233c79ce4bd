"""sparse_mla_paged on the processor."""

import torch
from torch import Tensor

from dsa_hal.backends.cpu._fp8 import widen_scaled
from dsa_hal.backends.cpu._sparse import attend
from dsa_hal.ops.attention import sparse_mla_paged
from dsa_hal.ops.layout import SCALE, KVLayout


@sparse_mla_paged.impl("cpu", "torch", contract=1, promises=("deterministic", "lse=natural"))
def sparse_paged(
    q: Tensor, pages: Tensor, indices: Tensor, *, layout: str, softmax_scale: float,
    dim_v: int = 512, attn_sink: Tensor | None = None, topk_length: Tensor | None = None,
    schedule: Tensor | None = None, num_splits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gathers whole records and decodes only those. One queue of work, so a schedule has no use."""
    batch, next_n, heads, _ = q.shape
    form, page_size = KVLayout.parse(layout), pages.shape[1]
    dense = form.order == "token" and pages.is_contiguous()

    def gather(ids: Tensor, out: Tensor) -> None:
        if dense:  # the selected records, as one page
            records = torch.index_select(pages.view(-1, form.record), 0, ids)
            parts = {name: part[0] for name, part in form.views(records[None]).items()}
        else:
            at = ids // page_size, ids % page_size
            parts = {name: part[at] for name, part in form.views(pages).items()}
        _decode(form, parts, out)

    out, _, lse = attend(
        q.flatten(0, 1), indices.flatten(0, 1), gather, pages.shape[0] * page_size,
        softmax_scale=softmax_scale, dim_v=dim_v, attn_sink=attn_sink,
        topk_length=None if topk_length is None else topk_length.flatten(),
        asked="sparse_mla_paged: indices, flattened to one row per query,",
    )  # fmt: skip
    lse = lse.view(batch, next_n, heads).transpose(1, 2)
    return out.view(batch, next_n, heads, dim_v), lse.clone(memory_format=torch.contiguous_format)


def _decode(form: KVLayout, parts: dict[str, Tensor], out: Tensor) -> None:
    """Values of records, parts [n, count], to `out` [n, width] fp32."""
    at = 0
    for part in form.data:
        target, source = out[:, at : at + part.count], parts[part.name]
        at += part.count
        if not form.group or part is not form.parts[0]:
            target.copy_(source)
            continue
        scale = parts[SCALE][..., None]
        whole = part.count // form.group  # groups that are full; the last one may not be
        full, cut = (-1, whole, form.group), whole * form.group
        widen_scaled(source[:, :cut].view(full), scale[:, :whole], target[:, :cut].view(full))
        if cut < part.count:
            widen_scaled(source[:, cut:], scale[:, whole], target[:, cut:])
