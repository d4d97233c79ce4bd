"""FlashMLA on Hopper, behind `sparse_mla` and `sparse_mla_paged`.

Three generations of its API are told apart by the arguments its functions take: that of 2025, whose
prefill has logarithms of base 2 and no sink; that of 2026; and the fork sgl-flash-mla, which keeps
the Hopper kernels behind `use_legacy`. Upstream of October 2026 and later has none for Hopper.

Not hidden, because FlashMLA takes 64 or 128 heads alone: other head counts are refused, not padded.
"""

import math
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from dsa_hal.backends.portable.library import accepts, dense, imported, rows_dense
from dsa_hal.ops.attention import sparse_mla, sparse_mla_paged

NEEDS = ("flash-mla>=1.0 | sgl-flash-mla>=1.0",)
PROMISES = ("deterministic", "lse=natural")

LAYOUT = "latent_fp8/512+64"
"""The one cache layout of its decoding on Hopper."""

PREFILL_K, DECODE_K = 128, 64
"""Selections are filled up with -1 to multiples of these, which its kernels insist on."""

PLANS = 64
"""Plans of decoding that are kept; one serves every call of its shapes."""


@cache
def _generation() -> tuple[ModuleType, str] | str:
    """The interface module and "2025", "2026" or "sgl", or why there is none for this device."""
    module = imported("flash_mla.flash_mla_interface")
    if isinstance(module, str):
        return module
    if accepts(module.flash_mla_sparse_fwd, "use_legacy"):
        return module, "sgl"
    if not accepts(module.flash_mla_sparse_fwd, "attn_sink"):
        return module, "2025"
    if accepts(module.flash_mla_with_kvcache, "enable_batch_invariant"):
        return "this flash_mla has no kernels for Hopper and its cache; sgl-flash-mla has"
    return module, "2026"


def _shape_refused(q: Tensor, dim_v: int) -> str | None:
    heads, dim = q.shape[-2:]
    if q.dtype != torch.bfloat16:
        return f"q is {q.dtype}; FlashMLA takes bfloat16"
    if heads not in (64, 128):
        return f"{heads} heads; FlashMLA on Hopper takes 64 or 128"
    if dim_v != 512:
        return f"dim_v is {dim_v}; FlashMLA takes 512"
    return None if dim in (512, 576) else f"dim is {dim}; FlashMLA takes 576 or 512"


def _filled(indices: Tensor, topk_length: Tensor | None, keys: int, multiple: int) -> Tensor:
    """`indices` [..., k] as FlashMLA may read them: nothing behind the lengths, no address outside
    the `keys`, which its decoding would follow, and k a multiple of `multiple`."""
    indices = indices.clamp(-1, keys - 1)
    if topk_length is not None:
        column = torch.arange(indices.shape[-1], device=indices.device)
        indices = torch.where(column < topk_length[..., None], indices, -1)
    missing = -indices.shape[-1] % multiple
    return pad(indices, (0, missing), value=-1) if missing else indices


def _sunk(out: Tensor, lse: Tensor, attn_sink: Tensor) -> Tensor:
    """`out` [..., heads, dim_v] less the sink's share, for the generation that knows of none; an
    empty row's out is 0 already."""
    kept = torch.sigmoid(lse - attn_sink)
    return (out.float() * kept.nan_to_num(0.0)[..., None]).to(out.dtype)


# -- sparse_mla ---------------------------------------------------------------------------------


def _prefill_why_not(
    q: Tensor, kv: Tensor, indices: Tensor, *, softmax_scale: float, dim_v: int = 512,
    attn_sink: Tensor | None = None, topk_length: Tensor | None = None,
) -> str | None:  # fmt: skip
    if (refused := _shape_refused(q, dim_v)) is not None:
        return refused
    found = _generation()
    if isinstance(found, str):
        return found
    if found[1] == "2025" and q.shape[-1] != 576:
        return f"dim is {q.shape[-1]}; this flash_mla, of 2025, takes 576"
    return None


