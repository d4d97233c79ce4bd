"""DeepGEMM on Hopper, behind the FP8 products and the indexer's scores.

It compiles a kernel at the first call of a shape, with nvcc; a graph is captured after that. Two
generations of its API differ in the paged scores alone: one length per request, or one per query.
"""

from functools import cache
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import pad

from dsa_hal.backends.portable.library import accepts, dense, imported, rows_dense
from dsa_hal.ops.gemm import fp8_gemm, grouped_fp8_gemm, grouped_fp8_gemm_masked
from dsa_hal.ops.indexer import indexer_logits, indexer_logits_paged
from dsa_hal.ops.layout import KVLayout

NEEDS = ("deep-gemm>=2.0 | sgl-deep-gemm>=0.1,<0.1.5",)
"""The fork's later wheels do not load, or fail their own assertions, beside torch 2.11."""

GROUP_ALIGN = 128
"""Rows at whose multiples a group starts in its contiguous layout; tiles of its masked layout are
as high at most, and are written whole."""

PAGE = 64
"""Tokens in a page of index keys."""

HEADS, DIMS = (32, 64), (32, 64, 128)
"""Index heads, and their sizes, for which it has kernels."""


@cache
def _generation() -> tuple[ModuleType, str] | str:
    """The module and "2025" or "2026", or why there is none."""
    module = imported("deep_gemm")
    if isinstance(module, str):
        return module
    if not hasattr(module, "fp8_gemm_nt"):
        return "this deep_gemm is older than 2.0; install one from July 2025 or later"
    newer = hasattr(module, "fp8_fp4_mqa_logits") or (
        hasattr(module, "fp8_paged_mqa_logits") and accepts(module.fp8_paged_mqa_logits, "indices")
    )
    return module, "2026" if newer else "2025"


def _module() -> ModuleType:
    """The library that `why_not` has found already."""
    found = _generation()
    if isinstance(found, str):
        raise ImportError(found)
    return found[0]


def _absent() -> str | None:
    found = _generation()
    return found if isinstance(found, str) else None


# -- products -----------------------------------------------------------------------------------


def _product_refused(b: Tensor, out_dtype: torch.dtype) -> str | None:
    n, k = b.shape[-2:]
    if out_dtype != torch.bfloat16:
        return f"out_dtype is {out_dtype}; DeepGEMM's Hopper kernel writes bfloat16"
    if k % 128 or not k:
        return f"k is {k}; the DeepGEMM adapter takes multiples of 128"
    return f"n is {n}; the DeepGEMM adapter takes multiples of 8" if n % 8 or not n else None


