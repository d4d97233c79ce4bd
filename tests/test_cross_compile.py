"""The cross-compiler's own proof: what it records is what a launch would compile, and each planted
error turns it red. Compiles small programs for three targets; no device is needed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from ci.cross_compile import __main__ as command
from ci.cross_compile import rules, table
from ci.cross_compile.collect import TARGETS, Collected, Program, collect, representative, unseen
from dsa_hal import env
from dsa_hal.autotune.static import Metrics
from dsa_hal.backends.portable.compiled import metrics
from dsa_hal.backends.portable.launches import Launch, recorded
from dsa_hal.target import named

GFX950, GFX942, SM90 = TARGETS


@triton.jit
def product(
    a, b, out, k, row,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, OUT: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """out [BM, BN] = a [BM, k] times the transpose of b [BN, k]."""
    rows, columns, inner = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    total = tl.zeros([BM, BN], OUT)
    for start in range(0, k, BK):
        left = tl.load(a + rows[:, None] * row + start + inner[None])
        right = tl.load(b + columns[None] * row + start + inner[:, None])
        if WIDEN:
            left, right = left.to(tl.float16), right.to(tl.float16)
        total = tl.dot(left, right, total, out_dtype=OUT)
    tl.store(out + rows[:, None] * BN + columns[None], total)


@triton.jit
def twice(values, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(values + at, tl.load(values + at, mask=at < count) * 2, mask=at < count)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an earlier run kept is not what these tests judge."""
    monkeypatch.setenv(env.CACHE.name, str(tmp_path))


def launched(target: str, dtype: torch.dtype = torch.bfloat16, **given: Any) -> Launch:
    """A launch of `product`, recorded on meta tensors."""
    options = dict(BM=64, BN=64, BK=128, num_warps=4, num_stages=2, WIDEN=False) | given
    a, b = (torch.empty(options[side], 512, dtype=dtype, device="meta") for side in ("BM", "BN"))
    kind = torch.int32 if dtype == torch.int8 else torch.float32
    out = torch.empty(options["BM"], options["BN"], dtype=kind, device="meta")
    with recorded(target.partition(":")[2]) as found:
        product[(1,)](
            a, b, out, 512, 512, OUT=tl.int32 if dtype == torch.int8 else tl.float32, **options
        )
    assert len(found) == 1
    return found[0]


def program(target: str, launch: Launch) -> Program:
    return Program(named(target), "planted", "rocm/triton", "case", launch, True)


def judged(target: str, launch: Launch, *known: rules.Allowance) -> str:
    """What the rules say of a launch, compiled."""
    found = metrics(launch, target.partition(":")[2])
    return "\n".join(rules.problems(program(target, launch), found, known, triton.__version__))


# -- the matrix instruction ---------------------------------------------------------------------

OCP, FNUZ = torch.float8_e4m3fn, torch.float8_e4m3fnuz


@pytest.mark.parametrize(
    "target, dtype, instruction",
    [
        (GFX950, OCP, "f8f6f4"), (GFX950, torch.bfloat16, "_bf16"), (GFX950, torch.int8, "_i8"),
        (GFX942, FNUZ, "_fp8_fp8"), (GFX942, torch.bfloat16, "_bf16"),
        (SM90, OCP, ".e4m3.e4m3"), (SM90, torch.bfloat16, ".bf16.bf16"), (SM90, torch.int8, ".s8"),
    ],
    ids=str,
)  # fmt: skip
def test_each_dtype_has_its_matrix_instruction(
    target: str, dtype: torch.dtype, instruction: str
) -> None:
    launch = launched(target, dtype)
    assert judged(target, launch) == ""
    names = metrics(launch, target.partition(":")[2]).matrix
    assert names and all(instruction in name for name in names), names


@pytest.mark.parametrize("target, dtype", [(GFX942, OCP), (GFX950, FNUZ)], ids=str)
@pytest.mark.filterwarnings("ignore")  # Triton warns of one of the two itself, and compiles it
def test_planted_wrong_fp8_type(target: str, dtype: torch.dtype) -> None:
    """Triton widens it, the product would be right and slow: in its front end where the source then
    says f16, or where nothing but the machine code shows it."""
    said = judged(target, launched(target, dtype, BK=64))
    assert "has no instruction for" in said or "FP8 that is widened before" in said


