"""Selection: the best k columns of each row of scores, and where those tokens lie in the cache.

A selection is a set. It is judged by the scores it achieves: two correct ones may differ where
scores are equal, and the ReLU of the indexer makes whole plateaus of exact zeros.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dsa_hal.case import Cost, Inputs, Maker, case
from dsa_hal.check import Check, Finding, Report, bitwise, count, each, form
from dsa_hal.ops.quant import blocks
from dsa_hal.registry import op

TIES = ("any", "lower")
"""Rules for equal scores at the boundary: no rule, or lower columns first."""

MAX_K = 4096


def ties_wrong(k: int, ties: str) -> str | None:
    """Why a selection of `k` under the rule `ties` is no request; for the `invalid` of ops."""
    if not 1 <= k <= MAX_K:
        return f"k is {k}; expected 1 to {MAX_K}"
    if ties not in TIES:
        return f"ties is {ties!r}; expected one of {', '.join(TIES)}"
    return None


def ties_request(ties: str) -> frozenset[str]:
    """The promise that a rule for ties insists on."""
    return frozenset() if ties == "any" else frozenset({f"ties={ties}"})


def in_range(
    starts: Tensor | None, ends: Tensor | None, columns: int, device: torch.device
) -> Tensor:
    """The columns that each row may use: bool [rows or 1, columns], columns in [start, end)."""
    column = torch.arange(columns, device=device, dtype=torch.int32)
    inside = torch.ones(1, columns, dtype=torch.bool, device=device)
    if starts is not None:
        inside = inside & (column >= starts[:, None])
    if ends is not None:
        inside = inside & (column < ends[:, None])
    return inside


def selected(name: str, got: Tensor, scores: Tensor, slack: Tensor | float) -> list[Finding]:
    """Judge columns `got` [rows, k] by `scores` [rows, n], -inf where nothing may be selected.

    slack  [rows, 1] by how much scores may be wrong: a selected score may lie that far below the
           true k-th, and one that lies further above it must be selected
    """
    rows, k = got.shape
    n = scores.shape[1]
    valid = got >= 0
    wrong = {"columns out of bounds": (got < -1) | (got >= n)}
    wrong["-1 before a column"] = ~valid[:, :-1] & valid[:, 1:]
    ordered = got.sort(-1).values
    wrong["repeated columns"] = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    findings = [_none(name, measure, mask) for measure, mask in wrong.items()]
    if not all(f.ok for f in findings) or not rows or not n:
        return findings

    allowed = (scores > -torch.inf).sum(-1, keepdim=True)
    full = torch.minimum(allowed, torch.full_like(allowed, k))
    best = scores.topk(min(k, n), -1).values
    kth = best.gather(1, (full - 1).clamp_min(0))
    own = scores.gather(1, got.clamp_min(0).long()).masked_fill(~valid, -torch.inf)
    short = valid.sum(-1, keepdim=True) != full
    forbidden = valid & (own == -torch.inf)
    low = valid & (own < kth - slack)
    high = kth + slack
    missed = (scores > high).sum(-1) != (own > high).sum(-1)
    return [
        *findings,
        _none(name, "rows with a wrong count", short),
        _none(name, "columns that may not be selected", forbidden),
        _none(name, "scores below the k-th", low),
        _none(name, "rows that miss a higher score", missed),
    ]


def lower_first(name: str, got: Tensor, scores: Tensor, level: Tensor) -> Finding:
    """Among the columns whose score is exactly `level` [rows, 1], none may be selected while a
    lower one is not."""
    n = scores.shape[1]
    chosen = torch.zeros(got.shape[0], n + 1, dtype=torch.bool, device=got.device)
    chosen.scatter_(1, torch.where(got >= 0, got, n).long(), torch.ones_like(got, dtype=torch.bool))
    chosen, equal = chosen[:, :n], scores == level
    left_out = (equal & ~chosen).cumsum(-1) > 0
    return _none(name, "ties given to a higher column", equal & chosen & left_out)


def _none(name: str, measure: str, mask: Tensor) -> Finding:
    wrong = int(mask.sum())
    return Finding(name, measure, float(wrong), 0.0, wrong == 0)


# -- topk ---------------------------------------------------------------------------------------


def _topk_inputs(
    make: Maker, *, rows: int, n: int, k: int, kind: str = "plain", ranges: str = "none",
    ties: str = "any", bf16: bool = False,
) -> Inputs:  # fmt: skip
    logits = make.randn(rows, n)
    dice = make.randint(0, 8, rows, n)
    if kind == "plateau":  # what the indexer's ReLU makes: zeros, and few scores on either side
        logits = torch.where(dice < 6, torch.zeros_like(logits), logits)
    if kind == "steps":
        logits = dice.float() - 4
    if kind == "equal":
        logits = torch.full_like(logits, -1.5)
    if kind == "negative":
        logits = -logits.abs() - 1
    if kind == "close":  # equal in their upper 16 bits: coarse keys cannot tell them apart
        logits = 1 + logits.abs() * 2.0**-20
    if kind == "special":
        for value, side in ((torch.nan, 0), (-torch.inf, 1), (torch.inf, 2)):
            logits = logits.masked_fill(dice == side, value)
    spans: list[tuple[int, int]] = []
    for row in range(rows if ranges != "none" else 0):
        start = make.pick.randint(0, n)
        spans.append({
            "causal": (0, max(0, n - rows + row + 1)),
            "ragged": (start, start if row % 3 == 0 else make.pick.randint(start, n)),
            "beyond": (start // 2, n + 9),
        }[ranges])  # fmt: skip
    starts = make.tensor([s for s, _ in spans]) if ranges in ("ragged", "beyond") else None
    ends = make.tensor([e for _, e in spans]) if ranges != "none" else None
    logits = logits.to(torch.bfloat16) if bf16 else logits
    return dict(logits=logits, k=k, starts=starts, ends=ends, ties=ties)


def _topk_cost(
    logits: Tensor, k: int, starts: Tensor | None = None, ends: Tensor | None = None, *,
    ties: str = "any",
) -> Cost:  # fmt: skip
    rows, n = logits.shape
    read = float(rows * n)
    if not logits.is_meta and (starts is not None or ends is not None):
        read = float(in_range(starts, ends, n, logits.device).expand(rows, n).sum())
    return Cost(read, read * logits.element_size() + 4 * rows * k)


def _topk_invalid(
    logits: Tensor, k: int, starts: Tensor | None = None, ends: Tensor | None = None, *,
    ties: str = "any",
) -> str | None:  # fmt: skip
    shape = list(logits.shape)
    if logits.dtype not in (torch.float32, torch.bfloat16) or logits.dim() != 2:
        return f"logits are {logits.dtype} {shape}; expected float32 or bfloat16 [rows, n]"
    for name, bound in (("starts", starts), ("ends", ends)):
        if bound is not None and (bound.dtype != torch.int32 or bound.shape != logits.shape[:1]):
            return f"{name} is {bound.dtype} {list(bound.shape)}; expected int32 [{shape[0]}]"
    return ties_wrong(k, ties)


def _topk_requests(
    logits: Tensor, k: int, starts: Tensor | None = None, ends: Tensor | None = None, *,
    ties: str = "any",
) -> frozenset[str]:  # fmt: skip
    return ties_request(ties)


def _topk_unread(
    logits: Tensor, k: int, starts: Tensor | None = None, ends: Tensor | None = None, *,
    ties: str = "any",
) -> dict[str, Tensor]:  # fmt: skip
    inside = in_range(starts, ends, logits.shape[1], logits.device)
    return {"logits": ~inside.expand(logits.shape)}


def _judge_topk() -> Check:
    def check(got: Sequence[Tensor], want: Sequence[Tensor], inputs: Inputs) -> Report:
        if wrong := count(got, want) or form("out", got[0], want[0]):
            return Report(tuple(wrong))
        (columns,), (right,) = got, want
        logits = inputs["logits"].float()
        inside = in_range(inputs["starts"], inputs["ends"], logits.shape[1], logits.device)
        scores = torch.where(inside & ~logits.isnan(), logits, -torch.inf)
        findings = selected("out", columns, scores, 0.0)
        if inputs["ties"] == "lower":
            different = columns.sort(-1).values != right.sort(-1).values
            findings.append(_none("out", "columns other than the rule's", different))
        return Report(tuple(findings))

    return check


@op(
    version=1,
    constant=("k", "ties", "bf16", "kind", "ranges"),
    variable={"rows": "logits[0]", "n": "logits[1]"},
    inputs=_topk_inputs,
    cases=(
        case("no_rows", rows=0, n=64, k=8),
        case("no_columns", rows=3, n=0, k=4),
        case("one", rows=1, n=1, k=1),
        case("k1", rows=5, n=63, k=1, ties="lower"),
        case("plain", rows=7, n=333, k=64),
        case("k_odd", rows=4, n=1000, k=37, ranges="causal", traps=(13,)),
        case("k_all", rows=3, n=65, k=65, ranges="ragged"),
        case("k_more", rows=6, n=65, k=128, ranges="causal", traps=(13,)),
        case("ragged", rows=17, n=700, k=48, ranges="ragged"),
        case("beyond", rows=5, n=300, k=40, ranges="beyond"),
        case("bf16", rows=9, n=512, k=64, ranges="ragged", bf16=True),
        case("bf16_lower", rows=9, n=512, k=64, ranges="causal", bf16=True, ties="lower"),
        case("plateau", rows=8, n=600, k=200, kind="plateau", ranges="causal"),
        case("plateau_lower", rows=8, n=600, k=200, kind="plateau", ranges="ragged", ties="lower",
             traps=(14,)),
        case("steps_lower", rows=33, n=257, k=64, kind="steps", ties="lower", traps=(14,)),
        case("equal_lower", rows=3, n=5000, k=2048, kind="equal", ties="lower", traps=(14,)),
        case("negative", rows=9, n=130, k=100, kind="negative", ranges="ragged", traps=(3,)),
        case("close", rows=4, n=9000, k=2048, kind="close"),
        case("special", rows=12, n=400, k=300, kind="special", ranges="ragged", traps=(21,)),
        case("special_lower", rows=12, n=400, k=60, kind="special", ties="lower", traps=(21,)),
        case("decode_4k", model=True, rows=1, n=4096, k=2048, ranges="causal"),
        case("decode_8k", model=True, rows=64, n=8192, k=2048, ranges="causal"),
        case("decode_32k", model=True, rows=128, n=32768, k=2048, ranges="causal"),
        case("decode_one_128k", model=True, rows=1, n=131072, k=2048, ranges="causal"),
        case("decode_128k", model=True, rows=128, n=131072, k=2048, ranges="causal"),
        case("prefill_8k", model=True, rows=2048, n=8192, k=2048, ranges="causal"),
        case("prefill_32k", model=True, rows=1024, n=32768, k=2048, ranges="causal"),
        case("prefill_128k", model=True, rows=512, n=131072, k=2048, ranges="causal"),
    ),
    check=_judge_topk(),
    cost=_topk_cost,
    invalid=_topk_invalid,
    requests=_topk_requests,
    unread=_topk_unread,
)  # fmt: skip
def topk(
    logits: Tensor, k: int, starts: Tensor | None = None, ends: Tensor | None = None, *,
    ties: str = "any",
) -> Tensor:  # fmt: skip
    """The columns of the k largest scores of each row.

    logits  [rows, n] fp32 or bf16; -inf and NaN are never selected, +inf may be
    k       1 to 4096; may exceed n
    starts  [rows] int32, first column that a row may use; None = 0
    ends    [rows] int32, column after the last; None = n. The range is clipped to [0, n) and may be
            empty; scores outside it are not read
    ties    "any": of equal scores at the boundary, any; "lower": lower columns first
    -> out  [rows, k] int32 columns in any order, then -1 where a row has fewer than k to select

    Source: the selection of the model's demo code, with ranges, -1 and the tie rule made explicit.
    """
    n = logits.shape[1]
    scores = logits.float()
    allowed = in_range(starts, ends, n, logits.device) & (scores > -torch.inf)
    scores = torch.where(allowed, scores, -torch.inf)
    order = scores.sort(dim=-1, descending=True, stable=True)
    columns = torch.where(order.values > -torch.inf, order.indices, -1)[:, :k]
    return torch.nn.functional.pad(columns, (0, k - columns.shape[1]), value=-1).to(torch.int32)


# -- to_slots -----------------------------------------------------------------------------------


def _to_slots_inputs(
    make: Maker, *, requests: int, rows_per_request: int, k: int, page_size: int, max_pages: int,
    kind: str = "plain",
) -> Inputs:  # fmt: skip
    table = make.permutation(requests * max_pages).view(requests, max_pages)
    rows = requests * rows_per_request
    indices = make.randint(0, max(1, max_pages * page_size), rows, k)
    if kind == "holes":
        indices = torch.where(make.randint(0, 3, rows, k) == 0, -1, indices)
    if kind == "none":
        indices = torch.full_like(indices, -1)
    if kind == "edges" and k > 1:  # first and last position of a request
        indices[:, 0], indices[:, 1] = 0, max_pages * page_size - 1
    return dict(
        indices=indices, block_table=table, rows_per_request=rows_per_request, page_size=page_size
    )


def _to_slots_cost(
    indices: Tensor, block_table: Tensor, rows_per_request: int = 1, *, page_size: int
) -> Cost:
    return Cost(3.0 * indices.numel(), 8 * indices.numel() + 4 * block_table.numel())


def _to_slots_invalid(
    indices: Tensor, block_table: Tensor, rows_per_request: int = 1, *, page_size: int
) -> str | None:
    for name, t in (("indices", indices), ("block_table", block_table)):
        if t.dtype != torch.int32 or t.dim() != 2:
            return f"{name} is {t.dtype} {list(t.shape)}; expected int32 with two axes"
    if page_size < 1 or rows_per_request < 1:
        return f"page_size is {page_size}, rows_per_request {rows_per_request}; both are at least 1"
    needed = blocks(indices.shape[0], rows_per_request)
    if needed > block_table.shape[0]:
        return (
            f"{indices.shape[0]} rows, {rows_per_request} per request, are {needed} requests;"
            f" block_table has {block_table.shape[0]}"
        )
    return None


def _to_slots_unread(
    indices: Tensor, block_table: Tensor, rows_per_request: int = 1, *, page_size: int
) -> dict[str, Tensor]:
    read = torch.zeros_like(block_table, dtype=torch.bool)
    row, column = (indices >= 0).nonzero(as_tuple=True)
    read[row // rows_per_request, indices[row, column].long() // page_size] = True
    return {"block_table": ~read}


@op(
    version=1,
    constant=("k", "page_size", "rows_per_request", "kind"),
    variable={"requests": "block_table[0]", "max_pages": "block_table[1]"},
    inputs=_to_slots_inputs,
    cases=(
        *(
            case(name, requests=requests, rows_per_request=per, k=k, page_size=size,
                 max_pages=pages, kind=kind)
            for name, requests, per, k, size, pages, kind in (
                ("no_rows", 0, 1, 64, 64, 4, "plain"),
                ("no_pages", 2, 1, 16, 64, 0, "none"),
                ("page1", 3, 1, 65, 1, 70, "holes"),
                ("page3", 2, 3, 63, 3, 9, "holes"),
                ("page16", 5, 2, 128, 16, 5, "edges"),
                ("none", 3, 6, 40, 64, 3, "none"),
                ("page128", 1, 1, 200, 128, 2, "plain"),
            )
        ),
        case("holes", requests=4, rows_per_request=1, k=300, page_size=64, max_pages=7,
             kind="holes", traps=(11, 13)),
        case("decode_128", model=True, requests=128, rows_per_request=1, k=2048, page_size=64,
             max_pages=512),
        case("mtp_64", model=True, requests=64, rows_per_request=2, k=2048, page_size=64,
             max_pages=2048),
    ),
    check=each(out=bitwise),
    cost=_to_slots_cost,
    invalid=_to_slots_invalid,
    unread=_to_slots_unread,
)  # fmt: skip
def to_slots(
    indices: Tensor, block_table: Tensor, rows_per_request: int = 1, *, page_size: int
) -> Tensor:
    """Positions in a request to slots of the pool: block_table[request, i // page_size] * page_size
    + i % page_size, where request = row // rows_per_request.

    indices           [rows, k] int32 positions; -1 stays -1
    block_table       [requests, max_pages] int32 pages of each request; only entries that a
                      position points at are read
    rows_per_request  query tokens per request (next_n of decode)
    page_size         tokens per page
    -> out            [rows, k] int32 slots

    A position past the table or a page below 0 is an error; what checks it raises BadInput.

    Source: the "indices in the KV cache" of FlashMLA's sparse decode.
    """
    if not block_table.numel():
        return torch.full_like(indices, -1)
    position = indices.clamp_min(0)
    request = torch.arange(indices.shape[0], device=indices.device) // rows_per_request
    page = block_table[request[:, None], (position // page_size).long()]
    return torch.where(indices < 0, -1, page * page_size + position % page_size)
