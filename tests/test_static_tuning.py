"""The model that chooses configurations without a device: what it must prefer, and the search."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from dsa_hal.autotune.static import Metrics, predicted, race, score
from dsa_hal.backends.portable.rows import SPACES
from dsa_hal.case import Cost
from dsa_hal.selection import OPS, use
from dsa_hal.target import architectures, stand_in

GFX950, GFX942 = (architectures("rocm")[name] for name in ("gfx950", "gfx942"))
SM90 = architectures("cuda")["sm90"]

TILE = Metrics(
    registers=128, accumulators=0, scalars=40, spills=0, scalar_spills=0, scratch=0, size=4096,
    shared=32 << 10, warps=4, matrix={"v_mfma_f32_32x32x64_f8f6f4": 8}, memory={"read": 8},
    dots=("f8E4M3FN*f8E4M3FN 128x128x128",),
)  # fmt: skip
GEMM = Cost(flop=2 * 4096 * 4096 * 4096, bytes=2 * 4096 * 4096 + 2 * 4096 * 4096)


@pytest.mark.parametrize(
    "registers, shared, warps, limits, programs, occupancy",
    [
        (128, 32 << 10, 4, GFX950, 4, 4),  # registers: 512 / 128
        (130, 0, 4, GFX950, 3, 3),  # handed out by eights
        (32, 80 << 10, 4, GFX950, 2, 2),  # LDS
        (32, 80 << 10, 4, GFX942, 0, 0),
        (512, 0, 8, GFX950, 0, 0),  # two wavefronts of 512 do not fit a SIMD
        (16, 0, 1, GFX950, 32, 8),
        (255, 113 << 10, 4, SM90, 2, 2),  # 227 KiB and 1 KiB kept beside each
        (255, 114 << 10, 4, SM90, 1, 1),
    ],
)
def test_resident_programs(
    registers: int, shared: int, warps: int, limits: Any, programs: int, occupancy: int
) -> None:
    found = replace(TILE, registers=registers, shared=shared, warps=warps)
    assert (found.resident(limits), found.occupancy(limits)) == (programs, occupancy)


def test_what_the_model_prefers() -> None:
    """No spill over spills, what fits over what does not, enough programs over few, large tiles of
    products over small ones."""
    best = score(TILE, GEMM, 1024, GFX950)
    assert best < score(replace(TILE, spills=32), GEMM, 1024, GFX950)
    assert score(replace(TILE, shared=161 << 10), GEMM, 1024, GFX950) == math.inf
    assert best < score(TILE, GEMM, 128, GFX950)
    assert best < score(TILE, GEMM, 257, GFX950), "one unit has two, 255 wait for it"
    small = replace(TILE, dots=("f8E4M3FN*f8E4M3FN 16x16x128",))
    assert best < score(small, GEMM, 65536, GFX950)
    halves = replace(TILE, dots=("bf16*bf16 128x128x64",))
    assert best < score(halves, GEMM, 1024, GFX950), "half the peak"


@pytest.mark.parametrize("limits", [GFX950, GFX942], ids=lambda limits: limits.name)
def test_never_faster_than_the_published_peaks(limits: Any) -> None:
    for programs in (1, 256, 304, 100000):
        us = score(TILE, GEMM, programs, limits)
        assert us * 1e-6 >= GEMM.bytes / limits.bytes_per_s
        assert us * 1e-6 >= GEMM.flop / max(limits.flop_per_s.values())


def test_a_call_pays_for_each_launch() -> None:
    main, join = SimpleNamespace(programs=1024), SimpleNamespace(programs=64)
    light = replace(TILE, dots=(), matrix={}, registers=16)
    alone = predicted([(main, TILE)], GEMM, GFX950)
    assert alone < predicted([(main, TILE), (join, light)], GEMM, GFX950) < 2 * alone
    assert predicted([], GEMM, GFX950) == math.inf


def test_the_search_takes_the_best_configuration_and_tells_what_failed() -> None:
    """Programs are made up: those of 8 warps spill, those of 4 do not compile."""
    op, space = OPS["rms_norm"], SPACES["rms_norm"]
    target = stand_in("rocm:gfx950", "meta")
    with use(target=target):
        impls = [i for i in op.implementations(target) if i.name in ("triton", "reference")]
        case = next(case for case in op.cases if case.model)
        inputs = case.make(op.inputs, "meta")
        picked: list[Any] = []
        plain = space.pick

        def programs(run: Any) -> list[Any]:
            facts = dict(rows=1 << 12, width=1 << 13)
            picked.append(plain(**facts))
            warps = picked[-1].warps
            if warps == 4:
                raise RuntimeError("does not compile")
            found = replace(TILE, warps=warps, dots=(), matrix={}, spills=40 * (warps == 8))
            return [(SimpleNamespace(programs=4096), found)]

        (found,) = race(op, impls, inputs, programs, GFX950, 24)
    assert found.impl.name == "triton" and found.us is not None and math.isfinite(found.us)
    assert found.chosen[space].warps not in (4, 8)
    warps = {config.warps for config in picked}
    assert (4 in warps) == any("does not compile" in failure for failure in found.failures)
    assert {"facts", "config"} == found.rows()[space.name][0].keys()
