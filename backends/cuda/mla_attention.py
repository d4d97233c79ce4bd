"""mla_attention on NVIDIA GPUs."""

from torch import Tensor

from dsa_hal.backends.portable import absorbed
from dsa_hal.backends.portable.gemm import Tile, tiles
from dsa_hal.ops.absorbed import mla_attention


def _tiles(limits: object, *, rows: int, n: int, bytes: int) -> list[Tile]:
    """Wide ones: the left operand is read again for every block of columns."""
    found = tiles(rows=rows, n=n, bytes=bytes)
    return [Tile(64, 128, 64, 4, 3), *found] if bytes == 2 and 32 < rows <= 256 else found


absorbed.SPACE.on("cuda", _tiles)


def _why_not(
    q: Tensor, kv_b: Tensor, kv: Tensor, indices: Tensor, *, softmax_scale: float, layout: str = ""
) -> str | None:
    return absorbed.why_not(q, kv_b, layout)


@mla_attention.impl(
    "cuda", "triton", contract=1, arch=("sm90",), needs=("triton>=3.6",), why_not=_why_not
)
def projected(
    q: Tensor, kv_b: Tensor, kv: Tensor, indices: Tensor, *, softmax_scale: float, layout: str = ""
) -> Tensor:
    """Products over heads of our own."""
    return absorbed.absorbed(
        q, kv_b, kv, indices, softmax_scale=softmax_scale, layout=layout,
        product=absorbed.by_triton("tf32x3"),
    )  # fmt: skip


@mla_attention.impl("cuda", "torch", contract=1, rank=1, why_not=_why_not)
def attend(
    q: Tensor, kv_b: Tensor, kv: Tensor, indices: Tensor, *, softmax_scale: float, layout: str = ""
) -> Tensor:
    """cuBLAS's products over heads."""
    return absorbed.absorbed(
        q, kv_b, kv, indices, softmax_scale=softmax_scale, layout=layout, product=absorbed.by_torch
    )
