"""The matrix, op x implementation x case x twist, judged in one place: pytest, `dsa-hal test`,
`doctor` and `bench` all ask here, so a timed shape is a tested shape."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dsa_hal.case import (
    Case,
    Cost,
    Fenced,
    Inputs,
    copied,
    dirty_memory,
    poisoned,
    run,
    strided,
)
from dsa_hal.check import Report
from dsa_hal.registry import Impl, Op
from dsa_hal.selection import DETERMINISTIC, OPS, selection, use
from dsa_hal.target import REFERENCE


@dataclass(frozen=True)
class Limit:
    """What one case may cost. Above it, a case is for a faster tier and is left out by name.

    products  bytes that a case may move which computes much with each, as products of matrices do
    """

    flop: float = float("inf")
    bytes: float = float("inf")
    products: float = 0

    def admits(self, cost: Cost) -> bool:
        dense = cost.flop >= MUCH * cost.bytes
        room = max(self.bytes, self.products) if dense else self.bytes
        return cost.flop <= self.flop and cost.bytes <= room


MUCH = 20
"""FLOP per byte of a case that consists of products."""

DEFAULT_RUN = Limit(flop=4e9, bytes=3e7)
"""What a processor with two cores judges in seconds."""

INTERPRETED = Limit(flop=2e8, bytes=1e5, products=6e5)
"""What Triton's interpreter judges in seconds. An operation on a tile takes it as long as one on a
number, so that many small programs cost more than large products."""


def interpreted(op: Op[..., Any]) -> Limit:
    """INTERPRETED for an op. Gradients are many products of small tiles, and get no more room;
    experts in FP8 are large before they do anything."""
    if op.name == "moe_experts":
        return replace(INTERPRETED, bytes=3.1e5)
    return replace(INTERPRETED, products=0) if op.family == "training" else INTERPRETED


@dataclass(frozen=True)
class Row:
    """One cell of the matrix before it is judged."""

    op: Op[..., Any]
    impl: Impl[..., Any]
    case: Case

    @property
    def id(self) -> str:
        return f"{self.op.name}-{self.impl.name}-{self.case.name}"


@dataclass(frozen=True)
class Outcome:
    """What judging one row gave.

    status  "ok", "refused" (the implementation said why it cannot) or "failed"
    detail  the refusal, or what went wrong, under which twist, by how much
    trace   the traceback, where the implementation raised
    """

    status: str
    detail: str = ""
    trace: str = ""


def cost_of(op: Op[..., Any], case: Case) -> Cost:
    """FLOP and bytes of a case; nothing is allocated."""
    return op.cost(**case.make(op.inputs, "meta"))


def smallest(op: Op[..., Any]) -> Case:
    """The cheapest case that computes anything."""
    costs = [(cost_of(op, case).flop, at) for at, case in enumerate(op.cases)]
    return op.cases[min(((flop, at) for flop, at in costs if flop > 0), default=(0, 0))[1]]


def rows(
    ops: Sequence[Op[..., Any]] = (), limit: Limit = DEFAULT_RUN, cases: Sequence[str] = ()
) -> Iterator[Row]:
    """Every implementation whose static facts fit the target in force, against every case within
    `limit` (all named ones, if `cases` names some). `ops` empty means all."""
    for op in ops or tuple(OPS.values()):
        if cases:
            chosen = [case for case in op.cases if case.name in cases]
        else:
            chosen = [case for case in op.cases if limit.admits(cost_of(op, case))]
        for verdict in selection().verdicts(op):
            if verdict.question == "ok":
                yield from (Row(op, verdict.impl, case) for case in chosen)


def wanted(op: Op[..., Any], inputs: Inputs) -> tuple[Tensor, ...]:
    """The reference's results for copies of `inputs`."""
    with use(backend=REFERENCE.backend):
        return run(op.reference, copied(inputs), op.mutates)


def compare(
    op: Op[..., Any], impl: Impl[..., Any], inputs: Inputs, want: Sequence[Tensor]
) -> Report:
    """The plain case alone: one call on copies of `inputs`, checked against `want`."""
    return op.check(run(impl.fn, copied(inputs), op.mutates), want, inputs)