def test_planted_wrong_instruction() -> None:
    """As if the compiler took another path than the operands' dtype asks for."""
    launch = launched(GFX950, OCP)
    found = metrics(launch, "gfx950")
    slow = Metrics.of({**vars(found), "matrix": {"v_mfma_f32_32x32x16_f16": 8}})
    said = rules.problems(program(GFX950, launch), slow, (), triton.__version__)
    assert len(said) == 1 and "should become" in said[0] and "f16" in said[0]


def test_planted_widening() -> None:
    launch = launched(GFX950, OCP, WIDEN=True)
    assert "is widened before the product" in judged(GFX950, launch)
    reason = "a test may widen what it likes"
    known = rules.Allowance(GFX950, r".*\.product", reason, widened=True)
    assert judged(GFX950, launch, known) == ""


# -- room ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("target, warps", [(GFX950, 2), (SM90, 4)])
def test_planted_spills(target: str, warps: int) -> None:
    """A tile whose accumulator alone is more than the registers of its warps."""
    launch = launched(target, BM=256, BN=256, BK=16, num_warps=warps, num_stages=1)
    assert "it may spill none" in judged(target, launch)
    reason = "the tile is too large on purpose"
    tight, wide = (
        rules.Allowance(target, r".*\.product", reason, spills=count, occupancy=0)
        for count in (1, 100000)
    )
    assert "its budget is 1" in judged(target, launch, tight)
    assert judged(target, launch, wide) == ""


@pytest.mark.parametrize(
    "target, limit, tile",
    [
        (GFX950, 160 << 10, dict(BM=256, BN=128, BK=128, num_warps=8, num_stages=3)),
        (GFX942, 64 << 10, dict(BM=128, BN=128, BK=128, num_warps=8, num_stages=3)),
        (SM90, 232448, dict(BM=256, BN=128, BK=128, num_warps=8, num_stages=4)),
    ],
)
def test_planted_tile_over_shared_memory(target: str, limit: int, tile: dict[str, int]) -> None:
    """Triton compiles it without a word; the launch would fail on the device."""
    said = judged(target, launched(target, **tile))
    assert "bytes of shared memory" in said and f"has {limit};" in said


def test_planted_occupancy() -> None:
    """One program of one warp that fills the LDS leaves every other scheduler idle."""
    launch = launched(GFX950)
    found = Metrics.of({**vars(metrics(launch, "gfx950")), "dots": (), "matrix": {}, "warps": 4})
    crowded = Metrics.of({**vars(found), "registers": 512})
    said = rules.problems(program(GFX950, launch), crowded, (), triton.__version__)
    assert len(said) == 1 and "leave 1 warps to each scheduler, 2 is the least" in said[0]
    assert not rules.problems(program(GFX950, launch), found, (), triton.__version__)


def test_budgets_have_reasons(tmp_path: Path) -> None:
    assert all(rules.allowances()) or rules.allowances() == []
    path = tmp_path / "allowances.yaml"
    path.write_text("- {target: '.*', kernel: x, reason: because, spills: 3}\n")
    with pytest.raises(ValueError, match="no reason to speak of"):
        rules.allowances(path)


# -- recording ----------------------------------------------------------------------------------


def test_a_recorded_launch_is_what_a_real_one_compiles() -> None:
    """Alignment of addresses and sizes, ones as constants, the range of tensors for AMD."""
    values = torch.empty(4096, device="meta")
    known: dict[str, list[Launch]] = {}
    for arch in ("gfx950", "sm90"):
        with recorded(arch) as known[arch]:
            twice[(4,)](values, 4096, BLOCK=1024)
            twice[lambda given: (given["count"],)](values[1:], 1, BLOCK=256, num_warps=1)
    aligned, odd = known["sm90"]
    assert aligned.signature == {"values": "*fp32", "count": "i32", "BLOCK": "constexpr"}
    assert aligned.attrs[0,] == [["tt.divisibility", 16]] == aligned.attrs[1,]
    assert odd.signature["count"] == "constexpr" and odd.attrs.get((0,), []) == []
    assert ["tt.pointer_range", 32] in known["gfx950"][0].attrs[0,]
    assert (aligned.programs, odd.programs, odd.options["num_warps"]) == (4, 1, 1)
    assert len({launch.key() for launch in (aligned, odd, *known["gfx950"])}) == 4


