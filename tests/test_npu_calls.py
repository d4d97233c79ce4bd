"""Every call that the Ascend backend makes, against the schemas of several torch_npu versions."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from ci.ascend.emulated import emulated, register
from ci.ascend.schemas import CURRENT, OLDEST, names, schemas, versions
from ci.ascend.wheel import runs
from ci.ascend.wheel.calls import Call, noted
from dsa_hal.case import run
from dsa_hal.matrix import Limit, cost_of

Arguments = dict[str, Any]

SMALL = Limit(flop=1e7, bytes=3e5)
"""Cases whose calls are looked at: what is passed does not depend on sizes."""


class _Taken(Exception):
    """The arguments fit the schema; nothing behind it runs."""


@cache
def _declared(version: str) -> tuple[str, torch.library.Library]:
    """A namespace with a version's ops, none of which does anything."""
    space = "npu_" + re.sub(r"\W", "_", version)
    library = torch.library.Library(space, "DEF")

    def taken(*_: Any, **__: Any) -> None:
        raise _Taken

    for name, schema in schemas(version).items():
        library.define(schema)
        library.impl(name, taken, "CompositeExplicitAutograd")
    return space, library


def misfit(version: str, op: str, arguments: Arguments) -> str | None:
    """Why torch would not take the call under a version's schema, or None."""
    space, _ = _declared(version)
    found = getattr(getattr(torch.ops, space), op, None)
    if found is None:
        return f"{version} has no {op}"
    try:
        found(**arguments)
    except _Taken:
        return None
    except (RuntimeError, TypeError) as error:
        return f"{version}: {str(error).splitlines()[0]}"
    raise AssertionError(f"{op} ran")


def kinds(calls: Iterable[Call]) -> list[tuple[str, Arguments]]:
    """One call of each kind: op, names, and types and dtypes of what is passed."""

    def told(value: Any) -> Any:
        if isinstance(value, list):
            return tuple(map(told, value))
        return value.dtype if isinstance(value, Tensor) else type(value)

    found = {}
    for call in calls:
        key = (call.op, *((name, told(value)) for name, value in sorted(call.given.items())))
        found[key] = (call.op, call.given)
    return list(found.values())


def judge(calls: Iterable[Call]) -> list[str]:
    """What is wrong with calls under any version from the oldest on."""
    wanted = versions()[versions().index(OLDEST) :]
    every = [misfit(v, op, passed) for op, passed in kinds(calls) for v in wanted]
    return [wrong for wrong in every if wrong is not None]


# -- the calls ------------------------------------------------------------------------------------


@cache
def of_the_matrix(arch: str) -> tuple[Call, ...]:
    """Of every implementation that calls torch_npu: its cheap cases, with data."""
    with emulated(arch) as chosen, noted() as calls:
        for op, impl, case in runs.rows(chosen.target):
            if SMALL.admits(cost_of(op, case)):
                inputs = case.make(op.inputs, "cpu")
                if impl.why_not(**inputs) is None:
                    run(impl.fn, inputs, op.mutates)
    return tuple(calls)


@pytest.mark.parametrize("arch", ["a2", "950"])
def test_calls_of_the_matrix_fit_every_version(arch: str) -> None:
    """The constraint table judges each call on its way (`noted`). A2 and A3 are alike."""
    calls = of_the_matrix(arch)
    assert len({call.op for call in calls}) > 8
    assert not judge(calls)


def test_calls_of_a_layer_of_full_width_fit_every_version() -> None:
    """128 heads, 256 experts, prefill of three requests in chunks, and decoding."""
    register()
    made = runs.full_width("a2", "bf16")
    assert not made.problems and made.calls
    shapes = [call.given["query"].shape for call in made.calls
              if call.op == "npu_sparse_flash_attention"]  # fmt: skip
    assert {tuple(shape[1:]) for shape in shapes} == {(128, 512)} and len(shapes) > 2
    assert not judge(made.calls)


def test_calls_of_the_int8_model_fit_every_version() -> None:
    register()
    made = runs.builtin("a3", "int8")
    assert not made.problems
    assert {"npu_quant_matmul", "npu_quant_lightning_indexer",
            "npu_kv_quant_sparse_flash_attention"} <= {call.op for call in made.calls}  # fmt: skip
    assert not judge(made.calls)


# -- the schemas, and planted errors --------------------------------------------------------------


def test_every_version_declares_the_ops() -> None:
    assert CURRENT in versions() and versions()[0] == OLDEST
    for version in versions():
        lacking = set(names()) - set(schemas(version))
        assert lacking <= ({"npu_rotate_quant"} if version == OLDEST else set())


def test_versions_differ_where_it_is_known() -> None:
    """Arguments that newer versions have and the oldest lacks."""
    newer = {
        "npu_sparse_flash_attention": "sinks", "npu_moe_gating_top_k": "tid2eid",
        "npu_moe_finalize_routing": "k", "npu_mla_prolog_v3": "token_x_dtype",
    }  # fmt: skip
    for op, argument in newer.items():
        assert re.search(rf"\b{argument}\b=", schemas(CURRENT)[op])
        assert not re.search(rf"\b{argument}\b=", schemas(OLDEST)[op])


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


RIGHT: Arguments = dict(
    query=tensor(4, 128, 512), key=tensor(8, 128, 1, 512), value=tensor(8, 128, 1, 512),
    sparse_indices=tensor(4, 1, 64, dtype=torch.int32), scale_value=0.1, attention_mode=2,
)  # fmt: skip

PLANTED = {
    "misspelt keyword": ({"sparse_mod": 3}, "sparse_mod"),
    "number for a word": ({"layout_query": 3}, "layout_query"),
    "word for a number": ({"attention_mode": "2"}, "attention_mode"),
    "list for a tensor": ({"block_table": [1, 2]}, "block_table"),
    "argument of a newer version": ({"sinks": tensor(128)}, "sinks"),
}  # fmt: skip


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_error_shows(planted: str) -> None:
    change, words = PLANTED[planted]
    assert all(misfit(v, "npu_sparse_flash_attention", RIGHT) is None for v in versions())
    wrong = misfit(OLDEST, "npu_sparse_flash_attention", RIGHT | change)
    assert wrong is not None and words in wrong
    if planted != "argument of a newer version":
        assert misfit(CURRENT, "npu_sparse_flash_attention", RIGHT | change) is not None
