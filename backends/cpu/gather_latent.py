"""gather_latent on the processor."""

import torch
from torch import Tensor

from dsa_hal.backends.cpu._fp8 import widen
from dsa_hal.backends.cpu._slots import locate, raw
from dsa_hal.ops.cache import gather_latent
from dsa_hal.ops.layout import SCALE, KVLayout

CHUNK = 4096
"""Tokens de-quantised at a time."""


@gather_latent.impl("cpu", "torch", contract=1)
def gather(
    pages: Tensor, slots: Tensor, *, layout: str, out_dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Part by part, scales multiplied group by group in place."""
    known = KVLayout.parse(layout)
    views = known.views(pages)
    out = torch.zeros(slots.shape[0], known.width, dtype=out_dtype)
    token, page, offset = locate(gather_latent.name, slots, pages)
    for at in range(0, token.shape[0], CHUNK):
        some = slice(at, at + CHUNK)
        where = (page[some], offset[some])
        pieces = []
        for part in known.data:
            piece = raw(views[part.name])[where].view(part.dtype)
            if known.group and part is known.parts[0]:
                piece = widen(piece)
                scale = views[SCALE][where]
                for group, factors in enumerate(scale.unbind(1)):
                    left = group * known.group
                    piece[:, left : left + known.group] *= factors[:, None]
            pieces.append(piece.to(out_dtype))
        out[token[some]] = torch.cat(pieces, 1)
    return out
