"""Every call that backends/npu makes, under the shape functions that the wheel has for its ops, and
under the constraint table: the matrix's cases, layers of the published model's width, and the whole
built-in model. Nothing computes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ci.ascend.wheel import runs
from ci.ascend.wheel.calls import Call, Refused, noted, shapeless
from dsa_hal import use
from dsa_hal.backends.npu import _constraints
from dsa_hal.target import stand_in


@pytest.mark.parametrize("arch", runs.ARCHES)
def test_cases_of_the_matrix(arch: str) -> None:
    made = runs.matrix(arch)
    assert not made.problems, "\n".join(made.problems)
    assert len({call.op for call in made.calls}) > 10


@pytest.mark.parametrize(("arch", "form"), [("a2", "bf16"), ("a3", "int8"), ("950", "bf16")])
def test_layers_of_full_width(arch: str, form: str) -> None:
    made = runs.full_width(arch, form)
    assert not made.problems, "\n".join(made.problems)
    assert FUSED[form] <= {call.op for call in made.calls}


FUSED = {
    "bf16": {
        "npu_lightning_indexer", "npu_sparse_flash_attention", "npu_grouped_matmul",
        "npu_moe_gating_top_k", "npu_moe_init_routing_v2", "npu_moe_finalize_routing",
    },
    "int8": {
        "npu_quant_lightning_indexer", "npu_kv_quant_sparse_flash_attention", "npu_quant_matmul",
        "npu_dynamic_quant", "npu_grouped_matmul", "npu_moe_gating_top_k",
    },
}  # fmt: skip
"""What each form of the model must be served by, besides others."""


@pytest.mark.parametrize("form", runs.FORMS)
def test_all_of_the_built_in_model(form: str) -> None:
    made = runs.builtin("a2", form)
    assert not made.problems, "\n".join(made.problems)
    assert made.calls


def test_every_op_of_the_constraint_table_is_called() -> None:
    made = [*map(runs.matrix, runs.ARCHES), runs.full_width("a3", "int8")]
    called = {call.op for run in made for call in run.calls}
    assert called == set(_constraints.table())


def test_ops_said_to_have_no_shape_function_have_none() -> None:
    without = {op for op in _constraints.table() if not _has_shape_function(op)}
    assert without == set(shapeless())


def _has_shape_function(op: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"npu::{op}", "Meta")


# -- planted errors -----------------------------------------------------------------------------


def made_by(op: str) -> Call:
    """A call of the int8 or bf16 layer that passed."""
    form = "int8" if op in FUSED["int8"] - FUSED["bf16"] else "bf16"
    arch = "a3" if form == "int8" else "a2"
    return next(call for call in runs.full_width(arch, form).calls if call.op == op)


def again(call: Call, **changes: Any) -> None:
    with use(target=stand_in("npu:a2", "meta")), noted():
        getattr(torch.ops.npu, call.op)(**call.given | changes)


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


ATTENTION, INDEXER = "npu_sparse_flash_attention", "npu_lightning_indexer"

PLANTED: dict[str, tuple[str, Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "misspelt keyword": (INDEXER, lambda a: {"layout_q": "TND"}, "layout_q"),
    "wrong dtype": (
        ATTENTION, lambda a: {"sparse_indices": a["sparse_indices"].long()}, "sparse_indices",
    ),
    "wrong type": (INDEXER, lambda a: {"sparse_count": "many"}, "sparse_count"),
    "attention_mode 0": (ATTENTION, lambda a: {"attention_mode": 0}, "attention_mode"),
    "pages of 64": (INDEXER, lambda a: {"key": meta(64, 64, 1, 128)}, "page"),
    "another layout": (INDEXER, lambda a: {"layout_query": "BSND"}, "layout_query|query"),
    "sizes that do not multiply": (
        "npu_quant_matmul", lambda a: {"x2": meta(8, 8, dtype=torch.int8)}, "x2|K",
    ),
}  # fmt: skip


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_error_is_seen(planted: str) -> None:
    op, change, words = PLANTED[planted]
    call = made_by(op)
    again(call)
    with pytest.raises((Refused, RuntimeError, TypeError), match=words):
        again(call, **change(call.arguments))


def test_the_wheel_itself_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only the constraint table: shape functions run, and those of this wheel."""
    monkeypatch.setattr("ci.ascend.wheel.calls.refusal", lambda name, **arguments: None)
    call = made_by("npu_quant_matmul")
    with pytest.raises(RuntimeError):
        again(call, x2=meta(8, 8, dtype=torch.int8))
