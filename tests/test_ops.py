"""The matrix (`dsa_hal.matrix` judges) on the target in force, and what must hold of every op."""

from __future__ import annotations

import zlib
from typing import Any

import pytest
import torch

from dsa_hal.case import Case, run, tree_map
from dsa_hal.errors import DsaHalError
from dsa_hal.matrix import DEFAULT_RUN, Row, cost_of, judge, rows, wanted
from dsa_hal.registry import Op
from dsa_hal.selection import OPS, selection, use


def inputs_of(op: Op[..., Any], case: Case) -> dict[str, Any]:
    return case.make(op.inputs, selection().target.device)


@pytest.mark.parametrize("row", [pytest.param(row, id=row.id) for row in rows()])
def test_matches_the_reference(row: Row) -> None:
    """The plain case and its twists: strided inputs, poison in all that must not be read, dirty
    fresh memory, fences around every tensor; and the same bytes again on a repeat."""
    outcome = judge(row)
    if outcome.status == "refused":
        pytest.skip(outcome.detail)
    assert outcome.status == "ok", outcome.detail


@pytest.mark.parametrize("op", list(OPS.values()), ids=str)
def test_fakes_tell_shapes_and_dtypes(op: Op[..., Any]) -> None:
    """On meta tensors the reference gives what the best implementation gives on real ones."""
    case = min(op.cases, key=lambda c: cost_of(op, c).flop)
    with use(backend="reference"):
        fake = run(op.reference, case.make(op.inputs, "meta"), op.mutates)
    inputs = inputs_of(op, case)
    real = run(op.select(**inputs).fn, inputs, op.mutates)
    assert [(f.shape, f.dtype) for f in fake] == [(r.shape, r.dtype) for r in real]


@pytest.mark.parametrize("op", list(OPS.values()), ids=str)
def test_torch_face(op: Op[..., Any]) -> None:
    """`torch.ops.dsa_hal.<op>`: the schema takes the call, the fake holds (torch's own opcheck; its
    schema check cannot compare FP8), and no result shares memory with an argument."""
    case = min(op.cases, key=lambda c: cost_of(op, c).flop)
    face = getattr(torch.ops.dsa_hal, op.name).default
    inputs = inputs_of(op, case)
    torch.library.opcheck(face, (), inputs, test_utils=("test_faketensor",))
    given = [t for v in inputs.values() for t in (v if isinstance(v, list) else [v])]
    owned = {t.untyped_storage().data_ptr() for t in given if isinstance(t, torch.Tensor)}
    for result in run(face, inputs, ()):
        assert result.numel() == 0 or result.untyped_storage().data_ptr() not in owned


def with_gaps(inputs: dict[str, Any]) -> dict[str, Any]:
    """Views whose last axis is not dense, but for caches, whose memory layout is the point."""

    def comb(_: str, t: torch.Tensor) -> torch.Tensor:
        if t.dim() == 0 or t.shape[-1] < 2:
            return t.clone()
        teeth = t.new_zeros((*t.shape[:-1], 2 * t.shape[-1]))[..., ::2]
        return teeth.copy_(t)

    caches = ("pages", "kv") if inputs.get("layout") else ("pages",)
    kept = {name: inputs[name].clone() for name in caches if name in inputs}
    return {**tree_map(comb, inputs), **kept}


@pytest.mark.parametrize("op", list(OPS.values()), ids=str)
def test_gaps_in_the_last_axis_are_served_or_refused(op: Op[..., Any]) -> None:
    """No predicate sees strides: an implementation copies, or says in a sentence that it needs a
    dense axis, and never reads the wrong numbers."""
    affordable = [c for c in op.cases if DEFAULT_RUN.admits(cost_of(op, c))]
    inputs = inputs_of(op, affordable[len(affordable) // 2])
    want = wanted(op, inputs)
    for impl in selection().candidates(op)[0]:
        if impl.why_not(**inputs) is not None:
            continue
        try:
            got = run(impl.fn, with_gaps(inputs), op.mutates)
        except DsaHalError as error:
            assert "stride" in str(error) or "dense" in str(error), error
        else:
            report = op.check(got, want, inputs)
            assert report.ok, f"{impl.name}: {report}"


@pytest.mark.parametrize("op", list(OPS.values()), ids=str)
def test_predicates_read_constants_only(op: Op[..., Any]) -> None:
    """Neither `invalid` nor any `why_not` changes its mind when only variable axes change."""
    for case in op.cases[:4]:
        grown = {
            name: value + 1 if name in op.variable and isinstance(value, int) else value
            for name, value in case.axes.items()
        }
        other = Case(case.name, grown, seed=zlib.crc32(case.name.encode()))
        try:
            bigger = other.make(op.inputs, "meta")
        except ValueError:
            continue  # the axes of this case depend on each other
        small = case.make(op.inputs, "meta")
        for impl in op.implementations(selection().target):
            assert (impl.why_not(**small) is None) == (impl.why_not(**bigger) is None)
