"""Judges judged: every check accepts the right answer and rejects damaged copies of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dsa_hal.case import Case, copied, run
from dsa_hal.check import bitwise, calc_diff, close, codes, each
from dsa_hal.registry import Op
from dsa_hal.selection import OPS, use

SETS = ("topk", "indexer_topk", "indexer_topk_paged")
"""Ops whose result is a set per row: order is free, and the scores decide."""


def small(op: Op[..., Any]) -> list[Case]:
    """The three cheapest cases that have something to damage."""
    affordable = [c for c in op.cases if 16 < op.cost(**c.make(op.inputs, "meta")).bytes < 2e6]
    assert affordable, f"{op.name} has no small case"
    return sorted(affordable, key=lambda c: op.cost(**c.make(op.inputs, "meta")).bytes)[:3]


def damages(t: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Copies of an answer with one thing wrong, each at the element that matters most."""
    yield "last row missing", t[:-1]
    yield "other dtype", t.to(torch.float64)
    flat = t.float().reshape(-1) if t.dtype != torch.uint8 else t.reshape(-1).float()
    if not flat.isfinite().any() or not flat.nan_to_num(0, 0, 0).any():
        return
    at = int(flat.nan_to_num(0, 0, 0).abs().argmax())

    def put(value: float) -> Tensor:
        broken = t.clone().reshape(-1)
        broken[at] = value
        return broken.reshape(t.shape)

    peak = float(flat[at])
    if t.dtype == torch.uint8:
        yield "a byte changed", put((int(peak) + 1) % 256)
    elif t.is_floating_point():
        yield "a NaN", put(float("nan"))
        yield "largest element doubled", put(peak * 2 if abs(peak) < 200 else peak / 2)
        yield "largest element negated", put(-peak)
        yield "all zero", torch.zeros_like(t)
        if t.dtype != torch.float8_e4m3fn:
            yield "an infinity", put(float("inf"))
            yield "all a fifth larger", t * 1.2
    else:
        yield "far out of range", put(2**30)
        yield "below -1", put(-7)


@pytest.mark.parametrize("op", list(OPS.values()), ids=lambda op: op.name)
def test_damaged_answers_are_rejected(op: Op[..., Any]) -> None:
    rejected = 0
    for case in small(op):
        inputs = case.make(op.inputs)
        with use(backend="reference"):
            want = run(op.reference, copied(inputs), op.mutates)
        assert (report := op.check(want, want, inputs)).ok, f"{case.name}: {report}"
        assert not op.check(want[:-1], want, inputs).ok, "a missing result passed"
        for at, answer in enumerate(want):
            if answer.numel() == 0:
                continue
            for what, broken in damages(answer):
                got = (*want[:at], broken, *want[at + 1 :])
                assert not op.check(got, want, inputs).ok, (
                    f"{case.name}, result {at}: {what} passed"
                )
                rejected += 1
    assert rejected >= 3, "nothing in the small cases could be damaged"


@pytest.mark.parametrize("name", SETS)
def test_selections_are_judged_by_scores(name: str) -> None:
    """A repeat, a hole before the end, a column outside its range and a poor choice are rejected;
    the same set in another order is not."""
    op = OPS[name]
    seen = set()
    for case in op.cases:
        cost = op.cost(**case.make(op.inputs, "meta"))
        if cost.bytes > 4e6 or cost.flop > 1e9:
            continue
        inputs = case.make(op.inputs)
        with use(backend="reference"):
            (want,) = run(op.reference, copied(inputs), op.mutates)
        rows = ((want >= 0).sum(-1) >= 2).nonzero().flatten().tolist()
        for row in rows[:3]:
            valid = int((want[row] >= 0).sum())
            for what, change in {
                "repeat": lambda r, n: r.__setitem__(0, r[1].clone()),
                "hole": lambda r, n: r.__setitem__(0, -1),
                "outside": lambda r, n: r.__setitem__(0, 2**30),
                "reorder": lambda r, n: r.__setitem__(slice(0, n), r[:n].flip(0).clone()),
            }.items():
                got = want.clone()
                change(got[row], valid)
                accepted = op.check((got,), (want,), inputs).ok
                assert accepted == (what == "reorder"), f"{case.name} row {row}: {what}"
                seen.add(what)
    assert seen == {"repeat", "hole", "outside", "reorder"}


def test_a_poor_choice_is_rejected() -> None:
    logits = torch.arange(100.0).flip(0)[None]
    inputs = {"logits": logits, "k": 10, "starts": None, "ends": None, "ties": "any"}
    want = torch.arange(10, dtype=torch.int32)[None]
    worse = want.clone()
    worse[0, 3] = 10
    check = OPS["topk"].check
    assert check((want,), (want,), inputs).ok
    assert not check((worse,), (want,), inputs).ok


def test_findings_say_what_and_how_much() -> None:
    want = torch.tensor([1.0, 2.0, float("inf")])
    got = torch.tensor([1.0, 2.5, float("inf")])
    report = each(out=close(abs=1e-3, rel=1e-2))((got,), (want,), {})
    assert not report.ok and "out: error" in str(report) and "25" in str(report)
    moved = torch.tensor([float("inf"), 2.0, 1.0])
    assert "misplaced" in str(each(out=calc_diff(1e-6))((moved,), (want,), {}))


def test_calc_diff_sees_one_bad_element_in_many() -> None:
    want = torch.ones(1000, 1000)
    got = want.clone()
    got[3, 4] = 1.1
    assert not each(out=calc_diff(1e-6))((got,), (want,), {}).ok


def test_codes_counts_neighbours_across_zero() -> None:
    values = torch.tensor([-0.0, 0.0, 0.001953125, -0.001953125]).to(torch.float8_e4m3fn)
    assert all(f.ok for f in codes(0)("v", values[:1], values[1:2]))
    assert all(f.ok for f in codes(1)("v", values[2:3], values[1:2]))
    assert not all(f.ok for f in codes(1)("v", values[2:3], values[3:4]))
    assert not bitwise("v", values[:1], values[1:2])[0].ok
