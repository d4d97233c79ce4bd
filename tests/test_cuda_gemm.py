"""The products' plans for NVIDIA GPUs, and the plain Triton bodies under Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from dsa_hal.backends.cuda import _gemm, _gemm_tiles
from dsa_hal.backends.portable import gemm as portable
from dsa_hal.ops.gemm import (
    MODEL_SHAPES,
    fp8_gemm,
    grouped_fp8_gemm,
    grouped_fp8_gemm_masked,
    grouped_gemm,
)
from dsa_hal.selection import use
from dsa_hal.target import Target

HOPPER = Target("cuda", "sm90", "cuda")
CALLS = [
    dict(rows=rows, n=n, k=k, groups=groups)
    for n, k in (*MODEL_SHAPES.values(), (200, 208), (128, 16))
    for rows in (1, 16, 64, 128, 256, 4096)
    for groups in (1, 32)
]


@pytest.mark.parametrize("facts", CALLS, ids=lambda f: "-".join(map(str, f.values())))
def test_tiles_fit_the_processor(facts: dict[str, int]) -> None:
    """Shared memory, registers and clusters of every legal tile stay within an H200's limits."""
    for space in _gemm_tiles.SPACES.values():
        found = space.legal(**facts)
        assert found
        for tile in found:
            assert tile.blocks * (_gemm_tiles.shared_bytes(tile) + 1024) <= 228 << 10
            assert 1 <= tile.split <= 8 and tile.pair in (1, 2), "clusters have 8 blocks at most"
            assert tile.nt <= 256 and tile.mt <= 128 and tile.mt % 8 == 0, "limits of one copy"
            part = tile.width // 2 if tile.waves else tile.mt // 2
            registers = tile.blocks * tile.wgs * 128 * part * (max(1, tile.waves) + tile.ahead)
            assert registers <= 0.75 * 65536, "sums leave room for all else"


def test_only_the_device_knows_how_many_units_there_are() -> None:
    """Blocks that share a sum take one tile each, so their number must be known at launch."""
    for facts in CALLS:
        assert all(t.split == 1 for t in _gemm_tiles.SPACES["grouped_fp8_gemm"].legal(**facts))


