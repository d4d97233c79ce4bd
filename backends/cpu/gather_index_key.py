"""gather_index_key on the processor."""

import torch
from torch import Tensor

from dsa_hal.backends.cpu._slots import locate, raw
from dsa_hal.ops.cache import gather_index_key
from dsa_hal.ops.layout import SCALE, KVLayout


@gather_index_key.impl("cpu", "torch", contract=1)
def gather(pages: Tensor, slots: Tensor, *, layout: str) -> tuple[Tensor, Tensor]:
    """Stored bytes are copied, never converted."""
    known = KVLayout.parse(layout)
    views, key = known.views(pages), known.parts[0]
    token, page, offset = locate(gather_index_key.name, slots, pages)
    k = torch.zeros(slots.shape[0], known.width, dtype=key.dtype)
    raw(k)[token] = raw(views[key.name])[page, offset]
    scale = torch.zeros(slots.shape[0])
    scale[token] = views[SCALE][page, offset, 0].float() if known.group else 1.0
    return k, scale
