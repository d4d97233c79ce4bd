"""The row-wise ops on NVIDIA GPUs, as far as a machine without one can tell: tiles, predicates,
where parts of a record lie, and, where Triton is installed, kernels in its interpreter."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from foreign import foreign

from dsa_hal.backends.portable.rows import LANES, SPACES, WIDEST, dense, flat, power_of_two
from dsa_hal.ops.layout import SCALE, KVLayout
from dsa_hal.registry import Impl
from dsa_hal.selection import OPS


def own(name: str) -> Impl[..., Any]:
    """The Triton implementation of an op, whatever machine this is."""
    importlib.import_module(f"dsa_hal.backends.cuda.{name}")
    return OPS[name]._impls["cuda/triton"]


@pytest.mark.parametrize("name", SPACES)
def test_every_tile_fits_its_threads(name: str) -> None:
    """Powers of two that a program can hold; the rows of matrix products are enough for them."""
    least = 16 if name in ("hadamard", "indexer_qk") else 1
    for width in (1, 16, 64, 128, 576, 2048, 8192, WIDEST):
        for rows in (1, 64, 4096, 1 << 22):
            width = power_of_two(width)
            found = SPACES[name].legal(rows=rows, width=width)
            assert found and len(set(found)) == len(found)
            for tile in found:
                assert power_of_two(tile.rows) == tile.rows >= least
                assert power_of_two(tile.warps) == tile.warps <= 16
            best = found[0]
            if least == 1:
                assert best.rows * width <= 64 * best.warps * LANES
                assert best.rows == 1 or rows // best.rows >= 512, "few rows are not gathered up"


@pytest.mark.parametrize("name", SPACES)
def test_no_case_of_the_matrix_is_refused(name: str) -> None:
    """But for int8 and pools in split order."""
    for case in OPS[name].cases:
        inputs = case.make(OPS[name].inputs, "meta")
        assert (own(name).why_not(**inputs) is None) != foreign(case), case.name


def test_what_cannot_be_held_is_refused_in_words() -> None:
    wide = torch.empty(2, WIDEST + 1, device="meta")
    weight = torch.empty(WIDEST + 1, device="meta")
    assert "32769" in str(own("rms_norm").why_not(wide, weight))
    assert "65536" in str(own("quantize_fp8").why_not(wide, group=256, block_rows=256))
    codes = torch.empty(2, 128, dtype=torch.float8_e4m3fn, device="meta")
    refused = own("dequantize_fp8").why_not(codes, weight[:1], out_dtype=torch.float64)
    assert "float64" in str(refused)


def test_views_stay_views() -> None:
    """Slices of wider tensors are not copied, transposed ones are."""
    wide = torch.arange(4 * 6 * 8).view(4, 6, 8)
    assert flat(wide[1:, :, :5]).data_ptr() == wide[1:].data_ptr()
    assert torch.equal(flat(wide[1:, :, :5]), wide[1:, :, :5].reshape(-1, 5))
    turned = dense(wide.mT)
    assert turned.stride(-1) == 1 and torch.equal(turned, wide.mT)


@pytest.mark.parametrize("spec", ["latent_fp8/512+64", "latent_bf16/512+64", "index_fp8/128"])
def test_parts_lie_where_the_layout_says(spec: str) -> None:
    """The kernels' numbers for a token's record against the layout's own views."""
    pytest.importorskip("triton")
    from dsa_hal.backends.portable._kernels import cache

    known = KVLayout.parse(spec)
    pages = known.empty(5, 16)
    op = "store_latent" if known.kind == "latent" else "store_index_key"
    _, plan = cache._plan(op, known, pages, 1)
    for part, view in zip(known.parts, known.views(pages).values(), strict=True):
        role = "SCALE" if part.name == SCALE else "VALUE" if part is known.parts[0] else "TAIL"
        start = view[0, 0].data_ptr() - pages.data_ptr()
        step = view[0, 1].data_ptr() - view[0, 0].data_ptr()
        assert plan[f"{role}_AT"] * part.dtype.itemsize == start
        assert plan[f"{role}_STEP"] * part.dtype.itemsize == step


INTERPRETED = {
    "rms_norm": ("one", "zero_row"), "layer_norm": ("half",), "add_rms_norm": ("half",),
    "rope": ("middle", "whole", "long"), "gather_latent": ("small", "skipped"),
    "dequantize_fp8": ("head64",), "silu_mul": ("odd",), "hadamard": ("half",),
}  # fmt: skip
"""Cases whose arithmetic Triton's interpreter has right; it rounds FP8 in its own way."""


def test_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "DSA_HAL_BACKEND": "cpu"}
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr


def interpret() -> int:
    from dsa_hal import matrix

    wrong = 0
    for name, cases in INTERPRETED.items():
        op, impl = OPS[name], own(name)
        for case in op.cases:
            if case.name in cases:
                inputs = case.make(op.inputs)
                report = matrix.compare(op, impl, inputs, matrix.wanted(op, inputs))
                if not report.ok:
                    wrong += 1
                    sys.stdout.write(f"{name}-{case.name}: {report}\n")
    return wrong


if __name__ == "__main__":
    import dsa_hal.ops  # noqa: F401  declares the ops

    sys.exit(interpret())
