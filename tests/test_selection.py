"""The judges of selections reject every kind of wrong selection, and bad positions are named."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dsa_hal.case import Inputs, Maker
from dsa_hal.errors import BadInput
from dsa_hal.ops import indexer_logits_paged, indexer_topk, to_slots, topk
from dsa_hal.registry import Op

Damage = Callable[[Tensor], Tensor]


def replaced(row: int, column: int, value: int) -> Damage:
    def damage(right: Tensor) -> Tensor:
        wrong = right.clone()
        wrong[row, column] = value
        return wrong

    return damage


def scored(op: Op[..., Tensor]) -> tuple[Inputs, Tensor]:
    """Inputs with two rows of 100 candidates and one of 5 for k = 40, and the right answer."""
    if op is topk:
        logits = torch.arange(100.0).repeat(3, 1)
        logits[:, 60] = torch.nan
        ends = torch.tensor([100, 100, 5], dtype=torch.int32)
        inputs: Inputs = dict(logits=logits, k=40, starts=None, ends=ends, ties="any")
    else:
        make = Maker("cpu", 0)
        inputs = op.inputs(make, tokens=3, context=100, heads=8, dim=64, topk=40)
        inputs["ke"] = torch.tensor([100, 100, 5], dtype=torch.int32)
    return inputs, op.reference(**inputs)


@pytest.mark.parametrize("op", [topk, indexer_topk], ids=str)
@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (replaced(0, 3, 100), "out of bounds"),
        (replaced(0, 3, -2), "out of bounds"),
        (replaced(1, 3, -1), "-1 before a column"),
        (replaced(1, 39, -1), "wrong count"),
        (lambda right: torch.cat([right[:, :1], right[:, :-1]], 1), "repeated"),
        (replaced(2, 0, 50), "may not be selected"),
        (replaced(2, 5, 50), "wrong count"),
        (lambda right: right.long(), "dtype"),
        (lambda right: right[:, :-1], "shape"),
    ],
)
def test_damaged_selections_are_rejected(op: Op[..., Tensor], damage: Damage, found: str) -> None:
    inputs, right = scored(op)
    assert op.check((right,), (right,), inputs).ok
    report = op.check((damage(right),), (right,), inputs)
    assert not report.ok and found in str(report)


@pytest.mark.parametrize("op", [topk, indexer_topk], ids=str)
def test_the_best_may_not_be_swapped_for_the_next_one(op: Op[..., Tensor]) -> None:
    """The right k + 1 without the first: every score is near the k-th, one high one is missing."""
    inputs, right = scored(op)
    name = "k" if op is topk else "topk"
    more = op.reference(**{**inputs, name: 41})
    report = op.check((more[:2, 1:],), (right[:2],), _rows(inputs, 2))
    assert not report.ok and "higher score" in str(report)


def test_nan_may_not_be_selected() -> None:
    inputs, right = scored(topk)
    report = topk.check((replaced(0, 39, 60)(right),), (right,), inputs)
    assert not report.ok and "may not be selected" in str(report)


def test_the_rule_for_ties_is_checked() -> None:
    inputs: Inputs = dict(logits=torch.zeros(1, 9), k=3, starts=None, ends=None, ties="lower")
    right = topk.reference(**inputs)
    high = torch.tensor([[0, 1, 8]], dtype=torch.int32)
    assert not topk.check((high,), (right,), inputs).ok
    assert topk.check((high,), (right,), {**inputs, "ties": "any"}).ok


def test_positions_past_the_table_and_missing_pages_are_named() -> None:
    table = torch.tensor([[3, -1]], dtype=torch.int32)
    with pytest.raises(BadInput, match="position 8; block_table has 2 pages of 4"):
        to_slots(torch.tensor([[8]], dtype=torch.int32), table, page_size=4)
    with pytest.raises(BadInput, match=r"row 0 .* request 0 .* never allocated"):
        to_slots(torch.tensor([[1, 5]], dtype=torch.int32), table, page_size=4)


def test_a_page_outside_the_pool_is_named() -> None:
    inputs = indexer_logits_paged.inputs(
        Maker("cpu", 0), batch=2, next_n=1, context=70, heads=8, lengths="full"
    )
    inputs["context_lens"] = torch.full((2, 1), 70, dtype=torch.int32)
    inputs["block_table"][1, 1] = 900
    with pytest.raises(BadInput, match=r"block_table\[1, 1\] is 900"):
        indexer_logits_paged(**inputs)


def _rows(inputs: Inputs, count: int) -> Inputs:
    """The first rows of everything that has a row per query token."""
    return {
        name: value[:count] if isinstance(value, Tensor) and name not in ("k", "k_scale") else value
        for name, value in inputs.items()
    }
