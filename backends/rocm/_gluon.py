"""Launches of the Gluon kernels for gfx950. None has been run on a device: what was proved is in
ci/notes/rocm/kernels.md, and the portable programs rank before them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsa_hal.autotune.space import Launched, Space
from dsa_hal.backends.portable import processors
from dsa_hal.backends.portable.sparse_paged import BLOCK, forward, join, splits_of
from dsa_hal.ops.layout import SCALE, KVLayout

ARCHES = ("gfx950",)

NEEDS = ("triton>=3.7 | triton-rocm>=3.7",)
"""Triton 3.6 compiles them too, but spills registers."""

RANK = -1
"""Below the portable programs, which have been run."""

LATENT = "latent_fp8/512+64"

REACH = 1 << 31
"""Bytes that an offset reaches; a larger pool is the portable program's."""


@dataclass(frozen=True)
class SparseTile(Launched):
    """Heads and keys of a tile, wavefronts with the same heads, and quarters of the queries that
    stay in registers."""

    heads: int
    keys: int
    shared_by: int
    held: int

    @property
    def warps(self) -> int:
        return self.heads // 32 * self.shared_by


def sparse_tiles(*, heads: int) -> Sequence[SparseTile]:
    """Those that neither spill nor leave LDS, by compile metrics; 32 heads go with a wavefront."""
    few = [SparseTile(32, 32, 2, 2)]
    return few if heads <= 32 else [SparseTile(64, 64, 2, 2), SparseTile(64, 32, 2, 4), *few]


SPARSE = Space(name="sparse_mla_paged/gluon", kind=SparseTile, legal=sparse_tiles)


def sparse_why_not(q: Tensor, layout: str, dim_v: int, schedule: Tensor | None) -> str | None:
    """What the kernel of `sparse` does not take."""
    if layout != LATENT or dim_v != 512:
        return f"layout is {layout} and dim_v {dim_v}; it takes {LATENT} and 512"
    if q.dtype != torch.bfloat16:
        return f"q is {q.dtype}; it takes bfloat16"
    if schedule is not None:
        return "a schedule is given; it splits rows by their number alone"
    return None


def sparse(
    q: Tensor, pages: Tensor, indices: Tensor, *, layout: str, softmax_scale: float, dim_v: int,
    attn_sink: Tensor | None, topk_length: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out and lse of `sparse_mla_paged` without a schedule."""
    from dsa_hal.backends.portable._kernels.sparse_paged import LOG2E
    from dsa_hal.backends.rocm._kernels.sparse_paged import attend

    (batch, next_n, heads, _), k, page_size = q.shape, indices.shape[-1], pages.shape[1]
    count = processors.count(q.device)
    if pages.shape[0] * pages.stride(0) >= REACH:
        return forward(
            q, pages, indices, layout=layout, softmax_scale=softmax_scale, dim_v=dim_v,
            attn_sink=attn_sink, topk_length=topk_length, schedule=None, num_splits=None,
            processors=count,
        )  # fmt: skip
    out = torch.empty(batch, next_n, heads, dim_v, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, next_n, dtype=torch.float32, device=q.device)
    if not out.numel():
        return out, lse
    q = q if q.stride(-1) == 1 else q.contiguous()
    config = SPARSE.pick(heads=heads)
    rows, head_blocks = batch * next_n, -(-heads // config.heads)
    blocks = -(-k // BLOCK)
    splits = splits_of(rows * head_blocks, blocks, count, blocks)
    part, part_lse = out, lse
    if splits > 1:
        part = torch.empty(rows * splits, heads, dim_v, dtype=torch.float32, device=q.device)
        part_lse = torch.empty(rows * splits, heads, dtype=torch.float32, device=q.device)
    form = KVLayout.parse(layout)
    views = form.views(pages)
    latent, rope = (views[p.name] for p in form.data)
    scale = views[SCALE]
    lengths = indices if topk_length is None else topk_length
    sink = None if attn_sink is None else attn_sink.contiguous()
    attend[rows * head_blocks, splits](
        q, latent, scale, rope, indices, lengths, lse if sink is None else sink, out, lse, part,
        part_lse, softmax_scale * LOG2E.value, next_n, heads, k, pages.shape[0] * page_size,
        -(-blocks // splits) * BLOCK, *q.stride()[:3], *latent.stride()[:2], *scale.stride()[:2],
        *rope.stride()[:2], *indices.stride(), *lengths.stride()[:2],
        HAS_LEN=topk_length is not None, HAS_SINK=sink is not None, DIRECT=splits == 1,
        PAGE=page_size, BH=config.heads, BN=config.keys, WN=config.shared_by, HELD=config.held,
        num_warps=config.warps,
    )  # fmt: skip
    if splits > 1:
        join(part, part_lse, None, sink, out, lse, splits)
    return out, lse
