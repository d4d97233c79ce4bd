"""The whole of sparse MLA in decoding form: queries absorbed into the latent space, attention
there, results projected back to the heads."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dsa_hal.case import Cost, Inputs, Maker, case
from dsa_hal.check import calc_diff, each
from dsa_hal.ops._attention import (
    FLOATS,
    KEY_SCALE,
    SOFTMAX_SCALE,
    attended,
    placed,
    pool,
    selections,
)
from dsa_hal.ops.attention import sparse_mla, sparse_mla_paged
from dsa_hal.ops.layout import KVLayout, misfit
from dsa_hal.registry import Call, composite


def _inputs(
    make: Maker, *, tokens: int, context: int, heads: int, k: int, nope: int = 128, rope: int = 64,
    v: int = 128, lora: int = 512, dtype: str = "bf16", weight: str = "bf16", layout: str = "",
    pattern: str = "shuffled", page_size: int = 64,
) -> Inputs:  # fmt: skip
    visible = [max(0, context - tokens + 1 + t) for t in range(tokens)]
    indices = selections(make, visible, k, pattern)
    if layout:
        pages = -(-context // page_size)
        kv = pool(make, layout, pages, page_size)
        indices = placed(make, indices[None], 1, pages, page_size)[0]
    else:
        kv = make.randn(context, lora + rope, dtype=FLOATS[dtype], scale=KEY_SCALE)
    # absorbed queries get deviation 7, as the rotated part has: scores then spread by about 2
    return dict(
        q=make.randn(tokens, heads, nope + rope, dtype=FLOATS[dtype], scale=7.0),
        kv_b=make.randn(heads, nope + v, lora, dtype=FLOATS[weight], scale=nope**-0.5),
        kv=kv,
        indices=indices,
        softmax_scale=SOFTMAX_SCALE,
        layout=layout,
    )


def _sizes(q: Tensor, kv_b: Tensor, kv: Tensor, layout: str) -> tuple[int, int, int]:
    """(nope, rope, v): how the last axis of q and the rows of kv_b divide."""
    width = KVLayout.parse(layout).width if layout else kv.shape[-1]
    rope = width - kv_b.shape[2]
    nope = q.shape[2] - rope
    return nope, rope, kv_b.shape[1] - nope


def _cost(
    q: Tensor, kv_b: Tensor, kv: Tensor, indices: Tensor, *, softmax_scale: float, layout: str = ""
) -> Cost:
    rows, heads, dim = q.shape
    nope, rope, v = _sizes(q, kv_b, kv, layout)
    lora, pairs = kv_b.shape[2], attended(indices, None)
    flop = 2.0 * heads * (rows * lora * (nope + v) + pairs * (2 * lora + rope))
    key = KVLayout.parse(layout).token_bytes if layout else kv.shape[1] * kv.element_size()
    slots = kv.shape[0] * kv.shape[1] if layout else kv.shape[0]
    moved = rows * heads * (dim + v) * q.element_size() + kv_b.numel() * kv_b.element_size()
    return Cost(flop, moved + 4 * indices.numel() + key * min(pairs, slots))


def _invalid(
    q: Tensor, kv_b: Tensor, kv: Tensor, indices: Tensor, *, softmax_scale: float, layout: str = ""
) -> str | None:
    if layout and (reason := misfit(kv, layout, "latent")) is not None:
        return reason
    if q.dim() != 3 or kv_b.dim() != 3 or kv_b.shape[0] != q.shape[1]:
        return (
            f"q has shape {list(q.shape)}, kv_b {list(kv_b.shape)};"
            " expected [tokens, heads, nope + rope] and [heads, nope + v, lora]"
        )
    if q.dtype not in FLOATS.values() or kv_b.dtype not in FLOATS.values():
        return f"q is {q.dtype}, kv_b {kv_b.dtype}; expected bfloat16, float16 or float32"
    if not layout and (kv.dim() != 2 or kv.dtype != q.dtype):
        found = f"{kv.dtype} {list(kv.shape)}"
        return f"kv is {found}; without a layout expected {q.dtype} [context, lora + rope]"
    nope, rope, v = _sizes(q, kv_b, kv, layout)
    if min(nope, rope, v) < 1:
        return (
            f"q has {q.shape[2]} columns, kv_b {kv_b.shape[1]} rows of {kv_b.shape[2]};"
            f" with these keys nope would be {nope}, rope {rope}, v {v}"
        )
    if indices.dtype != torch.int32 or indices.dim() != 2 or indices.shape[0] != q.shape[0]:
        found = f"{indices.dtype} {list(indices.shape)}"
        return f"indices are {found}; expected int32 [{q.shape[0]}, k]"
    return None


def _asks(
    q: Tensor, kv_b: Tensor, kv: Tensor, indices: Tensor, *, softmax_scale: float, layout: str = ""
) -> Sequence[Call]:
    lora = kv_b.shape[2]
    options = dict(softmax_scale=softmax_scale, dim_v=lora)
    if not layout:
        absorbed = torch.empty(*q.shape[:2], kv.shape[1], dtype=q.dtype, device="meta")
        return [(sparse_mla, (absorbed, kv, indices), options)]
    width = KVLayout.parse(layout).width
    absorbed = torch.empty(q.shape[0], 1, q.shape[1], width, dtype=q.dtype, device="meta")
    return [(sparse_mla_paged, (absorbed, kv, indices[:, None]), options | {"layout": layout})]


_SMALL: dict[str, Any] = dict(nope=12, rope=8, v=10, lora=32)


@composite(
    version=1,
    uses=(sparse_mla, sparse_mla_paged),
    asks=_asks,
    constant=("heads", "k", "nope", "rope", "v", "lora", "dtype", "weight", "layout", "pattern",
              "page_size"),
    variable={"tokens": "q[0]", "context": "kv[0]"},
    inputs=_inputs,
    cases=(
        case("empty", tokens=0, context=64, heads=2, k=16, **_SMALL),
        case("one", tokens=1, context=1, heads=1, k=1, dtype="fp32", weight="fp32", **_SMALL),
        case("small", tokens=19, context=50, heads=3, k=21, dtype="fp32", weight="fp32", **_SMALL),
        case("rows", tokens=9, context=300, heads=8, k=64, traps=(5, 11)),
        case("fp32_weight", tokens=9, context=300, heads=8, k=64, weight="fp32"),
        case("no_key", tokens=5, context=90, heads=8, k=64, pattern="alternate"),
        case("pages", tokens=3, context=300, heads=8, k=64, layout="latent_fp8/512+64",
             traps=(10, 11)),
        case("bf16_pages", tokens=3, context=300, heads=8, k=64, layout="latent_bf16/512+64",
             page_size=3),
        case("split_pages", tokens=3, context=300, heads=8, k=64, page_size=128,
             layout="latent_bf16_split/512+64", traps=(10,)),
        case("int8_pages", tokens=3, context=300, heads=8, k=64, page_size=128,
             layout="latent_int8/512+64", traps=(10,)),
        case("prefill_32k", model=True, tokens=4096, context=32768, heads=128, k=2048),
        case("decode_b64", model=True, tokens=64, context=32768, heads=128, k=2048,
             layout="latent_fp8/512+64"),
    ),
    check=each(out=calc_diff(2e-5)),
    cost=_cost,
    invalid=_invalid,
)  # fmt: skip
def mla_attention(
    q: Tensor, kv_b: Tensor, kv: Tensor, indices: Tensor, *, softmax_scale: float, layout: str = ""
) -> Tensor:
    """Sparse multi-head latent attention of queries that are not absorbed yet.

    q        [tokens, heads, nope + rope] bf16, fp16 or fp32, rotated part last
    kv_b     [heads, nope + v, lora] any float: expands a latent to a head's key, then its value
    kv       layout "": [context, lora + rope], q's dtype, and indices are its rows; otherwise pages
             in `layout`, and indices are slots
    indices  [tokens, k] int32, -1 = no key; as in `sparse_mla`
    softmax_scale  multiplies q . k; no default, see SOFTMAX_SCALE
    -> out   [tokens, heads, v] q's dtype; 0 for a query without keys

    What goes between the three steps is rounded to q's dtype. rope and nope follow from the widths
    of a key and of q. Source: the decoding branch of the model's demo code.
    """
    nope, _, _ = _sizes(q, kv_b, kv, layout)
    lora, kind = kv_b.shape[2], kv_b.dtype
    into = torch.bmm(q[..., :nope].to(kind).transpose(0, 1), kv_b[:, :nope])
    absorbed = torch.cat([into.transpose(0, 1).to(q.dtype), q[..., nope:]], -1)
    if layout:
        paged, _ = sparse_mla_paged(
            absorbed[:, None], kv, indices[:, None],
            layout=layout, softmax_scale=softmax_scale, dim_v=lora,
        )  # fmt: skip
        latent = paged[:, 0]
    else:
        latent, _, _ = sparse_mla(absorbed, kv, indices, softmax_scale=softmax_scale, dim_v=lora)
    heads = torch.bmm(latent.transpose(0, 1).to(kind), kv_b[:, nope:].transpose(1, 2))
    return heads.transpose(0, 1).to(q.dtype)
