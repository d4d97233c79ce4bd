"""What the matrix does not ask of attention: bad values refused, mistakes seen, plans, gaps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dsa_hal.case import Inputs, copied, run
from dsa_hal.errors import BadInput
from dsa_hal.ops.absorbed import mla_attention
from dsa_hal.ops.attention import sparse_mla, sparse_mla_paged
from dsa_hal.ops.dense import dense_mla, mha_prefill
from dsa_hal.ops.layout import KVLayout
from dsa_hal.ops.schedule import plan
from dsa_hal.registry import Op
from dsa_hal.selection import use


def inputs_of(op: Op[..., Any], name: str) -> Inputs:
    return next(case for case in op.cases if case.name == name).make(op.inputs)


@pytest.fixture(autouse=True)
def on_the_processor() -> Any:
    with use(backend="cpu"):
        yield


@pytest.mark.parametrize(
    ("op", "name", "argument", "place", "value", "found"),
    [
        (sparse_mla, "odd_k", "indices", (3, 5), 300, r"\[3, 5\] is 300"),
        (sparse_mla, "odd_k", "indices", (2, 0), -2, r"\[2, 0\] is -2"),
        (sparse_mla_paged, "small", "indices", (1, 1, 4), 10**6, r"\[3, 4\] is 1000000"),
        (mha_prefill, "masked", "indices", (3, 5), 300, r"\[3, 5\] is 300"),
        (mha_prefill, "chunk", "ke", (7,), 401, "query 7 .* 401"),
        (dense_mla, "chunk", "ks", (7,), -1, "query 7 .* -1"),
        (plan, "uneven", "lengths", (2,), -5, r"lengths\[2\] is -5"),
    ],
)
def test_a_value_out_of_range_is_named(
    op: Op[..., Any], name: str, argument: str, place: Any, value: int, found: str
) -> None:
    inputs = inputs_of(op, name)
    inputs[argument][place] = value
    with pytest.raises(BadInput, match=found):
        op(**inputs)


def test_what_lies_behind_topk_length_may_be_anything() -> None:
    inputs = inputs_of(sparse_mla, "short")
    lengths = inputs["topk_length"]
    behind = torch.arange(inputs["indices"].shape[1]) >= lengths[:, None]
    want = sparse_mla(**inputs)
    inputs["indices"] = torch.where(behind, -77, inputs["indices"])
    assert all(torch.equal(g, w) for g, w in zip(sparse_mla(**inputs), want, strict=True))


def damaged(inputs: Inputs, how: str) -> Inputs:
    """The same call under a misunderstanding that people have had."""
    inputs = copied(inputs)
    if how == "scale of the absorbed head size":
        inputs["softmax_scale"] = 576**-0.5
    elif how == "scale without YaRN's factor":
        inputs["softmax_scale"] = 192**-0.5
    elif how == "rotated part left out":
        inputs["q"][..., -64:] = 0
    elif how == "one key missing":
        inputs["indices"][..., 0] = -1
    elif how == "rotated part in front":
        inputs["q"] = inputs["q"].roll(64, -1)
    return inputs


MISTAKES = (
    "scale of the absorbed head size",
    "scale without YaRN's factor",
    "rotated part left out",
    "one key missing",
    "rotated part in front",
)


@pytest.mark.parametrize("how", MISTAKES)
@pytest.mark.parametrize(
    ("op", "name"),
    [(sparse_mla, "one_full"), (sparse_mla_paged, "decode"), (mla_attention, "rows")],
    ids=["sparse_mla", "sparse_mla_paged", "mla_attention"],
)
def test_the_check_sees_a_mistake(op: Op[..., Any], name: str, how: str) -> None:
    inputs = inputs_of(op, name)
    want = run(op.reference, inputs, ())
    assert op.check(run(op, inputs, ()), want, inputs).ok
    assert not op.check(run(op, damaged(inputs, how), ()), want, inputs).ok


@pytest.mark.parametrize("how", MISTAKES[:3])
@pytest.mark.parametrize("op", [dense_mla, mha_prefill], ids=lambda op: op.name)
def test_the_check_sees_a_mistake_in_dense_attention(op: Op[..., Any], how: str) -> None:
    inputs = inputs_of(op, "chunk")
    want = run(op.reference, inputs, ())
    assert not op.check(run(op, damaged(inputs, how), ()), want, inputs).ok


def test_the_check_sees_a_logarithm_to_base_2() -> None:
    inputs = inputs_of(sparse_mla, "one_full")
    out, top, lse = sparse_mla(**inputs)
    want = run(sparse_mla.reference, inputs, ())
    assert not sparse_mla.check((out, top, lse / torch.tensor(2.0).log()), want, inputs).ok


@pytest.mark.parametrize(
    "damage",
    [
        lambda s, n: (s.flip(0), n),
        lambda s, n: (s, n + 1),
        lambda s, n: (torch.where(torch.arange(4) == 3, s - 1, s), n),
    ],
    ids=["workers swapped", "counts off", "a block left out"],
)
def test_the_check_sees_a_wrong_plan(damage: Callable[..., Any]) -> None:
    inputs = inputs_of(plan, "uneven")
    want = plan(**inputs)
    assert plan.check(want, want, inputs).ok
    assert not plan.check(damage(*want), want, inputs).ok


def test_a_plan_never_changes_the_result() -> None:
    inputs = inputs_of(sparse_mla_paged, "plan")
    with_plan = sparse_mla_paged(**inputs)
    without = sparse_mla_paged(**{**inputs, "schedule": None, "num_splits": None})
    assert all(torch.equal(a, b) for a, b in zip(with_plan, without, strict=True))


def test_pages_may_lie_apart() -> None:
    inputs = inputs_of(sparse_mla_paged, "batch")
    want = sparse_mla_paged(**inputs)
    pages = inputs["pages"]
    room = KVLayout.parse(inputs["layout"]).empty(2 * len(pages), pages.shape[1])
    inputs["pages"] = room[::2].copy_(pages)
    assert all(torch.equal(g, w) for g, w in zip(sparse_mla_paged(**inputs), want, strict=True))


def test_absorbed_and_expanded_attention_agree() -> None:
    """Keys and values expanded per head give what queries absorbed into the latent space do."""
    inputs = inputs_of(mla_attention, "small")
    q, kv_b, kv, indices = (inputs[name] for name in ("q", "kv_b", "kv", "indices"))
    (context, width), lora = kv.shape, kv_b.shape[2]
    nope = q.shape[2] - (width - lora)
    expanded = torch.einsum("tl,hdl->thd", kv[:, :lora], kv_b)
    rope = kv[:, None, lora:].expand(-1, q.shape[1], -1)
    keys = torch.cat([expanded[..., :nope], rope], -1)
    ks, ke = torch.zeros(len(q), dtype=torch.int32), torch.full((len(q),), context).int()
    scale = inputs["softmax_scale"]
    want, _ = mha_prefill(
        q, keys, expanded[..., nope:].contiguous(), ks, ke, indices, softmax_scale=scale
    )
    torch.testing.assert_close(mla_attention(**inputs), want, rtol=1e-4, atol=1e-5)
