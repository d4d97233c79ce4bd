"""The lightning indexer's scores: which cached tokens a query token should attend to.

score[t, s] = k_scale[s] * sum over heads h of ReLU(<q[t, h], k[s]>) * weights[t, h]. The ReLU comes
before the signed weight, so scores may be negative and may tie at exactly 0. All constants, and the
queries' own scales, are already in `weights`: both scales are positive, so they pass the ReLU.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dsa_hal.case import Cost, Inputs, Maker, case
from dsa_hal.check import calc_diff, each
from dsa_hal.ops.layout import KVLayout, misfit, untiled
from dsa_hal.ops.quant import blocks
from dsa_hal.ops.select import in_range, to_slots
from dsa_hal.registry import op

KINDS = {
    "fp8": torch.float8_e4m3fn, "int8": torch.int8, "bf16": torch.bfloat16, "fp32": torch.float32,
}  # fmt: skip
"""Stored key types by the name that layouts use; queries have the same type."""


def coded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers of deviation 1 as values of a stored type; as codes where it is int8."""
    return (x * 40).round().clamp(-127, 127).to(dtype) if dtype == torch.int8 else x.to(dtype)


def _queries_and_weights(
    make: Maker, shape: tuple[int, ...], dtype: torch.dtype, values: str
) -> tuple[Tensor, Tensor]:
    """q [*shape] and weights [rows, heads]; "plateau": most rows point away from every key."""
    q = make.randn(*shape)
    if values == "plateau":
        q = -q.abs()
        q[::3] *= -1
    return coded(q, dtype), make.randn(q[..., 0, 0].numel(), shape[-2], scale=0.02)


def _keys(make: Maker, shape: tuple[int, ...], dtype: torch.dtype, values: str) -> Tensor:
    k = make.randn(*shape)
    return coded(k.abs() if values == "plateau" else k, dtype)


def _types_wrong(q: Tensor, key: torch.dtype, where: str) -> str | None:
    if q.dtype not in (*KINDS.values(), torch.float16):
        return f"q is {q.dtype}; expected float8_e4m3fn, int8 or a floating-point type"
    return f"q is {q.dtype}, {where} {key}; both must be of one type" if q.dtype != key else None


def _first_wrong(expected: Sequence[tuple[str, Tensor, torch.dtype, list[int]]]) -> str | None:
    """The sentence on the first of (name, tensor, dtype, shape) that is not what it should be."""
    for name, t, dtype, shape in expected:
        if t.dtype != dtype or list(t.shape) != shape:
            return f"{name} is {t.dtype} {list(t.shape)}; expected {dtype} {shape}"
    return None


def _weighted(q: Tensor, k: Tensor, weights: Tensor) -> Tensor:
    """sum over heads of ReLU(<q, k>) * weights: [rows, heads, dim], [keys, dim], [rows, heads] ->
    [rows, keys] fp32. A head at a time, so that no [rows, keys, heads] exists."""
    q, k = q.float(), k.float()
    total = torch.zeros(q.shape[0], k.shape[0], device=q.device)
    for head in range(q.shape[1]):
        total += (q[:, head] @ k.T).relu() * weights[:, head, None]
    return total


# -- indexer_logits -----------------------------------------------------------------------------