def test_few_rows_keep_every_processor_busy() -> None:
    """Where the weights' bytes are the limit, k is split until the blocks cover the device."""
    for name in ("qkv_a", "o", "down", "q_b"):
        n, k = MODEL_SHAPES[name]
        tile = _gemm_tiles.tiles(rows=64, n=n, k=k, groups=1)[0]
        count = -(-n // tile.nt)
        assert count * tile.split >= 0.7 * _gemm_tiles.PROCESSORS, (name, tile)
        if tile.split > 1:
            assert count <= _gemm_tiles.CLUSTERS[tile.split], "all clusters run at once"


def test_up_to_64_rows_a_turned_tile_keeps_more_processors_busy() -> None:
    """33 tiles of 64 columns want 33 clusters of 4 blocks, and the device runs 30 at once."""
    found = _gemm_tiles.tiles(rows=64, n=2112, k=7168, groups=1)
    turned, plain = found[0], found[1]
    assert (turned.columns, turned.split, plain.columns, plain.split) == (72, 4, 0, 3)
    assert not any(t.columns for t in _gemm_tiles.tiles(rows=64, n=7168, k=2048, groups=1))
    for rows in (1, 16, 32, 65, 128):  # lower tiles read less, higher ones do not fit
        assert not any(t.columns for t in _gemm_tiles.tiles(rows=rows, n=2112, k=7168, groups=1))


class Recorded:
    """Takes the place of compiled kernels, and notes what would be launched."""

    def __init__(self) -> None:
        self.launches: list[dict[str, Any]] = []

    def launch(self, name: str, grid: Any, block: Any, args: Any, **how: Any) -> None:
        self.launches.append(dict(grid=grid, block=block, args=args, **how))


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    made = Recorded()
    monkeypatch.setattr(_gemm, "_module", lambda tile, out, mode: made)
    monkeypatch.setattr(_gemm._nvrtc, "address", lambda t: 0)
    monkeypatch.setattr(_gemm._nvrtc, "tensor_map", lambda t, box, swizzle: bytes(box))
    return made


def product(rows: int, n: int, k: int, *groups: int) -> list[torch.Tensor]:
    """Operands without memory."""
    kinds = (torch.float8_e4m3fn, torch.float32) * 2
    shapes = ((rows, k), (rows, -(-k // 128)), (n, k), (-(-n // 128), -(-k // 128)))
    return [
        torch.empty(*groups, *shape, dtype=kind, device="meta")
        for shape, kind in zip(shapes, kinds, strict=True)
    ]


@pytest.mark.parametrize(
    ("rows", "n", "k", "overlap"),
    [(64, 2112, 7168, True), (1, 24576, 1536, True), (128, 7168, 2048, True),
     (64, 32768, 512, False), (4096, 4096, 7168, False)],
)  # fmt: skip
def test_a_product_overlaps_where_its_blocks_fill_their_processors(
    rows: int, n: int, k: int, overlap: bool, recorded: Recorded
) -> None:
    """Blocks that leave room for another crowd on the processors that become free first."""
    _gemm.fp8(*product(rows, n, k), torch.bfloat16)
    (launch,) = recorded.launches
    assert launch["overlap"] is overlap
    cluster = (launch["cluster"] or (1,))[0]
    assert launch["grid"][0] % cluster == 0
    if overlap:
        assert launch["shared"] > 114 << 10
        assert launch["grid"][0] <= _gemm_tiles.CLUSTERS[cluster] * cluster


def test_groups_wait_for_the_kernel_that_counts_their_rows(recorded: Recorded) -> None:
    counts = torch.empty(4, dtype=torch.int32, device="meta")
    _gemm.masked(*product(16, 512, 256, 4), counts, torch.bfloat16)
    assert [launch["overlap"] for launch in recorded.launches] == [False]


@pytest.mark.parametrize(("target", "overlaps"), [("cuda:sm90", True), ("rocm:gfx950", False)])
def test_the_quantisation_lets_the_product_behind_it_begin(target: str, overlaps: bool) -> None:
    from dsa_hal.backends.portable import launches
    from dsa_hal.backends.portable._kernels.quant import quantized

    x = torch.empty(64, 7168, dtype=torch.bfloat16, device="meta")
    with use(target=target), launches.recorded(target.partition(":")[2]) as found:
        quantized(x, group=128, block_rows=1, pow2=True)
    assert [launch.constants()["OVERLAPS"] for launch in found] == [str(overlaps)]


def test_many_rows_waste_little_of_the_last_round() -> None:
    """2112 columns are 11 times 192: tiles of 256 would take three rounds, the last one short."""
    assert _gemm_tiles.tiles(rows=4096, n=2112, k=7168, groups=1)[0].nt == 192
    assert _gemm_tiles.tiles(rows=4096, n=24576, k=1536, groups=1)[0].nt == 256


@pytest.mark.parametrize("tile", _gemm_tiles.float_tiles(n=4096, groups=32))
def test_tiles_of_floats_fit(tile: _gemm_tiles.FloatTile) -> None:
    assert _gemm_tiles.floats_bytes(tile) <= 227 << 10
    assert tile.nt <= 256 and tile.stages >= 3


@pytest.mark.parametrize("shape", [(128, 200), (130, 256), (128, 0), (0, 128)])
def test_weights_that_the_copy_engine_cannot_read(shape: tuple[int, int]) -> None:
    b = torch.empty(shape, dtype=torch.float8_e4m3fn, device="meta")
    assert str(list(shape)) in (_gemm.weights_wrong(b) or "")


@pytest.mark.parametrize("name", MODEL_SHAPES)
def test_the_models_weights_are_served(name: str) -> None:
    b = torch.empty(MODEL_SHAPES[name], dtype=torch.float8_e4m3fn, device="meta")
    assert _gemm.weights_wrong(b) is None


def test_copies_are_made_only_of_what_cannot_be_read() -> None:
    """Rows whose addresses are multiples of 16 bytes are read in place, others from a copy."""
    room = torch.arange(4 * 96 + 16, dtype=torch.uint8)
    wide = room[-room.data_ptr() % 16 :][: 4 * 96].view(4, 96)
    one = wide[:1, :64].expand(3, 64)
    for view, copied in (
        (wide[1:, :64], False),
        (wide[:, 8:72], True),
        (wide[:, ::2], True),
        (wide.view(-1)[:360].view(4, 90), True),
        (one, True),
    ):
        read = _gemm._readable(view)
        assert read.shape == (1, *view.shape) and torch.equal(read[0], view)
        assert (read.data_ptr() != view.data_ptr()) == copied


@pytest.mark.parametrize(
    "op", [fp8_gemm, grouped_fp8_gemm, grouped_fp8_gemm_masked, grouped_gemm], ids=str
)
def test_every_case_is_served(op: Any) -> None:
    """Triton takes every case; the faster kernel takes all of the model's."""
    own = {i.name: i for i in op.implementations(HOPPER)}
    assert own["cuda"].rank > own["triton"].rank
    for case in op.cases:
        inputs = case.make(op.inputs, "meta")
        assert own["triton"].why_not(**inputs) is None, case.name
        assert own["cuda"].why_not(**inputs) is None or not case.model, case.name


def test_a_refusal_holds_what_was_found() -> None:
    a, b = (torch.empty(s, dtype=torch.float32, device="meta") for s in ((4, 64), (2, 128, 64)))
    layout = torch.empty(4, dtype=torch.int32, device="meta")
    own = {i.name: i for i in grouped_gemm.implementations(HOPPER)}
    assert "torch.float32" in (own["cuda"].why_not(a, b, layout) or "")
    wrong = own["cuda"].why_not(a.bfloat16(), b.bfloat16()[:, :65], layout)
    assert "[2, 65, 64]" in (wrong or "")


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
