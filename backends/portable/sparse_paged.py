"""sparse_mla_paged in Triton: which configurations, how a row's keys are split, and the launch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsa_hal.autotune.space import Launched, Space
from dsa_hal.ops.layout import SCALE, KVLayout

BLOCK = 64
"""Keys per block of a schedule: what `plan` assumes by default."""


@dataclass(frozen=True)
class Config(Launched):
    """Heads and keys of a tile, and warps of a program."""

    heads: int
    keys: int
    warps: int


def legal(*, heads: int, width: int, bytes: int) -> Sequence[Config]:
    """Tiles whose accumulator and keys stay in registers; heads are padded to 16 at least, which
    products of tiles demand. `width` is the latent's, padded; `bytes` those of a factor."""
    most = 16 if bytes == 4 else 64
    tile = min(most, max(16, 1 << (heads - 1).bit_length()))
    keys = max(16, min(64, (64 << 10) // (width * bytes)))
    warps = 8 if width > 128 else 4
    options = [(tile, keys, warps), (tile, max(16, keys // 2), warps), (16, keys, 4)]
    return [Config(*option) for option in dict.fromkeys(options)]


SPACE = Space(name="sparse_mla_paged/triton", kind=Config, legal=legal)


def splits_of(work: int, blocks: int, processors: int, most: int) -> int:
    """Into how many pieces a row's `blocks` are cut, where `work` programs would run unsplit: the
    number with the fewest blocks in a row on the busiest processor, each piece paying for two more
    blocks to start and to join. At most `most`, and none without a block."""
    best, least = 1, None
    for splits in range(1, min(most, max(1, 2 * processors // max(1, work))) + 1):
        waves = -(-work * splits // processors)
        cost = waves * (-(-blocks // splits) + 2) + (2 if splits > 1 else 0)
        if least is None or cost < least:
            best, least = splits, cost
    return -(-blocks // -(-blocks // best))


def factors(q: torch.dtype, form: KVLayout) -> torch.dtype:
    """The dtype that holds queries and keys without loss: FP8 records decode into bf16 exactly, as
    their scales are powers of two."""
    kinds = {part.dtype for part in form.data} - {torch.float8_e4m3fn}
    return q if q != torch.float32 and kinds == {q} else torch.float32


def forward(
    q: Tensor, pages: Tensor, indices: Tensor, *, layout: str, softmax_scale: float, dim_v: int,
    attn_sink: Tensor | None, topk_length: Tensor | None, schedule: Tensor | None,
    num_splits: Tensor | None, processors: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out and lse of `sparse_mla_paged`."""
    import triton.language as tl

    from dsa_hal.backends.portable._kernels.sparse_paged import LOG2E, attend

    form = KVLayout.parse(layout)
    (batch, next_n, heads, _), k = q.shape, indices.shape[-1]
    rows, page_size = batch * next_n, pages.shape[1]
    out = torch.empty(batch, next_n, heads, dim_v, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, next_n, dtype=torch.float32, device=q.device)
    if not out.numel():
        return out, lse
    q = q if q.stride(-1) == 1 else q.contiguous()
    math = factors(q.dtype, form)
    wide, narrow = (max(16, 1 << (part.count - 1).bit_length()) for part in form.data)
    config = SPACE.pick(heads=heads, width=wide, bytes=math.itemsize)
    head_blocks = -(-heads // config.heads)
    grid: tuple[int, ...]
    if schedule is None or num_splits is None:
        blocks = -(-k // BLOCK)
        splits = splits_of(rows * head_blocks, blocks, processors, blocks)
        span, pieces, workers = -(-blocks // splits) * BLOCK, rows * splits, 0
        grid = rows * head_blocks, splits
    else:
        schedule, num_splits = schedule.contiguous(), num_splits.contiguous()
        workers = schedule.shape[0]
        splits, span, pieces = workers, 0, rows + workers
        grid = (workers * head_blocks,)
    part, part_lse = out, lse
    if splits > 1:
        part = torch.empty(pieces, heads, dim_v, dtype=torch.float32, device=q.device)
        part_lse = torch.empty(pieces, heads, dtype=torch.float32, device=q.device)
    views = form.views(pages)
    latent, rope = (views[p.name] for p in form.data)
    scale = views.get(SCALE, latent)
    lengths = indices if topk_length is None else topk_length
    sink = None if attn_sink is None else attn_sink.contiguous()
    attend[grid](
        q, latent, scale, rope, indices, lengths, lse if sink is None else sink, out, lse, part,
        part_lse, lse if schedule is None else schedule, lse if num_splits is None else num_splits,
        softmax_scale * LOG2E.value, rows, next_n, heads, k, page_size, pages.shape[0] * page_size,
        span, *q.stride()[:3], *latent.stride()[:2], *scale.stride()[:2], *rope.stride()[:2],
        *indices.stride(), *lengths.stride()[:2],
        L=form.data[0].count, R=form.data[1].count, DV=dim_v, DL=min(dim_v, form.data[0].count),
        GROUP=form.group, BL=wide, BR=narrow, BH=config.heads, BN=config.keys,
        HAS_LEN=topk_length is not None, HAS_SINK=attn_sink is not None,
        MATH={torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(math, tl.float32),
        PLANNED=schedule is not None, BW=max(1, 1 << (workers - 1).bit_length()), BLOCK=BLOCK,
        num_stages=1, **config.options,
    )  # fmt: skip
    if splits > 1:
        join(part, part_lse, num_splits, sink, out, lse, splits)
    return out, lse


def join(
    part: Tensor, part_lse: Tensor, num_splits: Tensor | None, attn_sink: Tensor | None,
    out: Tensor, lse: Tensor, splits: int,
) -> None:  # fmt: skip
    """Partial results [pieces, heads, dim_v] to `out` [batch, next_n, heads, dim_v] and `lse`:
    as `num_splits` says, or, without it, `splits` for each row."""
    from dsa_hal.backends.portable._kernels.combine import combine

    batch, next_n, heads, dim_v = out.shape
    combine[batch * next_n, heads](
        part, part_lse, lse if num_splits is None else num_splits,
        lse if attn_sink is None else attn_sink, out, lse, heads, next_n, splits,
        DV=dim_v, BV=max(16, 1 << (dim_v - 1).bit_length()), BP=8,
        HAS_SINK=attn_sink is not None, PLANNED=num_splits is not None, num_warps=4,
    )  # fmt: skip
