"""store_latent on the processor."""

from torch import Tensor

from dsa_hal.backends.cpu._slots import locate, raw
from dsa_hal.backends.cpu.quantize_fp8 import quantize
from dsa_hal.ops.cache import store_latent
from dsa_hal.ops.layout import SCALE, KVLayout

CHUNK = 4096
"""Tokens quantised at a time."""


@store_latent.impl("cpu", "torch", contract=1)
def store(pages: Tensor, latent: Tensor, slots: Tensor, *, layout: str) -> None:
    """Tokens without a slot are dropped first; what remains is written by (page, offset)."""
    write(store_latent.name, pages, latent, slots, layout, pow2=True)


def write(op: str, pages: Tensor, values: Tensor, slots: Tensor, layout: str, pow2: bool) -> None:
    """The store of either cache, for the op called `op`."""
    known = KVLayout.parse(layout)
    views = known.views(pages)
    token, page, offset = locate(op, slots, pages)
    for at in range(0, token.shape[0], CHUNK):
        some = slice(at, at + CHUNK)
        where = (page[some], offset[some])
        rows = values[token[some]]
        left = 0
        for part in known.data:
            piece = rows[:, left : left + part.count]
            left += part.count
            if known.group and part is known.parts[0]:
                if known.codes == "int8":
                    piece, scale = known.quantized(piece)
                else:
                    piece, scale = quantize(piece, group=known.group, pow2=pow2)
                views[SCALE][where] = scale
            raw(views[part.name])[where] = raw(piece.to(part.dtype))