def _fp8_why_not(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> str | None:  # fmt: skip
    return _product_refused(b, out_dtype) or _absent()


@fp8_gemm.impl(
    "cuda", "deepgemm", contract=1, arch=("sm90",), needs=NEEDS, rank=-1, why_not=_fp8_why_not
)
def product(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fmt: skip
    """`fp8_gemm_nt`, which lays a's scales out anew at every call."""
    out = torch.empty(a.shape[0], b.shape[0], dtype=out_dtype, device=a.device)
    if a.shape[0]:
        _module().fp8_gemm_nt((dense(a), dense(a_scale)), (dense(b), dense(b_scale)), out)
    return out


def _contiguous_why_not(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, grouped_layout: Tensor, *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> str | None:  # fmt: skip
    return _product_refused(b, out_dtype) or _absent()


@grouped_fp8_gemm.impl(
    "cuda", "deepgemm", contract=1, arch=("sm90",), needs=NEEDS, rank=-1,
    why_not=_contiguous_why_not,
)  # fmt: skip
def contiguous(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, grouped_layout: Tensor, *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fmt: skip
    """`m_grouped_fp8_gemm_nt_contiguous` of rows moved to where it wants them: groups one behind
    the other, each from a multiple of 128 on. That costs a copy of `a` and of the result, since
    whether they stand so already is known to the device alone."""
    (m, k), (groups, n, _) = a.shape, b.shape
    if not m:
        return torch.empty(0, n, dtype=out_dtype, device=a.device)
    place, layout = _aligned(grouped_layout, groups)
    room, wide = layout.shape[0], torch.int64  # rows move as eight bytes at a time
    rows = torch.empty(room, k, dtype=a.dtype, device=a.device)
    rows.view(wide)[place] = dense(a).view(wide)
    scales = torch.ones(room, a_scale.shape[1], device=a.device)
    scales[place] = a_scale
    found = torch.empty(room + 1, n, dtype=out_dtype, device=a.device)
    found[room] = 0  # the row that padding gets
    _module().m_grouped_fp8_gemm_nt_contiguous(
        (rows, scales), (dense(b), dense(b_scale)), found[:room], layout
    )
    source = torch.where(grouped_layout < 0, room, place)
    return found.view(wide).index_select(0, source).view(out_dtype)


def _aligned(grouped_layout: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Where each row goes, [m] int64, and the group of each row there, with room enough for any
    layout of as many rows: -1 where nothing is. Padding rows go behind all groups."""
    m, device = grouped_layout.shape[0], grouped_layout.device
    kind = torch.where(grouped_layout < 0, groups, grouped_layout).long()
    counts = torch.zeros(groups + 1, dtype=torch.int64, device=device)
    counts.scatter_add_(0, kind, torch.ones_like(kind))
    ends = counts.add(GROUP_ALIGN - 1).div(GROUP_ALIGN, rounding_mode="floor").mul(GROUP_ALIGN)
    starts = ends.cumsum(0) - ends
    order = kind.argsort(stable=True)
    rank = torch.arange(m, device=device) - (counts.cumsum(0) - counts)[kind[order]]
    place = torch.empty_like(kind).scatter_(0, order, starts[kind[order]] + rank)
    room = (m + (groups + 1) * (GROUP_ALIGN - 1)) // GROUP_ALIGN * GROUP_ALIGN
    layout = torch.full((room,), -1, dtype=torch.int32, device=device)
    return place, layout.scatter_(0, place, grouped_layout)


def _masked_why_not(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, masked_m: Tensor, *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> str | None:  # fmt: skip
    return _product_refused(b, out_dtype) or _absent()


@grouped_fp8_gemm_masked.impl(
    "cuda", "deepgemm", contract=1, arch=("sm90",), needs=NEEDS, rank=-1, why_not=_masked_why_not
)
def masked(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, masked_m: Tensor, *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fmt: skip
    """`m_grouped_fp8_gemm_nt_masked`, and zeros written behind the counts. Groups of other heights
    than multiples of 128 are copied into such, or a tile would run into the next group."""
    module = _module()
    run = getattr(module, "m_grouped_fp8_gemm_nt_masked", None)
    run = run or module.fp8_m_grouped_gemm_nt_masked
    (groups, max_m, _), n = a.shape, b.shape[1]
    if not groups or not max_m:
        return torch.empty(groups, max_m, n, dtype=out_dtype, device=a.device)
    missing = (0, 0, 0, -max_m % GROUP_ALIGN)
    if missing[-1]:
        a, a_scale = pad(a.view(torch.uint8), missing).view(a.dtype), pad(a_scale, missing)
    out = torch.empty(groups, a.shape[1], n, dtype=out_dtype, device=a.device)
    run((dense(a), dense(a_scale)), (dense(b), dense(b_scale)), out, dense(masked_m), max_m)
    out = out[:, :max_m]
    beyond = torch.arange(max_m, device=a.device) >= masked_m[:, None]
    return out.masked_fill_(beyond[..., None], 0)


# -- the indexer's scores -----------------------------------------------------------------------


def _scores_refused(q: Tensor) -> str | None:
    heads, dim = q.shape[-2:]
    if q.dtype != torch.float8_e4m3fn:
        return f"q is {q.dtype}; DeepGEMM takes float8_e4m3fn"
    if heads not in HEADS or dim not in DIMS:
        return f"{heads} heads of {dim}; DeepGEMM on Hopper takes 32 or 64 heads of 32, 64 or 128"
    if (absent := _absent()) is not None:
        return absent
    if not hasattr(_module(), "fp8_mqa_logits"):
        return "this deep_gemm has no indexer; install one from October 2025 or later"
    return None


def _logits_why_not(
    q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, ks: Tensor, ke: Tensor
) -> str | None:
    return _scores_refused(q)


@indexer_logits.impl(
    "cuda", "deepgemm", contract=1, arch=("sm90",), needs=NEEDS, rank=-1, why_not=_logits_why_not
)
def scores(
    q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, ks: Tensor, ke: Tensor
) -> Tensor:
    """`fp8_mqa_logits` with clean logits: rows of the result lie apart."""
    tokens, context = q.shape[0], k.shape[0]
    if not tokens or not context:
        return torch.empty(tokens, context, device=q.device)
    found: Tensor = _module().fp8_mqa_logits(
        dense(q), (dense(k), dense(k_scale)), dense(weights), ks.clamp(0, context),
        ke.clamp(0, context), clean_logits=True,
    )  # fmt: skip
    return found


def _paged_why_not(
    q: Tensor, pages: Tensor, weights: Tensor, context_lens: Tensor, block_table: Tensor, *,
    layout: str, max_context_len: int,
) -> str | None:  # fmt: skip
    form = KVLayout.parse(layout)
    if form.order != "page" or form.codes != "fp8":
        return f"the cache is {layout}; DeepGEMM takes index_fp8"
    if pages.shape[1] != PAGE:
        return f"pages hold {pages.shape[1]} tokens; DeepGEMM on Hopper takes {PAGE}"
    if (refused := _scores_refused(q)) is not None:
        return refused
    found = _generation()
    if not isinstance(found, str) and found[1] == "2025" and q.shape[1] != 1:
        return f"next_n is {q.shape[1]}; this deep_gemm, of 2025, has one length for all of them"
    return None


@indexer_logits_paged.impl(
    "cuda", "deepgemm", contract=1, arch=("sm90",), needs=NEEDS, rank=-1, why_not=_paged_why_not
)
def paged_scores(
    q: Tensor, pages: Tensor, weights: Tensor, context_lens: Tensor, block_table: Tensor, *,
    layout: str, max_context_len: int,
) -> Tensor:  # fmt: skip
    """`fp8_paged_mqa_logits` with its schedule; it leaves garbage beyond the limits, so that a
    second pass over the result writes -inf there."""
    batch, next_n = q.shape[:2]
    if not batch or not next_n or not max_context_len:
        return torch.empty(batch * next_n, max_context_len, device=q.device)
    module = _module()
    limits = context_lens.clamp(0, max_context_len)
    lengths = limits.view(-1) if _generation()[1] == "2025" else limits.contiguous()
    schedule = module.get_paged_mqa_logits_metadata(lengths, PAGE, module.get_num_sms())
    found: Tensor = module.fp8_paged_mqa_logits(
        dense(q), pages[:, :, None], dense(weights), lengths, rows_dense(block_table), schedule,
        max_context_len, clean_logits=False,
    )  # fmt: skip
    position = torch.arange(max_context_len, device=q.device)
    return found.masked_fill_(position >= limits.reshape(-1, 1), -torch.inf)
