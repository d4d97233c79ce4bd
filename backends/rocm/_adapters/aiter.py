"""AITER, AMD's kernel library, behind the indexer's scores, their selection and FP8 products.

Never run on a device: written from AITER's sources at commit e4048607a535 of August 2026, and
tested beside a stand-in that has their signatures and habits. So it ranks below our own kernels;
naming it (DSA_HAL_IMPL) or a measurement (`dsa-hal tune`) brings it in. The files read:

    aiter/ops/triton/attention/fp8_mqa_logits.py     fp8_mqa_logits
    aiter/ops/triton/attention/pa_mqa_logits.py      deepgemm_fp8_paged_mqa_logits
    aiter/ops/triton/gluon/pa_mqa_logits.py          its kernels, for what they read and mask
    aiter/ops/topk.py, csrc/kernels/topk_per_row_kernels.cu   top_k_per_row_prefill
    aiter/ops/gemm_op_a8w8.py                        gemm_a8w8_blockscale
    aiter/ops/shuffle.py, csrc/kernels/cache_kernels.cu       the tiled keys

Not adapted, since their contracts are others: `unified_attention_sparse_mla` gives no LSE;
`mla_decode_fwd` takes lists of keys without holes, and which heads its assembly has, no source
says; `indexer_k_quant_and_cache` rounds scales by log2 in fp32, ours are exact; `rms_norm` takes
weights of the input's dtype, which the model's are not; `fused_moe` takes shuffled weights.
"""

from types import ModuleType

import torch
from torch import Tensor

from dsa_hal.backends.portable.library import accepts, dense, imported
from dsa_hal.errors import BadInput
from dsa_hal.ops.gemm import fp8_gemm
from dsa_hal.ops.indexer import indexer_logits, indexer_logits_paged
from dsa_hal.ops.layout import KVLayout
from dsa_hal.ops.select import topk

NEEDS = ("amd-aiter>=0.1.9 | aiter>=0.1.9",)

CHUNK = 256
"""Keys that a program of the paged scores takes at once; a page divides it or is made of it."""

ROW_HEADS, ROW_DIMS = (16, 32, 64, 128), (32, 64, 128, 256)
PAGED_HEADS, PAGED_DIM = (32, 64, 128), 128
"""Heads that its tiles of queries are made of: each of 256 threads loads 16 elements of some."""


def _module(name: str) -> ModuleType:
    """A module that `why_not` has found already."""
    found = imported(name)
    if isinstance(found, str):
        raise ImportError(found)
    return found


def _absent(name: str) -> str | None:
    found = imported(name)
    return found if isinstance(found, str) else None


# -- the indexer's scores -----------------------------------------------------------------------

RAGGED, PAGED = (
    "aiter.ops.triton.attention.fp8_mqa_logits",
    "aiter.ops.triton.attention.pa_mqa_logits",
)


def _logits_why_not(
    q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, ks: Tensor, ke: Tensor
) -> str | None:
    heads, dim = q.shape[-2:]
    if q.dtype != torch.float8_e4m3fn:
        return f"q is {q.dtype}; AITER takes float8_e4m3fn"
    if heads not in ROW_HEADS or dim not in ROW_DIMS:
        return f"{heads} heads of {dim}; AITER takes 16 to 128 heads of 32 to 256, powers of two"
    return _absent(RAGGED)


@indexer_logits.impl(
    "rocm", "aiter", contract=1, arch=("gfx950", "gfx942"), needs=NEEDS, rank=-1,
    why_not=_logits_why_not,
)  # fmt: skip
def scores(
    q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, ks: Tensor, ke: Tensor
) -> Tensor:
    """`fp8_mqa_logits`, clean. On gfx942 it halves the codes into that FP8 dialect itself, which is
    exact."""
    tokens, context = q.shape[0], k.shape[0]
    if not tokens or not context:
        return torch.empty(tokens, context, device=q.device)
    first = ks.clamp(0, context)
    found: Tensor = _module(RAGGED).fp8_mqa_logits(
        dense(q), dense(k), dense(k_scale), dense(weights), first,
        torch.maximum(ke.clamp(0, context), first), clean_logits=True,
    )  # fmt: skip
    return found


def _paged_why_not(
    q: Tensor, pages: Tensor, weights: Tensor, context_lens: Tensor, block_table: Tensor, *,
    layout: str, max_context_len: int,
) -> str | None:  # fmt: skip
    form, size = KVLayout.parse(layout), pages.shape[1]
    order = form.order
    heads, dim = q.shape[2:]
    if order not in ("page", "tile") or form.codes != "fp8":
        return f"the cache is {layout}; AITER takes index_fp8 and index_fp8_tiled"
    if order == "page" and size != 1:
        return f"pages hold {size} tokens; AITER takes 1, or keys in squares: index_fp8_tiled/{dim}"
    if CHUNK % size and size % CHUNK:
        return f"pages hold {size} tokens; AITER takes divisors and multiples of {CHUNK}"
    if heads not in PAGED_HEADS or dim != PAGED_DIM:
        return f"{heads} heads of {dim}; AITER takes 32, 64 or 128 heads of {PAGED_DIM}"
    return _absent(PAGED)