@sparse_mla.impl(
    "cuda", "flashmla", contract=1, arch=("sm90",), needs=NEEDS, rank=20, promises=PROMISES,
    why_not=_prefill_why_not,
)  # fmt: skip
def prefill(
    q: Tensor, kv: Tensor, indices: Tensor, *, softmax_scale: float, dim_v: int = 512,
    attn_sink: Tensor | None = None, topk_length: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`flash_mla_sparse_fwd`."""
    tokens, heads, _ = q.shape
    if not tokens or not kv.shape[0]:
        nothing = q.new_full((tokens, heads), -torch.inf, dtype=torch.float32)
        return q.new_zeros(tokens, heads, dim_v), nothing, -nothing
    module, generation = _found()
    ids = _filled(indices, topk_length, kv.shape[0], PREFILL_K)[:, None]
    q, kv = rows_dense(q), rows_dense(kv)
    attn_sink = None if attn_sink is None else dense(attn_sink)
    if generation == "2025":
        out, top, lse = module.flash_mla_sparse_fwd(q, kv[:, None], ids, softmax_scale, dim_v)
        top, lse = top * math.log(2), lse * math.log(2)
        lse = lse.masked_fill(lse == -torch.inf, torch.inf)
        return out if attn_sink is None else _sunk(out, lse, attn_sink), top, lse
    legacy = {"use_legacy": True} if generation == "sgl" else {}
    # Lengths are in `ids` as well: garbage behind them is not even looked at.
    lengths = None if topk_length is None else dense(topk_length)
    out, top, lse = module.flash_mla_sparse_fwd(
        q, kv[:, None], ids, softmax_scale, dim_v, attn_sink, lengths, **legacy
    )
    return out, top, lse


# -- sparse_mla_paged ---------------------------------------------------------------------------


def _decode_why_not(
    q: Tensor, pages: Tensor, indices: Tensor, *, layout: str, softmax_scale: float,
    dim_v: int = 512, attn_sink: Tensor | None = None, topk_length: Tensor | None = None,
    schedule: Tensor | None = None, num_splits: Tensor | None = None,
) -> str | None:  # fmt: skip
    if layout != LAYOUT:
        return f"the cache is {layout}; FlashMLA decodes {LAYOUT} on Hopper"
    if (refused := _shape_refused(q, dim_v)) is not None:
        return refused
    found = _generation()
    if isinstance(found, str):
        return found
    if found[1] == "2025" and pages.shape[1] != 64:
        return f"pages hold {pages.shape[1]} tokens; this flash_mla, of 2025, takes 64"
    return None


@sparse_mla_paged.impl(
    "cuda", "flashmla", contract=1, arch=("sm90",), needs=NEEDS, rank=20, promises=PROMISES,
    why_not=_decode_why_not,
)  # fmt: skip
def decode(
    q: Tensor, pages: Tensor, indices: Tensor, *, layout: str, softmax_scale: float,
    dim_v: int = 512, attn_sink: Tensor | None = None, topk_length: Tensor | None = None,
    schedule: Tensor | None = None, num_splits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`flash_mla_with_kvcache`, with a plan of its own."""
    batch, next_n, heads, _ = q.shape
    slots = pages.shape[0] * pages.shape[1]
    if not q.numel() or not slots:
        lse = q.new_full((batch, heads, next_n), torch.inf, dtype=torch.float32)
        return q.new_zeros(batch, next_n, heads, dim_v), lse
    module, generation = _found()
    ids = _filled(indices, topk_length, slots, DECODE_K)
    cache_ = pages.view(torch.float8_e4m3fn)[:, :, None]
    q, attn_sink = rows_dense(q), None if attn_sink is None else dense(attn_sink)
    common: dict[str, Any] = dict(softmax_scale=softmax_scale, is_fp8_kvcache=True, indices=ids)
    if generation == "2025":
        out, lse = _decode_2025(module, q, cache_, dim_v, common)
        if attn_sink is not None:
            out = _sunk(out, lse.transpose(1, 2), attn_sink)
        return out, lse
    if generation == "sgl":
        common["use_legacy"] = True
    plan = _plan(module, (batch, next_n, heads, ids.shape[-1], pages.shape[1], str(q.device)))
    out, lse = module.flash_mla_with_kvcache(
        q, cache_, None, None, dim_v, plan, attn_sink=attn_sink, **common
    )
    return out, lse


def _decode_2025(
    module: ModuleType, q: Tensor, cache_: Tensor, dim_v: int, common: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """It wants lengths and a block table, which mean nothing beside `indices`."""
    batch, next_n, heads, _ = q.shape
    k = common["indices"].shape[-1]
    lengths = torch.full((batch,), k, dtype=torch.int32, device=q.device)
    table = torch.zeros(batch, 1, dtype=torch.int32, device=q.device)
    plan, splits = module.get_mla_metadata(lengths, next_n * heads, 1, heads, True, k)
    out, lse = module.flash_mla_with_kvcache(
        q, cache_, table, lengths, dim_v, plan, splits, **common
    )
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    return out, lse


_plans: dict[tuple[Any, ...], Any] = {}


def _plan(module: ModuleType, shapes: tuple[Any, ...]) -> Any:
    """The plan for calls of these shapes, which the first call fills in. It depends on nothing
    else, since lengths are never passed. Streams do not share plans. While a graph is captured a
    call makes its own, for a kept one could be gone when the graph is replayed."""
    if torch.cuda.is_current_stream_capturing():
        return module.get_mla_metadata()[0]
    key = (*shapes, torch.cuda.current_stream().cuda_stream)
    if key not in _plans:
        if len(_plans) >= PLANS:
            _plans.clear()
        _plans[key] = module.get_mla_metadata()[0]
    return _plans[key]


def _found() -> tuple[ModuleType, str]:
    """The library that `why_not` has found already."""
    found = _generation()
    if isinstance(found, str):
        raise ImportError(found)
    return found
