"""The products' plans for NVIDIA GPUs, and the plain Triton bodies under Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from dsa_hal.backends.cuda import _gemm
from dsa_hal.backends.portable import gemm as portable
from dsa_hal.ops.gemm import MODEL_SHAPES, fp8_gemm, grouped_fp8_gemm, grouped_fp8_gemm_masked
from dsa_hal.target import Target

HOPPER = Target("cuda", "sm90", "cuda")
KEY_SIZES = [
    dict(rows=rows, n=n, k=k, groups=groups)
    for n, k in (*MODEL_SHAPES.values(), (200, 208), (128, 16))
    for rows in (1, 16, 64, 128, 256, 4096)
    for groups in (1, 32)
]


@pytest.mark.parametrize("facts", KEY_SIZES, ids=lambda f: "-".join(map(str, f.values())))
def test_tiles_fit_the_processor(facts: dict[str, int]) -> None:
    """Shared memory, registers and clusters of every legal tile stay within an H200's limits."""
    found = _gemm.tiles(**facts)
    assert found
    for tile in found:
        room = (228 << 10) // tile.blocks - 1024
        assert _gemm.shared_bytes(tile, wide=False) <= room
        assert tile.split in (1, 2, 4, 8)
        if tile.split > 1:  # parts that are added lie where the stages were
            assert 4 * tile.mt * (tile.nt + 4) <= tile.stages * (tile.nt + tile.mt) * 128
        assert tile.nt <= 256 and tile.mt <= 128 and tile.mt % 8 == 0, "limits of one copy"
        sums = (tile.waves + 1) * tile.mt // 2
        assert sums <= (200 if tile.blocks == 1 and tile.wgs <= 2 else 136), "registers"


def test_few_rows_keep_every_processor_busy() -> None:
    """Where the weights' bytes are the limit, k is split until the blocks cover the device."""
    for name in ("qkv_a", "o", "down", "q_b"):
        n, k = MODEL_SHAPES[name]
        tile = _gemm.tiles(rows=64, n=n, k=k, groups=1)[0]
        assert -(-n // tile.nt) * tile.split >= 0.95 * _gemm.PROCESSORS, (name, tile)


@pytest.mark.parametrize("shape", [(128, 200), (130, 256), (128, 0), (0, 128)])
def test_weights_that_the_copy_engine_cannot_read(shape: tuple[int, int]) -> None:
    b = torch.empty(shape, dtype=torch.float8_e4m3fn, device="meta")
    assert str(list(shape)) in (_gemm.weights_wrong(b) or "")


@pytest.mark.parametrize("name", MODEL_SHAPES)
def test_the_models_weights_are_served(name: str) -> None:
    b = torch.empty(MODEL_SHAPES[name], dtype=torch.float8_e4m3fn, device="meta")
    assert _gemm.weights_wrong(b) is None


def test_copies_are_made_only_of_what_cannot_be_read() -> None:
    """Rows 16 bytes apart from a multiple of 16 are read in place, others from a copy."""
    wide = torch.zeros(4, 96, dtype=torch.uint8)
    base = wide.data_ptr() % 16
    for view, copied in ((wide[1:, :64], bool(base)), (wide[:, 8:72], base != 8)):
        read = _gemm._readable(view)
        assert read.shape == (1, *view.shape) and torch.equal(read[0], view)
        assert (read.data_ptr() != view.data_ptr()) == copied


@pytest.mark.parametrize("op", [fp8_gemm, grouped_fp8_gemm, grouped_fp8_gemm_masked])
def test_every_case_is_served(op: Any) -> None:
    """Whoever else refuses, one implementation of this backend takes each case."""
    own = [i for i in op.implementations(HOPPER) if i.backend == "cuda"]
    assert {i.name for i in own} == {"cuda", "triton"}
    for case in op.cases:
        inputs = case.make(op.inputs, "meta")
        assert any(i.why_not(**inputs) is None for i in own), case.name


@pytest.mark.parametrize("rows", [1, 17, 64, 100, 4096])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_portable_tiles_fit(rows: int, size: int) -> None:
    for tile in portable.tiles(rows=rows, n=576, bytes=size):
        assert tile.stages >= 2
        assert tile.stages * (tile.bm + tile.bn) * tile.bk * size <= 96 << 10
        assert tile.bm * tile.bn <= 128 * 32 * tile.warps, "fp32 sums in registers"


JUDGE = """
import torch
from dsa_hal import matrix
from dsa_hal.ops import gemm
from dsa_hal.selection import use
from dsa_hal.target import Target
with use(backend="cpu"):
    for name, case in (("fp8_gemm", "half_block"), ("fp8_gemm", "ragged"),
                       ("grouped_fp8_gemm", "ragged"), ("grouped_fp8_gemm_masked", "odd"),
                       ("grouped_gemm", "odd")):
        op = getattr(gemm, name)
        impl = next(i for i in op.implementations(Target("cuda", "sm90")) if i.name == "triton")
        row = matrix.Row(op, impl, next(c for c in op.cases if c.name == case))
        outcome = matrix.attempt(row)
        assert outcome.status == "ok", (name, case, outcome.detail, outcome.trace)
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_triton_bodies_under_the_interpreter() -> None:
    """The matrix's twists on the processor; outputs in fp32, as the interpreter's casts to bf16 do
    not round."""
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", JUDGE], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
