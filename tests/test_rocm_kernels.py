"""Gluon kernels for gfx950, without the card: what they compute, and what they compile to."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dsa_hal.backends.rocm import _gluon

HERE = Path(__file__).parent


def test_they_compute_what_the_references_do() -> None:
    """In a process of its own, whose Triton interprets."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{HERE}:{HERE.parent}"}
    done = subprocess.run(
        [sys.executable, "-m", "gluon_on_host"],
        env=environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert done.returncode == 0, "\n".join([*lines, done.stderr[-2000:]])
    assert len(lines) >= 14 and all(line.endswith(" ok") for line in lines)


@pytest.mark.parametrize("tile", _gluon.sparse_tiles(heads=128), ids=str)
def test_they_fit_a_compute_unit(tile: _gluon.SparseTile) -> None:
    """Machine code for gfx950: products of bf16 alone, FP8 read transposed out of LDS, no register
    spilled, LDS within 160 KiB."""
    triton = pytest.importorskip("triton")
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 7):
        pytest.skip("Triton 3.6 spills registers of these kernels, which ask for 3.7")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("Triton interprets in this process, and compiles nothing")
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    from dsa_hal.backends.rocm._kernels.sparse_paged import attend

    constants = {
        "HAS_LEN": True, "HAS_SINK": True, "DIRECT": True, "PAGE": 64, "BH": tile.heads,
        "BN": tile.keys, "WN": tile.shared_by, "HELD": tile.held,
    }  # fmt: skip
    types = {
        "Q": "*bf16", "LATENT": "*fp8e4nv", "SCALE": "*fp32", "ROPE": "*bf16", "IDX": "*i32",
        "LEN": "*i32", "SINK": "*fp32", "OUT": "*bf16", "LSE": "*fp32", "PART": "*bf16",
        "PART_LSE": "*fp32", "scale_log2": "fp32",
    }  # fmt: skip
    names = attend.arg_names
    dense = {name for name in names if re.match(r"s[qlr]_|si_[bn]|k$|span", name)}
    source = GluonASTSource(
        attend,
        {name: "constexpr" if name in constants else types.get(name, "i32") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {
            (at,): [["tt.divisibility", 16]]
            for at, name in enumerate(names)
            if name in dense or types.get(name, "")[:1] == "*"
        },
    )
    made = triton.compile(
        source, target=GPUTarget("hip", "gfx950", 64), options={"num_warps": tile.warps}
    )
    text = made.asm["amdgcn"]
    assert made.metadata.shared <= 160 << 10
    assert re.search(r"\.vgpr_spill_count: +0\b", text), "registers are spilled"
    assert set(re.findall(r"\bv_mfma\w+", text)) == {"v_mfma_f32_32x32x16_bf16"}
    assert "ds_read_b64_tr_b8" in text and "buffer_load_dwordx4" in text
