"""A look at the data of a call, on request: every rule lets good cases pass and names the first bad
number; tensors on the wrong device get a sentence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dsa_hal.case import Inputs
from dsa_hal.data import RULES, Whole, misplaced
from dsa_hal.errors import BadInput
from dsa_hal.matrix import DEFAULT_RUN, cost_of
from dsa_hal.ops.attention import sparse_mla
from dsa_hal.registry import Op
from dsa_hal.selection import OPS, use

LOOKED_AT = [(OPS[name], rule) for name, rules in RULES.items() for rule in rules]


def cases(op: Op[..., Any]) -> list[Inputs]:
    small = [c for c in op.cases if DEFAULT_RUN.admits(cost_of(op, c)) and not c.model]
    return [{**_defaults(op), **c.make(op.inputs)} for c in small]


def _defaults(op: Op[..., Any]) -> Inputs:
    import inspect

    parameters = inspect.signature(inspect.unwrap(op.reference)).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


@pytest.mark.parametrize(("op", "rule"), LOOKED_AT, ids=str)
def test_good_cases_pass_and_a_bad_number_is_named(op: Op[..., Any], rule: Whole) -> None:
    spoiled = 0
    for inputs in cases(op):
        assert rule.problem(inputs) is None
        numbers = inputs[rule.argument]
        if numbers is None or not numbers.numel():
            continue
        for bad in (-7, torch.iinfo(torch.int32).max):
            problem = rule.problem({**inputs, rule.argument: torch.full_like(numbers, bad)})
            if problem is not None:
                spoiled += 1
                assert problem.startswith(f"{rule.argument}[") and f"is {bad};" in problem
    assert spoiled, "no case shows that this rule refuses anything"


def test_checked_calls_name_the_index_and_others_pass_unseen() -> None:
    q, kv = torch.zeros(2, 8, 576), torch.zeros(9, 576)
    indices = torch.tensor([[0, 3], [9, -1]], dtype=torch.int32)
    seen: list[Tensor] = []

    def trusting(q: Tensor, kv: Tensor, indices: Tensor, **_: Any) -> None:
        seen.append(indices)

    from dsa_hal.data import looked_at

    with pytest.raises(BadInput, match=r"sparse_mla: indices\[1, 0\] is 9; .* -1 to 8"):
        looked_at("sparse_mla", sparse_mla.reference, trusting)(q, kv, indices, softmax_scale=1.0)
    assert not seen
    with use(backend="cpu", checked=True), pytest.raises(BadInput, match=r"indices\[1, 0\] is 9"):
        sparse_mla(q, kv, indices, softmax_scale=1.0)


def test_the_environment_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from dsa_hal.selection import _wishes

    assert not _wishes.__wrapped__().checked
    monkeypatch.setenv("DSA_HAL_CHECK", "1")
    assert _wishes.__wrapped__().checked


def test_tensors_on_the_wrong_device_get_a_sentence() -> None:
    here, there = torch.ones(2, 4), torch.ones(4, device="meta")
    assert misplaced({"x": here, "k": 3}, "cpu") is None
    assert "x on cpu; weight on meta" in (misplaced({"x": here, "weight": there}, "cpu") or "")
    assert "expected all on cuda" in (misplaced({"x": here}, "cuda") or "")
    q, kv = torch.zeros(2, 8, 576), torch.zeros(9, 576)
    indices = torch.zeros(2, 4, dtype=torch.int32, device="meta")
    with use(backend="cpu"), pytest.raises(BadInput, match=r"sparse_mla: .*q, kv on cpu; indices"):
        sparse_mla(q, kv, indices, softmax_scale=1.0)
