"""sparse_mla_paged on Ascend."""

from torch import Tensor

from dsa_hal.backends.npu._attention import compacted
from dsa_hal.backends.npu._rows import by_chunks
from dsa_hal.backends.npu.sparse_mla import attend, refused
from dsa_hal.ops.attention import sparse_mla_paged
from dsa_hal.ops.layout import KVLayout


def _why_not(
    q: Tensor, pages: Tensor, indices: Tensor, *, layout: str, softmax_scale: float,
    dim_v: int = 512, attn_sink: Tensor | None = None, topk_length: Tensor | None = None,
    schedule: Tensor | None = None, num_splits: Tensor | None = None,
) -> str | None:  # fmt: skip
    form = KVLayout.parse(layout)
    if form.order != "split":
        return (
            "gives a log-sum-exp only of keys that lie row by row, latents and rotated parts in a"
            f" piece each (latent_bf16_split); layout {layout} keeps them in {form.order} order"
        )
    if dim_v != form.data[0].count:
        return f"a value is the latent's {form.data[0].count} columns; dim_v is {dim_v}"
    slots = pages.shape[0] * pages.shape[1]
    return refused(q, slots, form.data[0].dtype, indices, softmax_scale, dim_v, attn_sink)


@sparse_mla_paged.impl(
    "npu", "sparse_flash_attention", contract=1, why_not=_why_not, promises=("lse=natural",)
)
def sparse_paged(
    q: Tensor, pages: Tensor, indices: Tensor, *, layout: str, softmax_scale: float,
    dim_v: int = 512, attn_sink: Tensor | None = None, topk_length: Tensor | None = None,
    schedule: Tensor | None = None, num_splits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The pool is one long list of rows, and slots are its numbers: read by pages, the kernel would
    keep the softmax's maximum and sum to itself. It plans its work without a schedule."""
    batch, next_n, heads, _ = q.shape
    parts = KVLayout.parse(layout).views(pages)
    lengths = None if topk_length is None else topk_length.flatten()
    out, _, lse = attend(
        q.flatten(0, 1), parts["latent"].flatten(0, 1), parts["rope"].flatten(0, 1),
        compacted(indices.flatten(0, 1), lengths), softmax_scale,
    )  # fmt: skip
    lse = lse.view(batch, next_n, heads).transpose(1, 2)
    return out.view(batch, next_n, heads, dim_v), lse.contiguous()


@sparse_mla_paged.impl(
    "npu", "torch", contract=1, rank=-1,
    promises=("deterministic", "lse=natural"),
)  # fmt: skip
def gathered(
    q: Tensor, pages: Tensor, indices: Tensor, *, layout: str, softmax_scale: float,
    dim_v: int = 512, attn_sink: Tensor | None = None, topk_length: Tensor | None = None,
    schedule: Tensor | None = None, num_splits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Some requests at a time, whose records are gathered and decoded."""

    def some(rows: slice) -> tuple[Tensor, Tensor]:
        return sparse_mla_paged.reference(
            q[rows], pages, indices[rows], layout=layout, softmax_scale=softmax_scale, dim_v=dim_v,
            attn_sink=attn_sink, topk_length=None if topk_length is None else topk_length[rows],
        )  # fmt: skip

    batch, next_n, heads, dim = q.shape
    out, lse = by_chunks(batch, 4 * next_n * indices.shape[2] * (dim + heads), some)
    return out, lse.contiguous()
