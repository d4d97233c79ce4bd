"""sparse_mla_paged on AMD Instinct."""

from torch import Tensor

from dsa_hal.backends.portable import layouts, processors
from dsa_hal.backends.portable.sparse_paged import forward
from dsa_hal.backends.rocm import _gluon
from dsa_hal.backends.rocm._tiles import ARCHES, NEEDS
from dsa_hal.ops.attention import sparse_mla_paged


def _tiled_why_not(
    q: Tensor, pages: Tensor, indices: Tensor, *, layout: str, softmax_scale: float,
    dim_v: int = 512, attn_sink: Tensor | None = None, topk_length: Tensor | None = None,
    schedule: Tensor | None = None, num_splits: Tensor | None = None,
) -> str | None:  # fmt: skip
    return layouts.unknown(layout)


@sparse_mla_paged.impl(
    "rocm", "triton", contract=1, arch=ARCHES, needs=NEEDS,
    promises=("deterministic", "lse=natural"), why_not=_tiled_why_not,
)  # fmt: skip
def tiled(
    q: Tensor, pages: Tensor, indices: Tensor, *, layout: str, softmax_scale: float,
    dim_v: int = 512, attn_sink: Tensor | None = None, topk_length: Tensor | None = None,
    schedule: Tensor | None = None, num_splits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Any dtype, any number of heads. Keys are split by shapes and the number of
    compute units alone, or as the schedule says."""
    return forward(
        q, pages, indices, layout=layout, softmax_scale=softmax_scale, dim_v=dim_v,
        attn_sink=attn_sink, topk_length=topk_length, schedule=schedule, num_splits=num_splits,
        processors=processors.count(q.device),
    )  # fmt: skip


def _why_not(
    q: Tensor, pages: Tensor, indices: Tensor, *, layout: str, softmax_scale: float,
    dim_v: int = 512, attn_sink: Tensor | None = None, topk_length: Tensor | None = None,
    schedule: Tensor | None = None, num_splits: Tensor | None = None,
) -> str | None:  # fmt: skip
    return _gluon.sparse_why_not(q, layout, dim_v, schedule)


@sparse_mla_paged.impl(
    "rocm", "gluon", contract=1, arch=_gluon.ARCHES, needs=_gluon.NEEDS, rank=_gluon.RANK,
    promises=("deterministic", "lse=natural"), why_not=_why_not,
)  # fmt: skip
def gathered(
    q: Tensor, pages: Tensor, indices: Tensor, *, layout: str, softmax_scale: float,
    dim_v: int = 512, attn_sink: Tensor | None = None, topk_length: Tensor | None = None,
    schedule: Tensor | None = None, num_splits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """FP8 records, decoded on their way into matrix instructions. Never run on a device: its
    arithmetic was interpreted, its machine code compiled."""
    return _gluon.sparse(
        q, pages, indices, layout=layout, softmax_scale=softmax_scale, dim_v=dim_v,
        attn_sink=attn_sink, topk_length=topk_length,
    )  # fmt: skip
