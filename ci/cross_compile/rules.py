"""What a compiled program must be: of the right matrix instructions, within the target's shared
memory, without spills, with enough warps at a time. allowances.yaml has the exceptions, each with
its reason."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ci.cross_compile.collect import Program
from dsa_hal.autotune.static import Metrics

ALLOWANCES = Path(__file__).parent / "allowances.yaml"

OCCUPANCY, OCCUPANCY_WITH_DOTS = 2, 1
"""Warps per scheduler: a program that only moves data needs others to wait meanwhile; one of matrix
products keeps its tile in registers, and its own loads are under way while it computes."""

SCALAR_SPILLS = 512
"""Scalar registers kept in lanes of vector registers: instructions, but no memory."""

FP8 = {"f8E4M3FN", "f8E4M3FNUZ", "f8E5M2", "f8E5M2FNUZ"}


@dataclass(frozen=True)
class Allowance:
    """A budget: which programs (regular expressions on target, kernel and configuration), what they
    may have, and why."""

    target: str
    kernel: str
    reason: str
    config: str = ""
    triton: str = ""
    spills: int = 0
    scalar_spills: int = SCALAR_SPILLS
    occupancy: int | None = None
    widened: bool = False
    unseen: bool = False

    def fits(self, target: str, kernel: str, config: str, version: str) -> bool:
        return bool(
            re.fullmatch(self.target, target)
            and re.fullmatch(self.kernel, kernel)
            and re.search(self.config, config)
            and version.startswith(self.triton)
        )


def allowances(path: Path = ALLOWANCES) -> list[Allowance]:
    """The budgets of a file; each has a reason."""
    read = [Allowance(**entry) for entry in yaml.safe_load(path.read_text()) or ()]
    for allowance in read:
        if len(allowance.reason.split()) < 4:
            raise ValueError(f"{path}: the budget of {allowance.kernel} has no reason to speak of")
    return read


def expected(arch: str, dtype: str, sizes: Sequence[int]) -> str | None:
    """The matrix instructions, as a regular expression, that a product of two tiles of `dtype` must
    become; "" if the target's units do not take the dtype, None if nothing is asked of the tile."""
    m, n, k = sizes
    if min(m, n) < 16 or k < 16:
        return None  # smaller than any matrix unit's tile
    if arch == "sm90":
        return _nvidia(dtype, wide=m >= 64)
    if dtype in FP8:
        return _amd_fp8(arch, dtype, m, n, k)
    kind = {"bf16": "bf16", "f16": "f16", "f32": r"x?f32", "i8": "i8"}[dtype]
    return rf"v_mfma_(f32|i32)_\d+x\d+x\d+(_\d+b)?_?{kind}(_1k)?"


def _nvidia(dtype: str, wide: bool) -> str | None:
    if dtype == "f32":
        return None  # exact fp32 has no matrix instruction there, TF32 has: the kernel says which
    names = {"f8E4M3FN": "e4m3", "f8E5M2": "e5m2", "bf16": "bf16", "f16": "f16", "i8": "s8"}
    if dtype not in names:
        return ""
    name = names[dtype]
    if dtype in FP8 and not wide:  # Triton widens FP8 tiles of few rows: decode waits for memory
        return rf"w?g?mma\.\S*\.({name}\.{name}|f16\.f16).*"
    return rf"w?g?mma\.\S*\.{name}\.{name}.*"


def _amd_fp8(arch: str, dtype: str, m: int, n: int, k: int) -> str:
    if arch == "gfx950":
        if not dtype.endswith("FN") and dtype != "f8E5M2":
            return ""
        if k >= 128 or (k >= 64 and m >= 32 and n >= 32):
            return r"v_mfma_(scale_)?f32_\d+x\d+x\d+_f8f6f4"
        return r"v_mfma_\S*(f8f6f4|_fp8_fp8|_bf8_bf8)"
    if not dtype.endswith("FNUZ"):
        return ""
    kind = "fp8" if dtype == "f8E4M3FNUZ" else "bf8"
    return rf"v_mfma_f32_\d+x\d+x\d+_{kind}_{kind}"


def problems(
    program: Program, found: Metrics, known: Sequence[Allowance], version: str
) -> list[str]:
    """Sentences on what is wrong with a compiled program; none if nothing is."""
    where = f"{program.target} {program.launch.name} ({program.op} {program.case})"
    given = [
        a for a in known
        if a.fits(str(program.target), program.launch.name, program.config, version)
    ]  # fmt: skip
    said = [*_matrix(program, found, given), *_room(program, found, given)]
    return [f"{where}: {sentence} [{program.config}]" for sentence in said]


def _matrix(program: Program, found: Metrics, given: Sequence[Allowance]) -> Iterator[str]:
    arch, present = program.target.arch, ", ".join(found.matrix) or "no matrix instruction"
    for dot in found.dots:
        kinds, _, sizes = dot.partition(" ")
        left, _, right = kinds.partition("*")
        wanted = expected(arch, left, [int(n) for n in sizes.split("x")])
        if wanted is None:
            continue
        if wanted == "":
            yield (
                f"it multiplies {kinds}, which {arch} has no instruction for, so that it became"
                f" {present}; give it operands in the dialect of the target"
            )
        elif left == right and not any(re.fullmatch(wanted, name) for name in found.matrix):
            yield f"its product {dot} should become {wanted}, it became {present}"
    pointers = {kind for kind in program.launch.signature.values() if kind.startswith("*fp8")}
    eight = any(dot.split("*")[0] in FP8 for dot in found.dots)
    if pointers and found.dots and not eight and not any(a.widened for a in given):
        yield (
            f"it reads {', '.join(sorted(pointers))} and multiplies {', '.join(found.dots)}: FP8"
            " that is widened before the product needs `widened: true` and a reason in"
            " allowances.yaml"
        )


def _room(program: Program, found: Metrics, given: Sequence[Allowance]) -> Iterator[str]:
    limits: Any = program.target.limits
    if found.shared > limits.shared:
        yield (
            f"it takes {found.shared} bytes of shared memory, {limits.name} has {limits.shared};"
            " its launch would fail"
        )
    if found.warps * limits.lanes > 1024:
        yield f"{found.warps} warps of {limits.lanes} threads are more than the 1024 of a program"
    budget = max((a.spills for a in given), default=0)
    if found.spills > budget:
        allowed = f"its budget is {budget}" if budget else "it may spill none"
        yield (
            f"it spills {found.spills} registers of each thread to memory ({found.scratch} bytes),"
            f" {allowed}; take smaller tiles or more warps"
        )
    elif found.scratch and not budget:
        yield f"it takes {found.scratch} bytes of memory per thread without a spill; find out why"
    if found.scalar_spills > max((a.scalar_spills for a in given), default=SCALAR_SPILLS):
        yield (
            f"it keeps {found.scalar_spills} scalar registers in vector registers,"
            f" {SCALAR_SPILLS} is the most; unroll less"
        )
    least = OCCUPANCY_WITH_DOTS if found.dots else OCCUPANCY
    least = min((a.occupancy for a in given if a.occupancy is not None), default=least)
    if found.shared <= limits.shared and (held := found.occupancy(limits)) < least:
        yield (
            f"{found.registers} registers, {found.shared} bytes of shared memory and {found.warps}"
            f" warps leave {held} warps to each scheduler, {least} is the least"
        )
