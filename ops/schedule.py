"""The explicit plan of split decoding: which worker computes which blocks of which row."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dsa_hal.case import Cost, Inputs, Maker, case
from dsa_hal.check import Finding, Report, bitwise, each
from dsa_hal.registry import op


def _plan_inputs(
    make: Maker, *, rows: int, longest: int, workers: int, block: int, equal: bool = False
) -> Inputs:
    lengths = [longest if equal else make.pick.randint(0, longest) for _ in range(rows)]
    return dict(lengths=make.tensor(lengths), workers=workers, block=block)


def _plan_cost(lengths: Tensor, *, workers: int, block: int = 64) -> Cost:
    return Cost(0.0, 4.0 * (2 * lengths.numel() + 1 + 4 * workers))


def _plan_invalid(lengths: Tensor, *, workers: int, block: int = 64) -> str | None:
    if lengths.dtype != torch.int32 or lengths.dim() != 1:
        return f"lengths are {lengths.dtype} {list(lengths.shape)}; expected int32 [rows]"
    if workers < 1 or block < 1:
        return f"{workers} workers cannot share blocks of {block}; both must be at least 1"
    return None


def _covers(got: Sequence[Tensor], want: Sequence[Tensor], inputs: Inputs) -> Report:
    """The rule's bytes, and what the rule is for: every block done once, no worker with two more
    than another, and as many pieces counted per row as workers touch it."""
    same = each(schedule=bitwise, num_splits=bitwise)(got, want, inputs)
    if not same.ok:
        return same
    blocks = [max(1, -(-n // inputs["block"])) for n in inputs["lengths"].tolist()]
    done = [[0] * n for n in blocks]
    pieces, loads = [0] * len(blocks), []
    for row, first, last_row, end in got[0].tolist():
        loads.append(0)
        for at in range(row, min(last_row + 1, len(blocks))):
            span = range(first if at == row else 0, end if at == last_row else blocks[at])
            for one in span:
                done[at][one] += 1
            loads[-1] += len(span)
            pieces[at] += 1
    wrong = float(sum(times != 1 for row_done in done for times in row_done))
    apart = float(max(loads) - min(loads))
    counts = got[1].diff().tolist()
    return Report((
        *same.findings,
        Finding("schedule", "blocks not done exactly once", wrong, 0.0, wrong == 0),
        Finding("schedule", "blocks between the busiest and the idlest", apart, 1.0, apart <= 1),
        Finding("num_splits", "pieces", str(counts), str(pieces), counts == pieces),
    ))  # fmt: skip


@op(
    version=1,
    constant=("workers", "block", "longest", "equal"),
    variable={"rows": "lengths[0]"},
    inputs=_plan_inputs,
    cases=(
        case("empty", rows=0, longest=9, workers=4, block=64),
        case("one", rows=1, longest=9, workers=1, block=64),
        case("idle", rows=2, longest=64, workers=7, block=64),
        case("uneven", rows=9, longest=700, workers=4, block=64),
        case("long_row", rows=1, longest=32768, workers=132, block=64, equal=True),
        case("zeros", rows=5, longest=0, workers=3, block=64),
        case("odd_block", rows=17, longest=300, workers=5, block=7),
        case("decode_b128", model=True, rows=256, longest=2048, workers=132, block=64, equal=True),
    ),
    check=_covers,
    cost=_plan_cost,
    outputs=("schedule", "num_splits"),
    invalid=_plan_invalid,
)
def plan(lengths: Tensor, *, workers: int, block: int = 64) -> tuple[Tensor, Tensor]:
    """Split the blocks of all rows evenly among workers.

    Row r has ceil(lengths[r] / block) blocks, a row of length 0 one empty block, so that somebody
    writes its result. All blocks stand in one line, row after row; of `busy` = min(workers, blocks)
    workers number w takes those from w * blocks // busy to (w + 1) * blocks // busy.

    lengths  [rows] int32, keys per row, not negative
    -> schedule    [workers, 4] int32: begin_row, begin_block, end_row, end_block. A worker does
                   rows begin_row to end_row inclusive; the first from begin_block on, the last as
                   far as end_block, exclusive. A worker without work has (rows, 0, rows, 0).
    -> num_splits  [rows + 1] int32: row r's pieces, one per worker that touches it, in worker
                   order, have the numbers num_splits[r] to num_splits[r + 1], exclusive

    Source: FlashMLA's tile scheduler metadata; the rule is our own and knows of no device.
    """
    rows = lengths.shape[0]
    blocks = (-(-lengths.long() // block)).clamp(min=1)
    ends = torch.cat([blocks.new_zeros(1), blocks.cumsum(0)])  # ends[r] = first block of row r
    total = ends[-1]
    busy = total.clamp(max=workers)
    number = torch.arange(workers + 1, device=lengths.device)
    bounds = torch.minimum(number, busy) * total // busy.clamp(min=1)
    idle = (bounds[1:] == bounds[:-1])[:, None]
    first, last = bounds[:-1], bounds[1:] - 1
    begin = torch.searchsorted(ends[1:], first, right=True)
    end = torch.searchsorted(ends[1:], last, right=True)
    work = torch.stack([begin, first - ends[begin], end, last - ends[end] + 1], 1)
    schedule = torch.where(idle, torch.tensor([rows, 0, rows, 0], device=work.device), work)
    cuts_before_end = torch.searchsorted(bounds, ends[1:])
    cuts_before_start = torch.searchsorted(bounds, ends[:-1], right=True)
    pieces = 1 + cuts_before_end - cuts_before_start
    num_splits = torch.cat([pieces.new_zeros(1), pieces.cumsum(0)])
    return schedule.to(torch.int32), num_splits.to(torch.int32)
