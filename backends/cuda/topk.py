"""topk on NVIDIA GPUs."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from dsa_hal.autotune.space import Space
from dsa_hal.backends.cuda import _nvrtc
from dsa_hal.backends.cuda._limits import LIMITS
from dsa_hal.backends.portable import select as portable
from dsa_hal.backends.portable.topk import largest
from dsa_hal.ops.select import topk

HEADER, ENTRY = 4736, 8
"""Bytes of shared memory beside a block's list, and of an entry of the list."""


@dataclass(frozen=True)
class Config:
    """cluster   blocks that share a row
    threads   of a block
    per       scores of a thread in a tile
    resident  blocks on a processor at a time
    """

    cluster: int
    threads: int = 256
    per: int = 16
    resident: int = 3

    def capacity(self, k: int) -> int:
        """Entries of a block's list: k and a tile at least, and as many as a sample's guess lets
        in; a multiple of four for each thread."""
        least = max(6144, k + self.threads * self.per, 2 * k)
        return -(-least // (4 * self.threads)) * 4 * self.threads

    def shared(self, k: int) -> int:
        """Bytes of shared memory of a block."""
        return HEADER + ENTRY * self.capacity(k)


def legal(*, rows: int, n: int, k: int, processors: int) -> list[Config]:
    """Plans for rows of n scores, the best guess first. Few rows: clusters as large as the
    processors and the row's tiles allow; many: a block each, several to a processor."""
    best = 1
    while best < 8 and n >= 2 * best * 4096:
        # Larger clusters leave processors idle: each must lie within one group of 16 to 18.
        if 2 * best * rows > processors * (4 if best == 1 else 3) // 4:
            break
        best *= 2
    short = k <= 2048  # a list of which four fit on a processor, beside a tile of any size
    alone = [
        Config(c, threads=512, per=16 if short and n > c * 4096 else 8, resident=1)
        for c in (1, 2, 4, 8)
    ]
    shared = [Config(c, resident=4 if short and n <= 8192 else 3) for c in (1, 2, 4, 8)]
    first = (alone if best * rows <= processors else shared)[best.bit_length() - 1]
    return [first, *(c for c in (*alone, *shared) if c != first)]


SPACE = Space(name="topk/cuda", kind=Config, legal=legal)


def run(
    logits: Tensor, k: int, starts: Tensor | None, ends: Tensor | None, out: Tensor, *,
    overlap: bool = False, chosen: Tensor | None = None, at: int = 0, group: int = 1,
) -> None:  # fmt: skip
    """Select into `out` [rows, k] int32, dense.

    overlap  the kernel may begin before the one ahead of it ends
    chosen   int32, how many groups of `group` rows are wanted, then their numbers: rows of starts,
             ends and out. `logits` are the scores of those from number `at` on, one after another
    """
    rows, n = logits.shape
    if not rows:
        return
    if logits.stride(1) != 1 and n > 1:
        logits = logits.contiguous()  # vectors of 16 bytes are read
    count = processors(logits.device.index)
    power = 1 << (n - 1).bit_length()  # not below n; alike calls share a plan
    config = SPACE.pick(rows=min(rows, count + 1), n=power, k=k, processors=count)
    shared = config.shared(k)
    defines = (
        ("THREADS", config.threads), ("PER", config.per), ("RESIDENT", config.resident),
        ("CAP", config.capacity(k)), ("BYTES", shared),
    )  # fmt: skip
    name = "topk_fp32" if logits.dtype == torch.float32 else "topk_bf16"
    bounds = [0 if t is None else t if t.stride(0) == 1 else t.contiguous() for t in (starts, ends)]
    _nvrtc.module("topk.cu", defines).launch(
        name, (rows * config.cluster,), (config.threads,),
        (logits, *bounds, out, logits.stride(0), n, k, 0 if chosen is None else chosen, at, group,
         out.shape[0]), shared=shared,
        cluster=(config.cluster,), overlap=overlap,
    )  # fmt: skip


@cache
def processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@topk.impl("cuda", "cuda", contract=1, arch=("sm90",), needs=_nvrtc.NEEDS, rank=10,
           promises=("deterministic", "ties=lower"))  # fmt: skip
def select(
    logits: Tensor, k: int, starts: Tensor | None = None, ends: Tensor | None = None, *,
    ties: str = "any",
) -> Tensor:  # fmt: skip
    """Columns in ascending order; of equal scores always the lower columns. A row is read once."""
    out = torch.empty(logits.shape[0], k, dtype=torch.int32, device=logits.device)
    run(logits, k, starts, ends, out)
    return out


@topk.impl("cuda", "torch", contract=1, promises=("deterministic", "ties=lower"))
def best(
    logits: Tensor, k: int, starts: Tensor | None = None, ends: Tensor | None = None, *,
    ties: str = "any",
) -> Tensor:  # fmt: skip
    """torch's own selection on masked copies of some rows."""
    return largest(logits, k, starts, ends, ties=ties, limits=LIMITS)


@topk.impl("cuda", "triton", contract=1, needs=("triton>=3.6",), rank=1,
           promises=("deterministic", "ties=lower"))  # fmt: skip
def by_pieces(
    logits: Tensor, k: int, starts: Tensor | None = None, ends: Tensor | None = None, *,
    ties: str = "any",
) -> Tensor:  # fmt: skip
    """Columns in ascending order; of equal scores always the lower columns."""
    return portable.largest(logits, k, starts, ends)


from dsa_hal.backends.cuda._adapters import flashinfer  # noqa: E402, F401
