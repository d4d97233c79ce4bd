"""Every kind of call that backends/npu makes, through the wheel's C++ code on a device that is host
memory: CANN is handed the values in the documented order (aclnn.yaml), and what the emulated ops
make of them arrives where torch_npu's results are. Beside it, the emulated ops under the wheel's
schemas and shape functions."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ci.ascend.emulated import attention, pretending, register
from ci.ascend.emulated._need import need
from ci.ascend.wheel import host, runs
from ci.ascend.wheel.calls import Call, shapeless
from dsa_hal.case import tree_map

ARCH = "a2"
DEVICE = "npu:0"

NOT_HERE = {
    "npu_format_cast": "asks CANN for sizes of formats, in a form of call of its own",
    "npu_mla_prolog_v3": "takes weights in the formats that npu_format_cast makes",
}
"""Ops that do not pass through the device of host memory, and why."""

NUMBERS = {
    "npu_lightning_indexer", "npu_quant_lightning_indexer", "npu_sparse_flash_attention",
    "npu_kv_quant_sparse_flash_attention", "npu_quant_matmul", "npu_grouped_matmul",
    "npu_rms_norm", "npu_moe_gating_top_k", "npu_moe_init_routing_v2", "npu_moe_finalize_routing",
}  # fmt: skip
"""Among the calls there must be some of these."""


def calls() -> list[Any]:
    found = runs.samples(ARCH)
    return [pytest.param(c, id=f"{c.op}-{i}") for i, c in enumerate(found)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "call" in metafunc.fixturenames:
        metafunc.parametrize("call", calls())


def moved(arguments: dict[str, Any], how: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """The same arguments elsewhere; one tensor under two names stays one."""
    known: dict[int, Tensor] = {}

    def move(_: str, t: Tensor) -> Tensor:
        if id(t) not in known:
            known[id(t)] = how(t)
        return known[id(t)]

    return tree_map(move, arguments)


def on_device(arguments: dict[str, Any]) -> dict[str, Any]:
    """With the strides they have: memory is copied, and seen in the same way."""

    def copy(t: Tensor) -> Tensor:
        if t.is_contiguous():
            return t.to(DEVICE)
        memory = t.new_empty(0).set_(t.untyped_storage())  # type: ignore[call-overload]
        return memory.to(DEVICE).as_strided(t.shape, t.stride(), t.storage_offset())

    return moved(arguments, copy)


def test_emulated_ops_are_the_wheels(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written but what the schema says; shapes and dtypes are those of the wheel's shape
    function."""
    register()
    op = getattr(torch.ops.npu, call.op).default
    tests = ("test_schema",) if call.op in shapeless() else ("test_schema", "test_faketensor")
    # opcheck copies each argument, so that no value is its key itself any more.
    monkeypatch.setattr(attention, "need", lambda ok, rule: need(ok or "key itself" in rule, rule))
    with pretending(ARCH):
        torch.library.opcheck(op, (), call.given, test_utils=tests)


def test_through_the_wheels_own_code(call: Call) -> None:
    if call.op in NOT_HERE:
        return
    given = on_device(call.given)
    with pretending(ARCH), host.opened({call.op: getattr(torch.ops.npu, call.op)}) as device:
        results = getattr(torch.ops.npu, call.op)(**given)
    (handed,) = device.handed
    everything = Call(call.op, given, ()).arguments
    assert not host.misfits(handed, everything, results)
    with pretending(ARCH):
        wanted = getattr(torch.ops.npu, call.op)(**moved(call.given, torch.Tensor.clone))
    for got, want in zip(_flat(results), _flat(wanted), strict=True):
        if want.numel():
            torch.testing.assert_close(got.cpu(), want, rtol=0, atol=0, equal_nan=True)


def _flat(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


def test_what_passes() -> None:
    made = {call.op for call in runs.samples(ARCH)}
    assert made <= host.orders().keys() | NOT_HERE.keys()
    assert made >= NUMBERS


# -- planted errors -----------------------------------------------------------------------------


def handed_over(call: Call) -> tuple[host.Handed, dict[str, Any], Any]:
    given = on_device(call.given)
    with host.opened() as device:
        results = getattr(torch.ops.npu, call.op)(**given)
    return device.handed[0], Call(call.op, given, ()).arguments, results


def sample(op: str) -> Call:
    return next(call for call in runs.samples(ARCH) if call.op == op)


@pytest.mark.parametrize(
    ("op", "argument", "value"),
    [
        ("npu_sparse_flash_attention", "sparse_mode", 1),
        ("npu_sparse_flash_attention", "scale_value", 0.5),
        ("npu_lightning_indexer", "layout_query", "BSND"),
        ("npu_lightning_indexer", "key", None),
        ("npu_moe_gating_top_k", "norm_type", 0),
    ],
)
def test_another_value_is_seen(op: str, argument: str, value: Any) -> None:
    handed, arguments, results = handed_over(sample(op))
    assert not host.misfits(handed, arguments, results)
    assert host.misfits(handed, arguments | {argument: value}, results)


@pytest.mark.parametrize(("one", "other"), [(0, 1), (3, 4), (10, 13), (13, 17)])
def test_another_order_is_seen(one: int, other: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if CANN documented two parameters the other way round. (An integer and a floating-point
    number travel apart: their order is not in the call.)"""
    op = "npu_sparse_flash_attention"
    order = host.orders()[op]
    swapped = list(order.parameters)
    swapped[one], swapped[other] = swapped[other], swapped[one]
    monkeypatch.setitem(host.orders(), op, host.Order(order.calls, tuple(swapped)))
    with pytest.raises((host.Misfit, AssertionError)):
        handed, arguments, results = handed_over(sample(op))
        assert not host.misfits(handed, arguments, results)


def test_a_parameter_too_few_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    op = "npu_rms_norm"
    order = host.orders()[op]
    monkeypatch.setitem(host.orders(), op, host.Order(order.calls, order.parameters[:-1]))
    with pytest.raises(host.Misfit, match="more arguments"):
        handed_over(sample(op))
