"""Launches of the products in CUDA C++: FP8 alone, by rows' groups and by masked groups; bf16 and
fp16 by rows' groups."""

from __future__ import annotations

import struct
from functools import cache

import torch
from torch import Tensor

from dsa_hal.backends.cuda import _nvrtc
from dsa_hal.backends.cuda._gemm_tiles import (
    BLOCK,
    FLOATS,
    PROCESSORS,
    SPACES,
    Tile,
    floats_bytes,
    shared_bytes,
)

OUTS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
ONE, MASKED, UNITS = 0, 1, 2
"""The kernels' MODE: what is multiplied, see gemm_tiles.cuh."""

ARGS = struct.Struct("<3Q 4q 4i")
"""`Args` of gemm_tiles.cuh."""


def weights_wrong(b: Tensor, multiple: int = 16) -> str | None:
    """Why the kernels cannot compute with weights [n, k] or [groups, n, k]; rows of k begin at
    multiples of 16 bytes, which are `multiple` elements."""
    n, k = b.shape[-2:]
    if 0 in b.shape or n % 8 or k % multiple:
        return (
            f"b has shape {list(b.shape)}; this kernel needs no empty axis, n a multiple of 8, and"
            f" k of {multiple}"
        )
    return None


def fp8(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out_dtype: torch.dtype) -> Tensor:
    """`fp8_gemm`: [m, n]."""
    (m, k), n = a.shape, b.shape[0]
    out = a.new_empty((m, n), dtype=out_dtype)
    if out.numel():
        tile = SPACES["fp8_gemm"].pick(rows=_bucket(m), n=n, k=k, groups=1)
        _launch(tile, ONE, a, a_scale, b, b_scale, out, None, -(-m // tile.height))
    return out


def masked(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, masked_m: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """`grouped_fp8_gemm_masked`: [groups, max_m, n]."""
    (groups, m, k), n = a.shape, b.shape[1]
    out = a.new_empty((groups, m, n), dtype=out_dtype)
    if out.numel():
        space = SPACES["grouped_fp8_gemm_masked"]
        tile = space.pick(rows=_bucket(m), n=n, k=k, groups=groups)
        units = groups * -(-m // tile.height)
        _launch(tile, MASKED, a, a_scale, b, b_scale, out, masked_m.contiguous(), units)
    return out


def grouped(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, layout: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """`grouped_fp8_gemm`: [m, n]."""
    (m, k), (groups, n, _) = a.shape, b.shape
    out = a.new_empty((m, n), dtype=out_dtype)
    if out.numel():
        rows = _bucket(-(-m // groups))
        tile = SPACES["grouped_fp8_gemm"].pick(rows=rows, n=n, k=k, groups=groups)
        plan, units = _units(layout, groups, tile.height)
        _launch(tile, UNITS, a, a_scale, b, b_scale, out, plan, units)
    return out


def grouped_floats(a: Tensor, b: Tensor, layout: Tensor) -> Tensor:
    """`grouped_gemm` of bf16 or fp16: [m, n]."""
    (m, k), (groups, n, _) = a.shape, b.shape
    out = a.new_empty((m, n))
    if out.numel():
        tile = FLOATS.pick(n=n, groups=groups)
        plan, units = _units(layout, groups, tile.mt)
        a, b = _readable(a), _readable(b)
        args = ARGS.pack(0, 0, _nvrtc.address(plan), 0, 0, 0, 0, m, n, -(-k // tile.bk), groups)
        macros = (("WAVES", tile.waves), ("STAGES", tile.stages), ("MODE", UNITS))
        module = _nvrtc.module("grouped_gemm.cu", (*macros, ("OUT", OUTS[out.dtype])))
        maps = [_map(b, tile.nt, tile.bk), _map(a, tile.mt, tile.bk)]
        grid = min(PROCESSORS, units * -(-n // tile.nt))
        module.launch(
            "product", (grid,), (tile.threads,), (*maps, args, out), shared=floats_bytes(tile)
        )
    return out


def _units(layout: Tensor, groups: int, height: int) -> tuple[Tensor, int]:
    """The stretches of rows of one group, each at most `height` long, and how many there are at
    most if rows of one group stand together. Where they do not, there are more, and blocks take
    several."""
    m = layout.shape[0]
    plan = layout.new_empty(4 + 2 * m)
    module = _nvrtc.module("gemm_units.cu", (("MT", height),))
    module.launch("units", (1,), (1024,), (layout.contiguous(), plan, m, groups))
    return plan, -(-m // height) + 2 * groups


def _launch(
    tile: Tile, mode: int, a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out: Tensor,
    plan: Tensor | None, units: int,
) -> None:  # fmt: skip
    """Launch one kind of the FP8 kernels on about `units` tiles of rows."""
    a, b = _readable(a), _readable(b)
    a_scale, b_scale = _dense(a_scale), _dense(b_scale)
    groups, n, k = b.shape
    args = ARGS.pack(
        _nvrtc.address(a_scale), _nvrtc.address(b_scale), _nvrtc.address(plan),
        a_scale.stride(0), a_scale.stride(-2), b_scale.stride(0), b_scale.stride(-2),
        a.shape[-2], n, -(-k // BLOCK), groups,
    )  # fmt: skip
    count = units * -(-n // tile.nt)
    if tile.split == 1:  # blocks take one tile after another
        count = min(count, PROCESSORS * tile.blocks // tile.pair)
    cluster = tile.split * tile.pair
    _module(tile, OUTS[out.dtype], mode).launch(
        "product",
        (count * cluster,),
        (tile.threads,),
        (_map(b, tile.nt // tile.pair, BLOCK), _map(a, tile.mt, BLOCK), args, out),
        shared=shared_bytes(tile, turned=out.dtype != torch.float32),
        cluster=(cluster,) if cluster > 1 else None,
        overlap=mode == ONE and not tile.waves and tile.blocks == 1,
    )


@cache
def _module(tile: Tile, out: int, mode: int) -> _nvrtc.Module:
    common = (("STAGES", tile.stages), ("OUT", out), ("MODE", mode))
    if tile.waves:
        many = (("WAVES", tile.waves), ("WIDTH", tile.width), ("PAIR", tile.pair))
        return _nvrtc.module("fp8_gemm_wide.cu", (*common, *many, ("AHEAD", tile.ahead)))
    few = (("MT", tile.mt), ("WGS", tile.wgs), ("COLUMNS", tile.columns), ("SPLIT", tile.split))
    return _nvrtc.module("fp8_gemm.cu", (*common, *few, ("BLOCKS", tile.blocks)))


def _readable(t: Tensor) -> Tensor:
    """t [rows, k] or [groups, rows, k] with its group axis, or a copy where the copy engine could
    not read it: addresses and strides are multiples of 16 bytes there, and no row is another. The
    caller keeps it until the launch, as maps hold addresses alone."""
    far = all(s and s * t.element_size() % 16 == 0 for s in t.stride()[:-1])
    if t.stride(-1) != 1 or t.data_ptr() % 16 or not far:
        t = t.clone(memory_format=torch.contiguous_format)
    return t if t.dim() == 3 else t.unsqueeze(0)


def _map(t: Tensor, rows: int, columns: int) -> bytes:
    """What the copy engine must know of [groups, rows, k] to copy [rows, columns]."""
    _nvrtc.address(t)  # raises for host memory, where the copy engine would find nothing
    return _nvrtc.tensor_map(t, (1, rows, columns), swizzle=128)


def _dense(scale: Tensor) -> Tensor:
    """The kernels take any strides but the last axis's."""
    return scale if scale.stride(-1) == 1 or scale.shape[-1] == 1 else scale.contiguous()


def _bucket(rows: int) -> int:
    """The power of two that is not less, so that few tiles are remembered."""
    return 1 << max(0, rows - 1).bit_length()