def _spans(make: Maker, ranges: str, tokens: int, context: int) -> list[tuple[int, int]]:
    """A key range per query token."""
    spans = []
    for token in range(tokens):
        start = make.pick.randint(0, context)
        request = make.pick.randint(0, max(0, token // 8)) * 8 % max(1, context)
        spans.append({
            "full": (0, context),
            "causal": (0, max(0, context - tokens + token + 1)),
            "ragged": (start, start if token % 3 == 0 else make.pick.randint(start, context)),
            "requests": (request, min(context, request + 1 + token)),
            "empty": (start, start),
            "beyond": (start // 2, context + 9),
        }[ranges])  # fmt: skip
    return spans


def ragged_inputs(
    make: Maker, *, tokens: int, context: int, heads: int = 64, dim: int = 128, kind: str = "fp8",
    ranges: str = "causal", values: str = "plain",
) -> Inputs:  # fmt: skip
    q, weights = _queries_and_weights(make, (tokens, heads, dim), KINDS[kind], values)
    k = _keys(make, (context, dim), KINDS[kind], values)
    k_scale = make.randn(context).abs() + 0.01
    if kind not in ("fp8", "int8"):
        k_scale = torch.ones_like(k_scale)
    spans = _spans(make, ranges, tokens, context)
    return dict(
        q=q, k=k, k_scale=k_scale, weights=weights,
        ks=make.tensor([start for start, _ in spans]), ke=make.tensor([end for _, end in spans]),
    )  # fmt: skip


def _pairs(ks: Tensor, ke: Tensor, tokens: int, context: int) -> float:
    """Query-key pairs that count; on meta tensors, all."""
    if ks.is_meta:
        return float(tokens * context)
    return float((ke.clamp(0, context) - ks.clamp(0, context)).clamp_min(0).double().sum())


def ragged_cost(
    q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, ks: Tensor, ke: Tensor
) -> Cost:
    tokens, heads, dim = q.shape
    pairs = _pairs(ks, ke, tokens, k.shape[0])
    read = (q.numel() + k.numel()) * q.element_size() + 4 * (k_scale.numel() + weights.numel())
    return Cost(2.0 * pairs * heads * dim, read + 4.0 * tokens * k.shape[0])


def ragged_invalid(
    q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, ks: Tensor, ke: Tensor
) -> str | None:
    if q.dim() != 3 or k.dim() != 2 or q.shape[2] != k.shape[1]:
        return (
            f"q has shape {list(q.shape)}, k {list(k.shape)};"
            " expected [tokens, heads, dim] and [context, dim]"
        )
    tokens, heads, _ = q.shape
    return _types_wrong(q, k.dtype, "k") or _first_wrong((
        ("k_scale", k_scale, torch.float32, [k.shape[0]]),
        ("weights", weights, torch.float32, [tokens, heads]),
        ("ks", ks, torch.int32, [tokens]),
        ("ke", ke, torch.int32, [tokens]),
    ))  # fmt: skip


def ragged_unread(
    q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, ks: Tensor, ke: Tensor
) -> dict[str, Tensor]:
    unread = ~in_range(ks, ke, k.shape[0], k.device).any(0)
    nobody = ks.clamp_min(0) >= ke.clamp_max(k.shape[0])
    return {
        "k": unread[:, None].expand(k.shape),
        "k_scale": unread,
        "q": nobody[:, None, None].expand(q.shape),
        "weights": nobody[:, None].expand(weights.shape),
    }


@op(
    version=1,
    constant=("heads", "dim", "kind", "ranges", "values"),
    variable={"tokens": "q[0]", "context": "k[0]"},
    inputs=ragged_inputs,
    cases=(
        case("no_tokens", tokens=0, context=64),
        case("no_keys", tokens=3, context=0),
        case("one", tokens=1, context=1, heads=8, dim=64),
        case("odd", tokens=5, context=63, heads=32, traps=(3, 4)),
        case("rows_65", tokens=65, context=65, traps=(15,)),
        case("head64", tokens=9, context=200, heads=8, dim=64, ranges="full"),
        case("bf16", tokens=17, context=130, heads=32, kind="bf16", ranges="ragged"),
        case("fp32", tokens=17, context=130, heads=8, kind="fp32", ranges="ragged"),
        case("int8", tokens=17, context=130, heads=32, kind="int8", ranges="ragged"),
        case("ragged", tokens=40, context=333, ranges="ragged", traps=(15, 21)),
        case("requests", tokens=70, context=500, heads=32, ranges="requests", traps=(15, 21)),
        case("empty", tokens=6, context=90, ranges="empty", traps=(21,)),
        case("beyond", tokens=6, context=90, ranges="beyond", traps=(21,)),
        case("plateau", tokens=12, context=300, values="plateau", traps=(3,)),
        case("short", model=True, tokens=64, context=8192),
        case("decode_128k", model=True, tokens=2, context=131072),
        case("prefill_8k", model=True, tokens=2048, context=8192),
        case("prefill_32k", model=True, tokens=2048, context=32768),
        case("prefill_128k", model=True, tokens=1024, context=131072),
    ),
    check=each(out=calc_diff(5e-6)),
    cost=ragged_cost,
    invalid=ragged_invalid,
    unread=ragged_unread,
)
def indexer_logits(
    q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, ks: Tensor, ke: Tensor
) -> Tensor:
    """Scores of every query token against the keys of its range.

    q        [tokens, heads, dim] e4m3 or int8, without its scale, or bf16, fp16, fp32
    k        [context, dim] of q's dtype
    k_scale  [context] fp32, positive; ones for keys that are not quantised
    weights  [tokens, heads] fp32, signed; head weight * q scale * heads^-0.5 * dim^-0.5
    ks, ke   [tokens] int32, each row's keys [ks, ke), clipped to [0, context); may be empty
    -> out   [tokens, context] fp32; -inf outside the range, where keys are not read

    Source: DeepGEMM's `fp8_mqa_logits` with clean logits; the paper, section 2.1.
    """
    logits = _weighted(q, k, weights) * k_scale
    return torch.where(in_range(ks, ke, k.shape[0], k.device), logits, -torch.inf)


# -- indexer_logits_paged -----------------------------------------------------------------------


def paged_inputs(
    make: Maker, *, batch: int, next_n: int, context: int, heads: int = 64, dim: int = 128,
    kind: str = "fp8", page_size: int = 64, lengths: str = "ragged", values: str = "plain",
) -> Inputs:  # fmt: skip
    layout = KVLayout.parse(f"index_{kind}/{dim}")
    q, weights = _queries_and_weights(
        make, (batch, next_n, heads, dim), layout.parts[0].dtype, values
    )
    per_request = blocks(context, page_size)
    spare = 3
    table = make.permutation(batch * per_request + spare)[: batch * per_request]
    keys = _keys(make, (batch * per_request + spare, page_size, dim), torch.float32, values)
    pages = layout.empty(batch * per_request + spare, page_size, make.device)
    for name, part in layout.encode(keys, pow2=True).items():
        layout.views(pages)[name].copy_(part)
    limits = []
    for request in range(batch):
        length = context if lengths == "full" else make.pick.randint(0, context)
        length = 0 if lengths == "ragged" and request % 4 == 1 else length
        limits.append([max(0, length - next_n + 1 + query) for query in range(next_n)])
    return dict(
        q=q, pages=pages, weights=weights,
        context_lens=make.tensor(limits).view(batch, next_n),
        block_table=table.view(batch, per_request), layout=layout.spec, max_context_len=context,
    )  # fmt: skip


def paged_cost(
    q: Tensor, pages: Tensor, weights: Tensor, context_lens: Tensor, block_table: Tensor, *,
    layout: str, max_context_len: int,
) -> Cost:  # fmt: skip
    batch, next_n, heads, dim = q.shape
    rows = batch * next_n
    if q.is_meta:
        pairs, keys = float(rows * max_context_len), float(batch * max_context_len)
    else:
        pairs = float(context_lens.double().sum())
        keys = float(context_lens.amax(1).double().sum()) if rows else 0.0
    read = q.numel() * q.element_size() + keys * KVLayout.parse(layout).token_bytes
    moved = read + 4 * (weights.numel() + block_table.numel()) + 4.0 * rows * max_context_len
    return Cost(2.0 * pairs * heads * dim, moved)


def paged_invalid(
    q: Tensor, pages: Tensor, weights: Tensor, context_lens: Tensor, block_table: Tensor, *,
    layout: str, max_context_len: int,
) -> str | None:  # fmt: skip
    if (wrong := misfit(pages, layout, "index", tiles=True)) is not None:
        return wrong
    known = KVLayout.parse(layout)
    if q.dim() != 4 or q.shape[3] != known.width:
        return f"q has shape {list(q.shape)}; expected [batch, next_n, heads, {known.width}]"
    batch, next_n, heads, _ = q.shape
    wrong = _types_wrong(q, known.parts[0].dtype, f"layout {layout} holds") or _first_wrong((
        ("weights", weights, torch.float32, [batch * next_n, heads]),
        ("context_lens", context_lens, torch.int32, [batch, next_n]),
        ("block_table", block_table, torch.int32, [batch, *block_table.shape[1:2]]),
    ))  # fmt: skip
    if wrong is not None:
        return wrong
    room = block_table.shape[1] * pages.shape[1]
    if max_context_len > room or max_context_len < 0:
        return (
            f"max_context_len is {max_context_len}; block_table has {block_table.shape[1]} pages of"
            f" {pages.shape[1]} per request, which hold 0 to {room}"
        )
    return None


def _paged_requests(
    q: Tensor, pages: Tensor, weights: Tensor, context_lens: Tensor, block_table: Tensor, *,
    layout: str, max_context_len: int,
) -> frozenset[str]:  # fmt: skip
    tiles = KVLayout.parse(layout).order == "tile"
    return frozenset({"keys=tiled"}) if tiles else frozenset()


def paged_unread(
    q: Tensor, pages: Tensor, weights: Tensor, context_lens: Tensor, block_table: Tensor, *,
    layout: str, max_context_len: int,
) -> dict[str, Tensor]:  # fmt: skip
    page_size = pages.shape[1]
    max_pages = block_table.shape[1]
    limit = context_lens.amax(1, keepdim=True).clamp(0, max_context_len)
    position = torch.arange(max_pages * page_size, device=q.device)
    positions = torch.where(position < limit, position, -1).to(torch.int32)
    slots = to_slots.reference(positions, block_table, page_size=page_size)
    read = torch.zeros(pages.shape[0] * page_size, dtype=torch.bool, device=q.device)
    read[slots[slots >= 0].long()] = True
    entries = torch.arange(max_pages, device=q.device) * page_size >= limit
    nobody = (context_lens <= 0).flatten()
    return {
        "pages": ~KVLayout.parse(layout).mask(pages, read.view(-1, page_size)),
        "block_table": entries,
        "q": nobody.view(*context_lens.shape, 1, 1).expand(q.shape),
        "weights": nobody[:, None].expand(weights.shape),
    }


@op(
    version=1,
    constant=("heads", "dim", "next_n", "kind", "page_size", "lengths", "values"),
    variable={"batch": "q[0]", "context": "max_context_len"},
    inputs=paged_inputs,
    cases=(
        case("no_batch", batch=0, next_n=1, context=64),
        case("no_context", batch=2, next_n=1, context=0),
        case("one", batch=1, next_n=1, context=1, heads=8, dim=64, lengths="full"),
        case("page64", batch=3, next_n=1, context=200, traps=(10, 21)),
        case("page1", batch=2, next_n=2, context=63, heads=32, page_size=1, traps=(10,)),
        case("page3", batch=5, next_n=3, context=65, heads=8, page_size=3),
        case("page16", batch=2, next_n=6, context=100, heads=32, page_size=16, lengths="full"),
        case("page128", batch=3, next_n=2, context=300, heads=64, page_size=128, traps=(10,)),
        case("bf16", batch=5, next_n=2, context=129, heads=32, kind="bf16"),
        case("fp32", batch=3, next_n=1, context=129, heads=8, dim=64, kind="fp32", page_size=16),
        case("int8", batch=3, next_n=2, context=129, heads=32, kind="int8"),
        case(
            "int8_split",
            batch=3,
            next_n=1,
            context=300,
            heads=8,
            kind="int8_split",
            page_size=128,
            traps=(10,),
        ),
        case("plateau", batch=4, next_n=2, context=190, values="plateau", lengths="full"),
        case("batch_8k", model=True, batch=8, next_n=1, context=8192),
        case("decode_8k", model=True, batch=128, next_n=1, context=8192, lengths="full"),
        case("decode_32k", model=True, batch=64, next_n=1, context=32768, lengths="full"),
        case("mtp_32k", model=True, batch=64, next_n=2, context=32768, lengths="full"),
        case("decode_128k", model=True, batch=64, next_n=1, context=131072, lengths="full"),
    ),
    check=each(out=calc_diff(5e-6)),
    cost=paged_cost,
    invalid=paged_invalid,
    requests=_paged_requests,
    unread=paged_unread,
)
def indexer_logits_paged(
    q: Tensor, pages: Tensor, weights: Tensor, context_lens: Tensor, block_table: Tensor, *,
    layout: str, max_context_len: int,
) -> Tensor:  # fmt: skip
    """Scores of the query tokens of each request against its cached keys.

    q                [batch, next_n, heads, dim] of the stored keys' dtype, without its scale
    pages            [pages, page_size, record] index keys in `layout` (KVLayout); tile order asks
                     for an implementation that promises keys=tiled
    weights          [batch * next_n, heads] fp32, signed, with q's scale and the constants in it
    context_lens     [batch, next_n] int32: a query token sees the positions below its own limit, at
                     most max_context_len; 0 = none
    block_table      [batch, max_pages] int32 pages of each request; only those below the limits are
                     read
    max_context_len  columns of the result
    -> out           [batch * next_n, max_context_len] fp32 by position in the request; -inf at and
                     beyond the limit

    Source: DeepGEMM's `fp8_paged_mqa_logits` with one limit per query token.
    """
    batch, next_n = q.shape[:2]
    known = KVLayout.parse(layout)
    if known.order == "tile":
        pages, known = untiled(pages, known), known.rows
    parts = {name: part.flatten(0, 1) for name, part in known.views(pages).items()}
    limits = context_lens.clamp(0, max_context_len)
    position = torch.arange(max_context_len, device=q.device, dtype=torch.int32)
    out = torch.empty(batch, next_n, max_context_len, device=q.device)
    for request in range(batch):
        row = weights[request * next_n : (request + 1) * next_n]
        seen = torch.where(position < limits[request].amax(), position, -1)[None]
        slots = to_slots.reference(seen, block_table[request, None], page_size=pages.shape[1])[0]
        keys = known.decode(
            {n: p.view(torch.uint8)[slots.long()].view(p.dtype) for n, p in parts.items()}
        )
        out[request] = _weighted(q[request], keys, row)
    logits = torch.where(position < limits[..., None], out, -torch.inf)
    return logits.flatten(0, 1)
