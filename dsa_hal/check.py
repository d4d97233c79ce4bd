"""Comparisons of an answer with the reference's. Each returns findings, never a bare bool, so that
a red case says which output failed, by which measure, by how much."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsa_hal.case import Inputs


@dataclass(frozen=True)
class Finding:
    """One measured quantity of one output, and its bound."""

    output: str
    measure: str
    value: float | str
    bound: float | str
    ok: bool

    def __str__(self) -> str:
        value = f"{self.value:.3g}" if isinstance(self.value, float) else self.value
        side = "within" if self.ok else "bound"
        return f"{self.output}: {self.measure} {value} ({side} {self.bound})"


@dataclass(frozen=True)
class Report:
    """All findings on one answer."""

    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        return all(f.ok for f in self.findings)

    def __str__(self) -> str:
        failed = [f for f in self.findings if not f.ok]
        return "; ".join(map(str, failed or self.findings))


Check = Callable[[Sequence[Tensor], Sequence[Tensor], Inputs], Report]
"""(answers, wanted, inputs) -> Report. Answers are in the order of `outputs`, then `mutates`."""

Comparison = Callable[[str, Tensor, Tensor], list[Finding]]
"""(name, answer, wanted) -> findings on one output."""


def each(**comparisons: Comparison) -> Check:
    """The check that compares output by output, in the order given; shape, dtype and count come
    first."""

    def check(got: Sequence[Tensor], want: Sequence[Tensor], inputs: Inputs) -> Report:
        findings = count(got, want)
        for (name, compare), g, w in zip(comparisons.items(), got, want, strict=False):
            findings += form(name, g, w) or compare(name, g, w)
        return Report(tuple(findings))

    return check


def count(got: Sequence[Tensor], want: Sequence[Tensor]) -> list[Finding]:
    """A finding if results are missing or too many, else none."""
    if len(got) == len(want):
        return []
    return [Finding("results", "count", str(len(got)), str(len(want)), False)]


def form(name: str, got: Tensor, want: Tensor) -> list[Finding]:
    """A finding if shape or dtype differ, else none."""
    if not isinstance(got, Tensor):
        return [Finding(name, "type", type(got).__name__, "Tensor", False)]
    if got.shape != want.shape:
        return [Finding(name, "shape", str(list(got.shape)), str(list(want.shape)), False)]
    if got.dtype != want.dtype:
        return [Finding(name, "dtype", str(got.dtype), str(want.dtype), False)]
    return []


def _special(name: str, got: Tensor, want: Tensor) -> tuple[list[Finding], Tensor]:
    """Infinities and NaN must stand at the same places with the same sign; also the finite mask."""
    finite = want.isfinite()
    same = (got.isfinite() == finite) & (finite | (got == want) | (got.isnan() & want.isnan()))
    wrong = int((~same).sum())
    return [Finding(name, "misplaced inf or NaN", float(wrong), 0.0, wrong == 0)], finite


def close(*, abs: float, rel: float, cos: float | None = None) -> Comparison:
    """FlashMLA's rule: an element passes if its absolute or its relative error is within bounds;
    `cos` also bounds 1 - 2<a,b>/(aa+bb) of the whole output."""

    def compare(name: str, got: Tensor, want: Tensor) -> list[Finding]:
        findings, finite = _special(name, got, want)
        g, w = got.double()[finite], want.double()[finite]
        if not w.numel() or not findings[0].ok:
            return findings
        error = (g - w).abs()
        excess = torch.minimum(error / abs, error / w.abs().clamp_min(1e-300) / rel)
        worst = float(excess.max())
        findings.append(
            Finding(name, f"error / max({abs:g} abs, {rel:g} rel)", worst, 1.0, worst <= 1)
        )
        if cos is not None:
            findings += calc_diff(cos)(name, got, want)
        return findings

    return compare


def calc_diff(bound: float) -> Comparison:
    """DeepGEMM's measure: 1 - 2<a,b>/(aa+bb) over the finite elements, in fp64, plus a bound on the
    single worst element (16 times the root of `bound`, relative to the largest), which the mean of
    a large matrix would hide."""

    def compare(name: str, got: Tensor, want: Tensor) -> list[Finding]:
        findings, finite = _special(name, got, want)
        g, w = got.double()[finite], want.double()[finite]
        if not w.numel() or not findings[0].ok:
            return findings
        norm = float((g * g + w * w).sum())
        diff = 0.0 if norm == 0 else 1 - 2 * float((g * w).sum()) / norm
        findings.append(Finding(name, "calc_diff", diff, bound, diff <= bound))
        largest = float(w.abs().max())
        worst = float((g - w).abs().max())
        limit = 16 * bound**0.5 * largest
        findings.append(Finding(name, "worst element error", worst, limit, worst <= limit))
        return findings

    return compare


def bitwise(name: str, got: Tensor, want: Tensor) -> list[Finding]:
    """Equal bytes (so -0.0 differs from 0.0, and NaN equals the same NaN)."""
    a, b = got.contiguous().view(torch.uint8), want.contiguous().view(torch.uint8)
    wrong = int((a != b).sum())
    return [Finding(name, "differing bytes", float(wrong), 0.0, wrong == 0)]


def codes(steps: int) -> Comparison:
    """FP8 codes at most `steps` neighbours apart (codes ordered by value, zero of both signs
    equal)."""

    def order(t: Tensor) -> Tensor:
        raw = t.contiguous().view(torch.uint8).to(torch.int16)
        return torch.where(raw >= 128, 128 - raw, raw)

    def compare(name: str, got: Tensor, want: Tensor) -> list[Finding]:
        findings, _ = _special(name, got.float(), want.float())
        apart = int((order(got) - order(want)).abs().max()) if got.numel() else 0
        return [*findings, Finding(name, "code steps", float(apart), float(steps), apart <= steps)]

    return compare


def anything(name: str, got: Tensor, want: Tensor) -> list[Finding]:
    """Only shape and dtype matter; for outputs whose values another comparison judges."""
    return []
