"""Key ranges of queries on the processor: checked once, then as plain numbers."""

from torch import Tensor

from dsa_hal.errors import BadInput


def bounds(op: str, ks: Tensor, ke: Tensor, context: int) -> tuple[list[int], list[int]]:
    """First and end key of every query; BadInput for one outside the keys that exist."""
    starts, ends = ks.tolist(), ke.tolist()
    for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
        if end > start and (start < 0 or end > context):
            raise BadInput(
                f"{op}: query {row} has the range ks {start} to ke {end};"
                f" it must lie within 0 to {context}, the number of keys"
            )
    return starts, ends


def hull(starts: list[int], ends: list[int], first: int, last: int) -> tuple[int, int]:
    """The smallest range that holds those of queries `first` to `last`; (0, 0) if all are empty."""
    full = [t for t in range(first, last) if ends[t] > starts[t]]
    return (min(starts[t] for t in full), max(ends[t] for t in full)) if full else (0, 0)