@indexer_logits_paged.impl(
    "rocm", "aiter", contract=1, arch=("gfx950",), needs=NEEDS, rank=-1,
    promises=("deterministic", "keys=tiled"), why_not=_paged_why_not,
)  # fmt: skip
def paged_scores(
    q: Tensor, pages: Tensor, weights: Tensor, context_lens: Tensor, block_table: Tensor, *,
    layout: str, max_context_len: int,
) -> Tensor:  # fmt: skip
    """`deepgemm_fp8_paged_mqa_logits`, each query as a request of its own, since it has one length
    per request. It writes below the length alone, and may look at a page behind it: the table names
    page 0 there. It reads codes in its device's dialect, so that gfx942 would halve them."""
    batch, next_n, heads, dim = q.shape
    rows, size = batch * next_n, pages.shape[1]
    out = torch.full((rows, max_context_len), -torch.inf, device=q.device)
    if not out.numel():
        return out
    form = KVLayout.parse(layout)
    if (wrong := form.why_not(pages)) is not None:
        raise BadInput(wrong)
    if not pages.is_contiguous():
        raise BadInput(
            f"pages have strides {list(pages.stride())}; AITER takes a pool without gaps, whose"
            f" pages start every {size * form.record} bytes"
        )
    lengths = context_lens.clamp(0, max_context_len).reshape(rows)
    table = block_table.repeat_interleave(next_n, 0)
    first = torch.arange(table.shape[1], device=q.device) * size
    table = table.masked_fill(first >= lengths[:, None], 0)
    _module(PAGED).deepgemm_fp8_paged_mqa_logits(
        dense(q).view(rows, 1, heads, dim), pages[:, :, None], dense(weights), out, lengths, table,
        max_context_len, Preshuffle=form.order == "tile", KVBlockSize=size, ChunkK=CHUNK,
    )  # fmt: skip
    return out


# -- their selection ----------------------------------------------------------------------------

SELECT = "aiter.ops.topk"


def _topk_why_not(
    logits: Tensor, k: int, starts: Tensor | None = None, ends: Tensor | None = None, *,
    ties: str = "any",
) -> str | None:  # fmt: skip
    if (absent := _absent(SELECT)) is not None:
        return absent
    if not accepts(_module(SELECT).top_k_per_row_prefill, "stable"):
        return (
            "this aiter has no rule for ties; install one whose top_k_per_row_prefill has stable="
        )
    return None


@topk.impl(
    "rocm", "aiter", contract=1, arch=("gfx950", "gfx942"), needs=NEEDS, rank=-1,
    promises=("deterministic", "ties=lower"), why_not=_topk_why_not,
)  # fmt: skip
def best(
    logits: Tensor, k: int, starts: Tensor | None = None, ends: Tensor | None = None, *,
    ties: str = "any",
) -> Tensor:  # fmt: skip
    """`top_k_per_row_prefill`, stable whatever rule is asked for: lower columns of equal scores, in
    ascending order. It ranks NaN as a number, -0.0 below 0.0, and selects -inf where a row has
    nothing better: a copy of the scores holds none of the first two, and what is -inf leaves the
    result after."""
    rows, n = logits.shape
    out = torch.full((rows, k), -1, dtype=torch.int32, device=logits.device)
    if not rows or not n:
        return out
    scores = logits.float().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    scores = dense(scores + 0.0)
    first = out.new_zeros(rows) if starts is None else starts.clamp(0, n)
    last = out.new_full((rows,), n) if ends is None else ends.clamp(0, n)
    _module(SELECT).top_k_per_row_prefill(
        scores, dense(first), dense(torch.maximum(last, first)), out, None, rows, scores.stride(0),
        1, k=k, stable=True,
    )  # fmt: skip
    kept = (out >= 0) & (scores.gather(1, out.clamp_min(0).long()) > -torch.inf)
    place = torch.where(kept, kept.cumsum(1) - 1, k)
    front = out.new_full((rows, k + 1), -1)
    return front.scatter_(1, place, out)[:, :k]


# -- products -----------------------------------------------------------------------------------

PRODUCT = "aiter.ops.gemm_op_a8w8"


def _fp8_why_not(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> str | None:  # fmt: skip
    n, k = b.shape
    if out_dtype not in (torch.bfloat16, torch.float16):
        return f"out_dtype is {out_dtype}; AITER writes bfloat16 or float16"
    if n % 128 or k % 128 or not n or not k:
        return f"n is {n} and k is {k}; the AITER adapter takes multiples of 128"
    return _absent(PRODUCT)


@fp8_gemm.impl(
    "rocm", "aiter", contract=1, arch=("gfx950",), needs=NEEDS, rank=-1, promises=(),
    why_not=_fp8_why_not,
)  # fmt: skip
def product(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fmt: skip
    """`gemm_a8w8_blockscale` of weights that are not shuffled. Its own table of shapes may split k
    and add up in no certain order."""
    if not a.shape[0]:
        return torch.empty(0, b.shape[0], dtype=out_dtype, device=a.device)
    found: Tensor = _module(PRODUCT).gemm_a8w8_blockscale(
        dense(a), dense(b), dense(a_scale), dense(b_scale), dtype=out_dtype
    )
    return found
