"""dense_mla and mha_prefill in Triton: which tiles, how keys are split, and the launches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsa_hal.autotune.space import Launched, Space
from dsa_hal.backends.portable import processors


@dataclass(frozen=True)
class Config(Launched):
    """Rows and keys of a tile, warps and stages of a program."""

    rows: int
    keys: int
    warps: int
    stages: int


def _legal(*, rows: int, width: int, size: int) -> list[Config]:
    """For so many rows that share keys of `width` columns of `size` bytes."""
    most = max(16, power_of_two(rows))
    if size == 4:
        return [Config(16, 16, 8, 1)]
    if width > 256:
        found = [Config(64, 32, 8, 2), Config(64, 32, 8, 1), Config(32, 32, 4, 2)]
    else:
        found = [
            Config(128, 64, 8, 3), Config(128, 64, 8, 2), Config(128, 32, 8, 3),
            Config(64, 64, 4, 3), Config(64, 64, 4, 2), Config(64, 32, 4, 3), Config(128, 32, 4, 2),
        ]  # fmt: skip
    return [c for c in found if c.rows <= most] or [Config(most, 32, 4, 2)]


SPACES = {op: Space(f"{op}/triton", Config, _legal) for op in ("dense_mla", "mha_prefill")}


def why_not(dtype: torch.dtype, dim: int, dim_v: int) -> str | None:
    """What the kernels cannot do, or None."""
    if dim > 1024 or dim_v > 512:
        return f"keys have {dim} columns and values {dim_v}; it takes up to 1024 and 512"
    return None


def attended(
    q: Tensor, k: Tensor, v: Tensor, ks: Tensor, ke: Tensor, indices: Tensor | None, *,
    softmax_scale: float, shared: bool, precision: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out [tokens, heads, dim_v] and lse [tokens, heads] of q [tokens, heads, dim] on keys
    k [context, kv_heads, dim] and values v [context, kv_heads, dim_v]. `shared`: v is the first
    columns of k; `precision`: how Triton multiplies fp32 on this backend."""
    from dsa_hal.backends.portable._kernels import dense_attention as kernels

    (tokens, heads, dim), (context, kv_heads, dim_v) = q.shape, v.shape
    out = torch.empty(tokens, heads, dim_v, dtype=q.dtype, device=q.device)
    lse = torch.empty(tokens, heads, device=q.device)
    if tokens == 0:
        return out, lse
    q, k, v, ks, ke = (without_gaps(t) for t in (q, k, v, ks, ke))
    words = anyone = ks  # not read without indices
    if indices is not None:
        words = torch.zeros(tokens + 1, -(-context // 32), dtype=torch.int32, device=q.device)
        words, anyone = words[:-1], words[-1]
        indices, count = without_gaps(indices), indices.shape[1]
        kernels.mark[(tokens, -(-count // 1024))](
            indices, ks, ke, words, anyone, indices.stride(0), words.stride(0), count, BLOCK=1024
        )
    main = 1 << (dim.bit_length() - 1)
    wide = power_of_two(dim_v)
    if shared:
        main = wide
    rest = power_of_two(dim - main) if dim > main else 16
    total = tokens * (heads // kv_heads)
    space = SPACES["dense_mla" if shared else "mha_prefill"]
    config = space.pick(rows=min(total, 128), width=dim, size=q.element_size())
    rows = config.rows
    blocks = -(-total // rows)
    most = 2 * processors.count(q.device) // max(1, blocks * kv_heads)
    splits = max(1, min(-(-context // 256), most, 64))
    part, part_lse = out, lse
    if splits > 1:
        part = torch.empty(splits, tokens, heads, dim_v, device=q.device)
        part_lse = torch.empty(splits, tokens, heads, device=q.device)
    kernels.attend[(blocks, kv_heads, splits)](
        q, k, v, ks, ke, words, anyone, part, part_lse,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        words.stride(0), tokens, heads, kv_heads, splits, softmax_scale,
        WIDTH=dim, VALUES=dim_v, WIDTH_BLOCK=main, REST_BLOCK=rest, VALUE_BLOCK=wide,
        SHARED=shared, MASKED=indices is not None, PARTIAL=splits > 1,
        PLAIN=q.dtype == torch.float32, ROWS_BLOCK=rows, KEYS_BLOCK=config.keys,
        PRECISION=precision, **config.options,
    )  # fmt: skip
    if splits > 1:
        merge(part, part_lse, out, lse)
    return out, lse


def without_gaps(t: Tensor) -> Tensor:
    """`t`, or a copy where its last axis has gaps: kernels step along it by one."""
    return t if t.stride(-1) == 1 or t.shape[-1] < 2 else t.contiguous()


def merge(part: Tensor, part_lse: Tensor, out: Tensor, lse: Tensor) -> None:
    """out [tokens, heads, dim_v] and lse [tokens, heads] of parts [splits, ...] of the keys."""
    from dsa_hal.backends.portable._kernels import dense_attention as kernels

    splits, tokens, heads, values = part.shape
    kernels.merge[(tokens * heads, -(-values // 128))](
        part, part_lse, out, lse, tokens * heads, splits, VALUES=values,
        SPLITS_BLOCK=1 << (splits - 1).bit_length(), COLUMNS_BLOCK=min(128, power_of_two(values)),
    )  # fmt: skip


def power_of_two(columns: int) -> int:
    """The least width of a tile, a power of two, that holds so many columns."""
    return max(16, 1 << (columns - 1).bit_length())
