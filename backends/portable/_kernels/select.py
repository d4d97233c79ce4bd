"""The best k of each row, exactly and in order of columns, and positions turned into slots.

Scores become whole numbers that are ordered alike. A program holds some in registers and finds the
k-th by narrowing the range of numbers that it lies in: a comparison and an addition per score and
step are fewer instructions than any histogram takes. Longer rows come to that in two ways: few rows
by pieces, each of which keeps its best k; many rows by a floor that a sample of the row suggests,
which sifts out most of it. A floor that was wrong is noticed, and costs time alone.
"""

import triton
import triton.language as tl

NOTHING = tl.constexpr(-(2**31))
"""The key of what may not be selected; below that of every score."""


@triton.jit
def _keys(scores, HALF: tl.constexpr):
    """Scores -> int32 keys in their order; NaN and -inf become NOTHING, -0.0 is 0.0. HALF: the
    scores are bf16, and keys have 16 bits."""
    bits = scores.to(tl.float32).to(tl.int32, bitcast=True)
    key = tl.where(bits == NOTHING, 0, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    if HALF:
        key = key >> 16
    dead = ((bits & 0x7FFFFFFF) > 0x7F800000) | (bits == -0x800000)
    return tl.where(dead, NOTHING, key)


@triton.jit
def _read(scores, column, start, end, n, HALF: tl.constexpr):
    """Keys of some columns of a row, NOTHING outside [start, end). Whole groups of 16 are read, so
    that a thread's loads can be as wide as they get."""
    near = (column >= start // 16 * 16) & (column < tl.minimum((end + 15) // 16 * 16, n))
    found = tl.load(scores + column, mask=near, other=float("-inf"))
    return tl.where((column >= start) & (column < end), _keys(found, HALF), NOTHING)


@triton.jit
def _range(STARTS, ENDS, row, n, HAS_STARTS: tl.constexpr, HAS_ENDS: tl.constexpr):
    start, end = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32) + n
    if HAS_STARTS:
        start = tl.minimum(tl.maximum(tl.load(STARTS + row), 0), n)
    if HAS_ENDS:
        end = tl.minimum(tl.load(ENDS + row), n)
    return start, end


@triton.jit
def _bounds(HALF: tl.constexpr):
    """The lowest key of a score, and one that none reaches."""
    if HALF:
        low, high = tl.full([], -0x8000, tl.int64), tl.full([], 0x7F81, tl.int64)
    else:
        low, high = tl.full([], -0x7FFFFFFF, tl.int64), tl.full([], 0x7F800001, tl.int64)
    return low, high


@triton.jit
def _probe(step, low, high, at_low, at_high, k):
    """A key strictly between low and high. First whether the k-th is 0, of which the indexer's ReLU
    makes plateaus; then in turn where it would lie if keys were spread evenly, and the middle."""
    width = high - low
    share = (at_low - k).to(tl.float32) / tl.maximum(at_low - at_high, 1).to(tl.float32)
    guess = tl.minimum(tl.maximum((share * width.to(tl.float32)).to(tl.int64), 1), width - 1)
    probe = low + tl.where(step % 2 == 0, guess, width >> 1)
    zero = tl.where(step == 0, 1, 0)
    return tl.where((step < 2) & (low < zero) & (zero < high), zero, probe)


@triton.jit
def _search(key, k, total, HALF: tl.constexpr):
    """The level above which fewer than k keys lie and at which the k-th does, and how many of those
    at the level are wanted; `total` keys are scores. A level between keys has room for none."""
    low, high = _bounds(HALF)
    at_low, at_high, step = total, total * 0, total * 0
    while (at_low > k) & (high - low > 1):
        probe = _probe(step, low, high, at_low, at_high, k)
        count = tl.sum((key >= probe.to(tl.int32)).to(tl.int32))
        enough = count >= k
        low, at_low = tl.where(enough, probe, low), tl.where(enough, count, at_low)
        high, at_high = tl.where(enough, high, probe), tl.where(enough, at_high, count)
        step += 1
    exact = at_low <= k
    return tl.where(exact, low - 1, low).to(tl.int32), tl.where(exact, 0, k - at_high)


@triton.jit
def _places(key, level, room):
    """Which keys are taken, those above the level and the first `room` at it, and each one's rank
    among them; how many lie above, and at the level. Less than 2^16 keys."""
    above, equal = key > level, key == level
    pair = tl.where(above, 0x10000, equal.to(tl.int32))
    seen, all = tl.cumsum(pair, 0), tl.sum(pair)
    at_level = seen & 0xFFFF
    taken = above | (equal & (at_level <= room))
    rank = ((seen >> 16) & 0xFFFF) + tl.minimum(at_level, room) - 1
    return taken, rank, (all >> 16) & 0xFFFF, all & 0xFFFF


@triton.jit
def _fill(to, value, found, k, KP: tl.constexpr):
    """Places [found, k) get `value`. KP is a power of two >= k."""
    rest = tl.arange(0, KP)
    tl.store(to + rest, tl.full([KP], 0, tl.int32) + value, mask=(rest >= found) & (rest < k))


@triton.jit
def pieces(
    X, COLUMNS, STARTS, ENDS, KEYS, OUT, x_row, out_row, n, k, count,
    HELD: tl.constexpr, KP: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    HALF: tl.constexpr, HAS_STARTS: tl.constexpr, HAS_ENDS: tl.constexpr,
):  # fmt: skip
    """Program row * count + piece: the best k of columns [HELD * piece, + HELD) of n.

    X [rows, n] is scores where FIRST, else keys; COLUMNS [rows, n] then says whose. OUT gets
    columns [rows, k], filled up with -1, where LAST; else [rows, count, k], with KEYS of the same
    shape filled up with NOTHING.
    """
    row, piece = (tl.program_id(0) // count).to(tl.int64), tl.program_id(0) % count
    column = piece * HELD + tl.arange(0, HELD)
    if FIRST:
        start, end = _range(STARTS, ENDS, row, n, HAS_STARTS, HAS_ENDS)
        key = _read(X + row * x_row, column, start, end, n, HALF)
    else:
        key = tl.load(X + row * x_row + column, mask=column < n, other=NOTHING)
    total = tl.sum((key > NOTHING).to(tl.int32))
    level, room = _search(key, k, total, HALF)
    taken, rank, _, _ = _places(key, level, room)
    found = tl.minimum(total, k)
    whose = column if FIRST else tl.load(COLUMNS + row * x_row + column, mask=taken, other=0)
    to = row * out_row + piece.to(tl.int64) * k
    tl.store(OUT + to + rank, whose, mask=taken)
    if LAST:
        _fill(OUT + to, -1, found, k, KP)
    else:
        tl.store(KEYS + to + rank, key, mask=taken)
        _fill(KEYS + to, NOTHING, found, k, KP)


@triton.jit
def sift(
    X, STARTS, ENDS, KEYS, COLUMNS, COUNTS, x_row, n, k,
    SAMPLE: tl.constexpr, TILE: tl.constexpr, CAP: tl.constexpr, HALF: tl.constexpr,
    HAS_STARTS: tl.constexpr, HAS_ENDS: tl.constexpr,
):  # fmt: skip
    """Program i: of row i, in order of columns, the keys above a floor and the first k at it, up to
    CAP of them, to KEYS and COLUMNS [rows, CAP]; how many there were to COUNTS [rows], or more than
    CAP if there may be better ones than these. CAP >= 2 k, which is in range where TILE is."""
    row = tl.program_id(0).to(tl.int64)
    start, end = _range(STARTS, ENDS, row, n, HAS_STARTS, HAS_ENDS)
    span = tl.maximum(end - start, 0)
    scores, to = X + row * x_row, row * CAP
    floor = tl.full([], NOTHING, tl.int32)
    if span > CAP:
        # runs of 16, spread evenly; as many of them as k and four deviations are of the row
        i = tl.arange(0, SAMPLE)
        at = (
            start // 16 * 16
            + ((i // 16).to(tl.int64) * span // (SAMPLE // 16)).to(tl.int32) // 16 * 16
        )
        key = _read(scores, at + i % 16, start, end, n, HALF)
        share = k.to(tl.float32) * SAMPLE / span.to(tl.float32)
        wanted = (share + 4 * tl.sqrt(share) + 4).to(tl.int32)
        total = tl.sum((key > NOTHING).to(tl.int32))
        if total > wanted:
            level, room = _search(key, wanted, total, HALF)
            floor = level
    above, equal = start * 0, start * 0
    for left in range(start // TILE * TILE, end, TILE):
        column = left + tl.arange(0, TILE)
        key = _read(scores, column, start, end, n, HALF)
        room = tl.where(floor > NOTHING, tl.maximum(k - equal, 0), 0)
        taken, rank, more, same = _places(key, floor, room)
        place = above + tl.minimum(equal, k) + rank
        kept = taken & (place < CAP)
        tl.store(KEYS + to + place, key, mask=kept)
        tl.store(COLUMNS + to + place, column, mask=kept)
        above += more
        equal += tl.where(floor > NOTHING, same, 0)
    found = above + tl.minimum(equal, k)
    lost = (floor > NOTHING) & (found < k)
    tl.store(COUNTS + row, tl.where(lost, CAP + 1, found))


@triton.jit
def _from_list(
    KEYS, COLUMNS, out, found, k, SIZE: tl.constexpr, KP: tl.constexpr, HALF: tl.constexpr
):
    i = tl.arange(0, SIZE)
    key = tl.load(KEYS + i, mask=i < found, other=NOTHING)
    level, room = _search(key, k, found, HALF)
    taken, rank, _, _ = _places(key, level, room)
    tl.store(out + rank, tl.load(COLUMNS + i, mask=taken, other=0), mask=taken)
    _fill(out, -1, tl.minimum(found, k), k, KP)


@triton.jit
def finish(
    X, STARTS, ENDS, KEYS, COLUMNS, COUNTS, OUT, x_row, n, k,
    TILE: tl.constexpr, CAP: tl.constexpr, KP: tl.constexpr, HALF: tl.constexpr,
    HAS_STARTS: tl.constexpr, HAS_ENDS: tl.constexpr,
):  # fmt: skip
    """Program i: the best k of what `sift` left of row i to OUT [rows, k]; of the whole row, read
    once for each step of the search, if there may be better ones."""
    row = tl.program_id(0).to(tl.int64)
    found = tl.load(COUNTS + row)
    out, to = OUT + row * k, row * CAP
    if found <= CAP // 2:
        _from_list(KEYS + to, COLUMNS + to, out, found, k, CAP // 2, KP, HALF)
    elif found <= CAP:
        _from_list(KEYS + to, COLUMNS + to, out, found, k, CAP, KP, HALF)
    else:
        start, end = _range(STARTS, ENDS, row, n, HAS_STARTS, HAS_ENDS)
        scores, left = X + row * x_row, start // TILE * TILE
        i = tl.arange(0, TILE)
        low, high = _bounds(HALF)
        counts = tl.zeros([TILE], tl.int32)
        for at in range(left, end, TILE):
            counts += (_read(scores, at + i, start, end, n, HALF) > NOTHING).to(tl.int32)
        total = tl.sum(counts)
        at_low, at_high, step = total, total * 0, total * 0
        while (at_low > k) & (high - low > 1):
            probe = _probe(step, low, high, at_low, at_high, k)
            counts = tl.zeros([TILE], tl.int32)
            for at in range(left, end, TILE):
                key = _read(scores, at + i, start, end, n, HALF)
                counts += (key >= probe.to(tl.int32)).to(tl.int32)
            count = tl.sum(counts)
            enough = count >= k
            low, at_low = tl.where(enough, probe, low), tl.where(enough, count, at_low)
            high, at_high = tl.where(enough, high, probe), tl.where(enough, at_high, count)
            step += 1
        exact = at_low <= k
        level = tl.where(exact, low - 1, low).to(tl.int32)
        room = tl.where(exact, 0, k - at_high)
        above, equal = start * 0, start * 0
        for at in range(left, end, TILE):
            key = _read(scores, at + i, start, end, n, HALF)
            taken, rank, more, same = _places(key, level, tl.maximum(room - equal, 0))
            place = above + tl.minimum(equal, room) + rank
            tl.store(out + place, at + i, mask=taken)
            above += more
            equal += same
        _fill(out, -1, tl.minimum(total, k), k, KP)


@triton.jit
def to_slots(
    INDICES, TABLE, OUT, i_row, t_row, k, rows_per_request, page_size, max_pages,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid [rows, blocks of k]: positions of a row into slots; a position past the table reads the
    table's last entry."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    position = tl.load(INDICES + row * i_row + at, mask=at < k, other=-1)
    some = position >= 0
    page = tl.minimum(position // page_size, max_pages - 1)
    base = tl.load(TABLE + (row // rows_per_request) * t_row + page, mask=some, other=0)
    slot = tl.where(some, base * page_size + position % page_size, -1)
    tl.store(OUT + row * k + at, slot, mask=at < k)
