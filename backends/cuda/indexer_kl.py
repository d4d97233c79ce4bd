"""indexer_kl on NVIDIA GPUs."""

from torch import Tensor

from dsa_hal.backends.portable import indexer_kl as portable
from dsa_hal.backends.portable.indexer_kl import SPACES, Tile
from dsa_hal.ops.training import indexer_kl


def _attend(limits: object, *, heads: int, width: int, bytes: int) -> list[Tile]:
    """One product [heads, keys] in registers, columns one after another."""
    if bytes == 4:
        return [Tile(16 if heads <= 16 else 32, 64, 32, 4, 2)]
    if heads <= 32:
        return [Tile(16 if heads <= 16 else 32, 128, 64, 4, 3)]
    if heads <= 64:
        return [Tile(64, 128, 64, 4, 3), Tile(64, 128, 64, 8, 3)]
    return [Tile(128, 128, 64, 8, 3), Tile(64, 128, 64, 4, 3), Tile(128, 256, 64, 8, 3)]


def _index(limits: object, *, heads: int, width: int, bytes: int) -> list[Tile]:
    """Queries and keys whole in shared memory."""
    block = 16 if heads <= 16 else 32 if heads <= 32 else 64
    if bytes == 4:
        return [Tile(16, 32, 0, 4, 1)]
    return [Tile(block, 64, 0, 4, 2), Tile(block, 64, 0, 8, 2), Tile(block, 128, 0, 8, 2)]


def _push(limits: object, *, heads: int, width: int, bytes: int) -> list[Tile]:
    """The same without stages: programs beside each other hide more."""
    block = 16 if heads <= 16 else 32 if heads <= 32 else 64
    if bytes == 4:
        return [Tile(16, 32, 0, 4, 1)]
    return [Tile(block, 64, 0, 4, 1), Tile(block, 64, 0, 4, 2), Tile(block, 128, 0, 8, 1)]


SPACES["attend"].on("cuda", _attend)
SPACES["push"].on("cuda", _push)
for _step in ("score", "pull"):
    SPACES[_step].on("cuda", _index)


def _why_not(
    q_index: Tensor, k_index: Tensor, weights: Tensor, q: Tensor, kv: Tensor,
    ks: Tensor | None = None, ke: Tensor | None = None, indices: Tensor | None = None,
    row_weight: Tensor | None = None, *, softmax_scale: float,
) -> str | None:  # fmt: skip
    return portable.why_not(q_index, q)


@indexer_kl.impl(
    "cuda", "triton", contract=1, arch=("sm90",), needs=("triton>=3.6",), rank=2, promises=(),
    why_not=_why_not,
)  # fmt: skip
def tiled(
    q_index: Tensor, k_index: Tensor, weights: Tensor, q: Tensor, kv: Tensor,
    ks: Tensor | None = None, ke: Tensor | None = None, indices: Tensor | None = None,
    row_weight: Tensor | None = None, *, softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Five kernels, six for ranges of keys; gradients of keys are added up atomically."""
    return portable.divergence(
        q_index, k_index, weights, q, kv, ks, ke, indices, row_weight,
        softmax_scale=softmax_scale, repeats=False, precision="tf32x3",
    )  # fmt: skip


@indexer_kl.impl(
    "cuda", "triton_ordered", contract=1, arch=("sm90",), needs=("triton>=3.6",), rank=1,
    why_not=_why_not,
)  # fmt: skip
def repeating(
    q_index: Tensor, k_index: Tensor, weights: Tensor, q: Tensor, kv: Tensor,
    ks: Tensor | None = None, ke: Tensor | None = None, indices: Tensor | None = None,
    row_weight: Tensor | None = None, *, softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The same, but what queries give to keys is written down, and summed in their order."""
    return portable.divergence(
        q_index, k_index, weights, q, kv, ks, ke, indices, row_weight,
        softmax_scale=softmax_scale, repeats=True, precision="tf32x3",
    )  # fmt: skip
