"""Every implementation of every op on the model's true shapes, timed by pytest-benchmark.

Not collected by default: `pytest tests/bench_ops.py [-k sparse_mla] [--benchmark-compare]`. Each
row is checked against the reference first, and every round finds cold caches. This suite compares
two states of the code; `dsa-hal bench` also tells rates and percent of the roof.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dsa_hal.matrix import Limit, Row, compare, rows, wanted
from dsa_hal.measure import cold_inputs
from dsa_hal.selection import selection

AFFORDABLE = Limit(flop=1e11, bytes=2e9) if selection().target.device == "cpu" else Limit()

ROUNDS = 10


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=row.id) for row in rows(limit=AFFORDABLE) if row.case.model]
)
def test_true_shapes(benchmark: Any, row: Row) -> None:
    inputs = row.case.make(row.op.inputs, selection().target.device)
    if (reason := row.impl.why_not(**inputs)) is not None:
        pytest.skip(reason)
    report = compare(row.op, row.impl, inputs, wanted(row.op, inputs))
    assert report.ok, str(report)
    benchmark.group = f"{row.op.name} {row.case.name}"
    benchmark.extra_info["axes"] = {axis: str(value) for axis, value in row.case.axes.items()}
    cold = cold_inputs(inputs, torch.device(selection().target.device), row.op.mutates)
    benchmark.pedantic(
        _finished(row), setup=lambda: ((next(cold),), {}), rounds=ROUNDS, warmup_rounds=1
    )


def _finished(row: Row) -> Any:
    """The call, and on a device the wait for its end: without it only the launch would count."""
    if selection().target.device == "cpu":
        return lambda inputs: row.impl.fn(**inputs)

    def call(inputs: Any) -> None:
        row.impl.fn(**inputs)
        torch.accelerator.synchronize()

    return call
