"""mla_attention as three steps, each written where the next one reads: products over heads, by
torch or in Triton, around the attention."""

from collections.abc import Callable

import torch
from torch import Tensor

from dsa_hal.autotune.space import Space
from dsa_hal.backends.portable import layouts
from dsa_hal.backends.portable.gemm import Tile, tiles
from dsa_hal.backends.portable.rows import dense, power_of_two
from dsa_hal.ops.attention import sparse_mla, sparse_mla_paged
from dsa_hal.ops.layout import KVLayout

Product = Callable[[Tensor, Tensor, Tensor], None]
"""x [tokens, heads, a] times weight [heads, a, b], into the third, [tokens, heads, b]."""

SPACE = Space("mla_attention/triton", Tile, tiles)


def why_not(q: Tensor, kv_b: Tensor, layout: str) -> str | None:
    """What `absorbed` does not take, or None."""
    if q.dtype == kv_b.dtype:
        return layouts.unknown(layout) if layout else None
    return f"q is {q.dtype}, kv_b {kv_b.dtype}; it takes both of one dtype"


def absorbed(
    q: Tensor, kv_b: Tensor, kv: Tensor, indices: Tensor, *, softmax_scale: float, layout: str,
    product: Product,
) -> Tensor:  # fmt: skip
    """`mla_attention`. The products' results lie token by token: neither the absorbed queries nor
    the result are put together by a copy, which saves a fifth in prefill (H200)."""
    (tokens, heads, dim), lora = q.shape, kv_b.shape[2]
    width = KVLayout.parse(layout).width if layout else kv.shape[1]
    nope = dim - (width - lora)
    query = q.new_empty(tokens, heads, width)
    product(q[..., :nope], kv_b[:, :nope], query[..., :lora])
    query[..., lora:] = q[..., nope:]
    if layout:
        paged, _ = sparse_mla_paged(
            query[:, None], kv, indices[:, None],
            layout=layout, softmax_scale=softmax_scale, dim_v=lora,
        )  # fmt: skip
        latent = paged[:, 0]
    else:
        latent, _, _ = sparse_mla(query, kv, indices, softmax_scale=softmax_scale, dim_v=lora)
    out = q.new_empty(tokens, heads, kv_b.shape[1] - nope)
    product(latent, kv_b[:, nope:].transpose(1, 2), out)
    return out


def by_torch(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """A `Product`."""
    torch.bmm(x.transpose(0, 1), weight, out=out.transpose(0, 1))


def by_triton(precision: str) -> Product:
    """A `Product` in Triton. precision: how fp32 is multiplied, one of `tl.dot`'s
    `input_precision`."""

    def product(x: Tensor, weight: Tensor, out: Tensor) -> None:
        from dsa_hal.backends.portable._kernels.absorbed import project

        x = dense(x)
        (tokens, heads, width), columns = x.shape, out.shape[2]
        if not out.numel():
            return
        tile = SPACE.pick(rows=power_of_two(tokens), n=columns, bytes=x.element_size())
        project[-(-tokens // tile.bm) * -(-columns // tile.bn), heads](
            x, weight, out, x.stride(0), x.stride(1), *weight.stride(), out.stride(0),
            out.stride(1), tokens, WIDTH=width, COLUMNS=columns, BM=tile.bm, BN=tile.bn, BK=tile.bk,
            PRECISION=precision, **tile.options,
        )  # fmt: skip

    return product