def test_nothing_is_left_behind() -> None:
    """After the block Triton asks for a real device again."""
    with pytest.raises(RuntimeError, match="stop"), recorded("gfx950"):
        raise RuntimeError("stop")
    with pytest.raises(Exception, match=r"driver|CUDA|HIP|meta|cpu"):
        twice[(1,)](torch.empty(16, device="meta"), 16, BLOCK=16)


@pytest.mark.parametrize("target", TARGETS)
def test_registered_implementations_are_found(target: str) -> None:
    found = collect(target, ["rms_norm"])
    assert not found.problems
    kernels = {program.launch.name for program in found.programs.values()}
    assert kernels == {"norm._norm"}
    chosen = representative(found.programs.values())
    assert {p.case for p in found.programs.values() if p.required} <= {p.case for p in chosen}


def test_planted_kernel_that_nobody_launches() -> None:
    """With nothing recorded every kernel is missing, but those that are parts of others."""
    missing = unseen([])
    assert {"gemm.fp8_gemm", "norm._norm"} <= set(missing)
    seen = [p for p in collect(GFX950, ["rms_norm"]).programs.values()]
    assert set(missing) - set(unseen(seen)) == {"norm._norm"}


# -- the command --------------------------------------------------------------------------------


def test_a_changed_table_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """--check passes on what --write wrote, and shows what differs from it; a problem is an error
    in any case."""
    path = tmp_path / "table.csv"
    tiles, wrong = [dict(BM=16, BN=16), dict(BM=32, BN=16)], list[str]()

    def planted(target: str, ops: Any) -> Collected:
        found = Collected(target)
        for launch in [launched(target, **tile) for tile in tiles]:
            found.programs[launch.key()] = program(target, launch)
        found.problems += wrong
        return found

    monkeypatch.setattr(command, "collect", planted)
    monkeypatch.setattr(command, "unseen", lambda programs: [])
    monkeypatch.setattr(table, "path", lambda version: path)
    assert command.main(["--check", "--jobs", "1"]) == 1, "there is no table yet"
    assert command.main(["--write", "--jobs", "1"]) == 0
    assert command.main(["--check", "--jobs", "1"]) == 0
    assert path.read_text().count("\n") == 1 + 2 * len(TARGETS)
    capsys.readouterr()
    tiles[1] = dict(BM=32, BN=16, num_warps=2)
    assert command.main(["--check", "--jobs", "1"]) == 1
    assert "warps=2" in capsys.readouterr().out
    wrong.append("something is planted")
    assert command.main(["--write", "--jobs", "1"]) == 1
    assert "WRONG  something is planted" in capsys.readouterr().out


def test_a_process_compiles_for_one_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.6 keeps AMD's first target: after gfx950, code for gfx942 has instructions that it
    does not know; after gfx942, gfx950 converts FP8 by dozens of others, and nothing says so."""
    monkeypatch.setattr(command, "metrics", lambda launch, arch: (arch, os.getpid()))
    programs = [program(target, launched(target, BM=bm)) for target in TARGETS for bm in (16, 32)]
    found: Any = command.compile_all(programs, 1)
    assert [arch for arch, _ in found] == ["gfx950"] * 2 + ["gfx942"] * 2 + ["sm90"] * 2
    assert len({pid for _, pid in found}) == 3 and os.getpid() not in {pid for _, pid in found}


def test_what_does_not_compile_is_told() -> None:
    """A dtype that no target knows how to multiply with another."""
    launch = launched(SM90, FNUZ)
    (said,) = command.compile_all([program(SM90, launch)], 1)
    assert isinstance(said, str) and "fp8e4b8" in said
