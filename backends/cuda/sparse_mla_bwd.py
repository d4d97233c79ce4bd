"""sparse_mla_bwd on NVIDIA GPUs."""

from torch import Tensor

from dsa_hal.backends.portable import sparse_mla_bwd as portable
from dsa_hal.backends.portable.sparse_mla_bwd import SPACES, Tile
from dsa_hal.ops.training import sparse_mla_bwd


def _weigh(limits: object, *, heads: int, bytes: int) -> list[Tile]:
    """Two products [heads, keys] in registers, columns one after another."""
    if bytes == 4:
        return [Tile(16 if heads <= 16 else 32, 32, 32, 4, 2)]
    if heads <= 32:
        return [Tile(16 if heads <= 16 else 32, 64, 64, 4, 3)]
    found = [Tile(64, 128, 64, 8, 3), Tile(64, 64, 64, 4, 3), Tile(64, 128, 64, 4, 3)]
    return [Tile(128, 128, 64, 8, 3), *found] if heads > 64 else found


def _pull(limits: object, *, heads: int, bytes: int) -> list[Tile]:
    """One product [heads, columns] in registers, keys one after another."""
    if bytes == 4:
        return [Tile(16 if heads <= 16 else 32, 32, 64, 4, 2)]
    if heads <= 32:
        return [Tile(16 if heads <= 16 else 32, 64, 128, 4, 3)]
    found = [Tile(64, 64, 128, 4, 3), Tile(64, 64, 256, 8, 3)]
    return [Tile(128, 64, 128, 8, 3), *found] if heads > 64 else found


def _push(limits: object, *, heads: int, bytes: int) -> list[Tile]:
    """One product [keys, columns] in registers, heads one after another."""
    if bytes == 4:
        return [Tile(16 if heads <= 16 else 32, 32, 64, 4, 2)]
    block = 16 if heads <= 16 else 32 if heads <= 32 else 64
    return [Tile(block, 128, 128, 8, 2), Tile(block, 64, 128, 4, 2), Tile(block, 64, 64, 4, 3)]


for _step, _tiles in (("weigh", _weigh), ("pull", _pull), ("push", _push)):
    SPACES[_step].on("cuda", _tiles)


def _why_not(
    q: Tensor, kv: Tensor, indices: Tensor, out: Tensor, lse: Tensor, dout: Tensor, *,
    softmax_scale: float, dim_v: int = 512, topk_length: Tensor | None = None,
    deterministic: bool = False,
) -> str | None:  # fmt: skip
    return portable.why_not(q.dtype)


@sparse_mla_bwd.impl(
    "cuda", "triton", contract=1, arch=("sm90",), needs=("triton>=3.6",), rank=2, promises=(),
    why_not=_why_not,
)  # fmt: skip
def tiled(
    q: Tensor, kv: Tensor, indices: Tensor, out: Tensor, lse: Tensor, dout: Tensor, *,
    softmax_scale: float, dim_v: int = 512, topk_length: Tensor | None = None,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A program per query and block of heads; gradients of keys are added up atomically."""
    return portable.differentiated(
        q, kv, indices, out, lse, dout, softmax_scale=softmax_scale, dim_v=dim_v,
        topk_length=topk_length, repeats=False, precision="tf32x3",
    )  # fmt: skip


@sparse_mla_bwd.impl(
    "cuda", "triton_ordered", contract=1, arch=("sm90",), needs=("triton>=3.6",), rank=1,
    why_not=_why_not,
)  # fmt: skip
def repeating(
    q: Tensor, kv: Tensor, indices: Tensor, out: Tensor, lse: Tensor, dout: Tensor, *,
    softmax_scale: float, dim_v: int = 512, topk_length: Tensor | None = None,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same, but what queries give to keys is written down, and summed in their order."""
    return portable.differentiated(
        q, kv, indices, out, lse, dout, softmax_scale=softmax_scale, dim_v=dim_v,
        topk_length=topk_length, repeats=True, precision="tf32x3",
    )  # fmt: skip