def judge(row: Row, repeats: int = 1) -> Outcome:
    """One row under every twist: inputs between fences, the same bytes on repeats (if promised),
    strided inputs, and NaN both in all that must not be read and in fresh memory.

    An exception inside an implementation is the caller's to see.
    """
    op, impl = row.op, row.impl
    inputs = row.case.make(op.inputs, selection().target.device)
    if (reason := impl.why_not(**inputs)) is not None:
        return Outcome("refused", reason)
    want = wanted(op, inputs)
    for twist, problem in _problems(op, impl, inputs, want, repeats):
        if problem:
            return Outcome("failed", f"{twist}: {problem}")
    return Outcome("ok")


def judge_at_once(row: Row, order: Callable[[], AbstractContextManager[None]]) -> Outcome:
    """`judge` in two calls, for those that take long: one between fences; one strided and poisoned
    at once, under `order`, which runs programs in another order. No call is repeated."""
    op, impl = row.op, row.impl
    inputs = row.case.make(op.inputs, selection().target.device)
    if (reason := impl.why_not(**inputs)) is not None:
        return Outcome("refused", reason)
    want = wanted(op, inputs)
    fenced = Fenced.around(inputs, op.mutates)
    report = op.check(run(impl.fn, fenced.inputs, op.mutates), want, inputs)
    if problem := "; ".join([*([] if report.ok else [str(report)]), *fenced.broken()]):
        return Outcome("failed", f"plain: {problem}")
    unread = op.unread(**inputs) if op.unread is not None else {}
    with dirty_memory(), order():
        got = run(impl.fn, _strided(poisoned(inputs, unread)), op.mutates)
    report = op.check(got, want, inputs)
    return Outcome("ok") if report.ok else Outcome("failed", f"poisoned and strided: {report}")


def attempt(row: Row, repeats: int = 1, how: Callable[[Row], Outcome] | None = None) -> Outcome:
    """`judge`, or `how`, but what the implementation raises is a failed outcome: other rows
    follow."""
    try:
        return judge(row, repeats) if how is None else how(row)
    except Exception as error:
        raised = f"raised {type(error).__name__}: {error}"
        return Outcome("failed", raised, traceback.format_exc())


def _problems(
    op: Op[..., Any], impl: Impl[..., Any], inputs: Inputs, want: Sequence[Tensor], repeats: int
) -> Iterator[tuple[str, str]]:
    """(twist, what is wrong or ""), one twist after another."""

    def against(got: Sequence[Tensor]) -> str:
        report = op.check(got, want, inputs)
        return "" if report.ok else str(report)

    fenced = Fenced.around(inputs, op.mutates)
    first = run(impl.fn, fenced.inputs, op.mutates)
    yield "plain", against(first)
    yield "fenced", "; ".join(fenced.broken())
    for repeat in range(repeats if DETERMINISTIC in impl.promises else 0):
        again = run(impl.fn, copied(inputs), op.mutates)
        same = all(torch.equal(_bytes(a), _bytes(b)) for a, b in zip(first, again, strict=True))
        yield "repeat", "" if same else f"call {repeat + 2} gave other bytes"
    yield "strided", against(run(impl.fn, _strided(inputs), op.mutates))
    unread = op.unread(**inputs) if op.unread is not None else {}
    with dirty_memory():
        got = run(impl.fn, poisoned(inputs, unread), op.mutates)
    yield "poisoned", against(got)


def _strided(inputs: Inputs) -> Inputs:
    """Views with gaps, but for caches, whose memory layout is the point."""
    caches = ("pages", "kv") if inputs.get("layout") else ("pages",)
    kept = {name: inputs[name] for name in caches if name in inputs}
    return {**strided(inputs), **copied(kept)}


def _bytes(t: Tensor) -> Tensor:
    flat = t.contiguous().flatten()  # an axis of size 1 may have any stride, which a view minds
    return flat.view(torch.uint8) if t.numel() else t.new_empty(0, dtype=torch.uint8)
