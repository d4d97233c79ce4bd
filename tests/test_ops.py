"""The matrix (`dsa_hal.matrix` judges) on the target in force, and what must hold of every op."""

from __future__ import annotations

import zlib
from typing import Any

import pytest
import torch

from dsa_hal.case import Case, run
from dsa_hal.matrix import Row, cost_of, judge, rows
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
