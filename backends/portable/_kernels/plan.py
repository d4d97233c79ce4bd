"""The plan of split decoding, made by one program without a word to the host."""

import triton
import triton.language as tl


@triton.jit
def _ceil_div(a, b):
    return (a + b - 1) // b


@triton.jit
def plan(
    LENGTHS, ENDS, SCHEDULE, SPLITS, rows, workers, block, stride, steps,
    BR: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """LENGTHS [rows] int32; ENDS [rows] int64 is room for the blocks up to each row's end;
    SCHEDULE [workers, 4], SPLITS [rows + 1] int32. `steps` halvings find a row among `rows`."""
    cr, cw = tl.arange(0, BR), tl.arange(0, BW)
    total = tl.zeros([], tl.int64)
    for at in range(0, rows, BR):
        here = at + cr
        length = tl.load(LENGTHS + here.to(tl.int64) * stride, mask=here < rows, other=0)
        blocks = tl.where(here < rows, tl.maximum(1, _ceil_div(length.to(tl.int64), block)), 0)
        tl.store(ENDS + here, total + tl.cumsum(blocks, 0), mask=here < rows)
        total += tl.sum(blocks, 0)
    tl.debug_barrier()  # threads read below what others wrote above
    busy = tl.minimum(total, workers)
    shares = tl.maximum(busy, 1)  # no division by zero where there is no row

    # what comes before a block of the line, in workers whose share begins there or earlier
    before = tl.zeros([], tl.int64)
    tl.store(SPLITS, 0)
    for at in range(0, rows, BR):
        here = at + cr
        real = here < rows
        end = tl.load(ENDS + here, mask=real, other=1)
        start = tl.load(ENDS + here - 1, mask=real & (here > 0), other=0)
        cuts = _ceil_div(end * shares, total) - _ceil_div((start + 1) * shares, total)
        pieces = tl.where(real, 1 + cuts, 0)
        tl.store(SPLITS + 1 + here, (before + tl.cumsum(pieces, 0)).to(tl.int32), mask=real)
        before += tl.sum(pieces, 0)

    for at in range(0, workers, BW):
        here = at + cw
        real = here < workers
        works = real & (here < busy)
        first = here.to(tl.int64) * total // shares
        last = (here.to(tl.int64) + 1) * total // shares - 1
        begin, end = tl.zeros([BW], tl.int32), tl.zeros([BW], tl.int32)
        size = 1 << steps
        for _ in range(steps):  # the number of rows that end at or before the block
            size = size // 2
            try_begin, try_end = begin + size, end + size
            at_begin = tl.load(ENDS + try_begin - 1, mask=works & (try_begin <= rows), other=0)
            at_end = tl.load(ENDS + try_end - 1, mask=works & (try_end <= rows), other=0)
            begin = tl.where((try_begin <= rows) & (at_begin <= first), try_begin, begin)
            end = tl.where((try_end <= rows) & (at_end <= last), try_end, end)
        from_block = first - tl.load(ENDS + begin - 1, mask=works & (begin > 0), other=0)
        to_block = last + 1 - tl.load(ENDS + end - 1, mask=works & (end > 0), other=0)
        row = SCHEDULE + here * 4
        tl.store(row, tl.where(works, begin, rows), mask=real)
        tl.store(row + 1, tl.where(works, from_block, 0).to(tl.int32), mask=real)
        tl.store(row + 2, tl.where(works, end, rows), mask=real)
        tl.store(row + 3, tl.where(works, to_block, 0).to(tl.int32), mask=real)
