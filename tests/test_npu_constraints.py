"""The constraint table of torch_npu's ops: what it lets pass, what it refuses and in which words,
and that no line of it could be lost unnoticed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import chain
from typing import Any

import pytest
import torch
from npu_calls import BAD, CALLS, MAY_VARY, Arguments, tensor
from torch import Tensor

from ci.ascend.schemas import schemas, versions
from dsa_hal.backends.npu import _constraints
from dsa_hal.backends.npu._constraints import DTYPES, NAMES, Entry, Form, Plain, table
from dsa_hal.backends.npu._library import call, refusal
from dsa_hal.errors import Absent, BadInput
from dsa_hal.selection import use
from dsa_hal.target import stand_in

ARCHES = ("a2", "a3", "950")


def calls(op: str, arch: str) -> list[Arguments]:
    return [arguments for arches, arguments in CALLS[op] if arch in arches.split()]


# -- what passes, and what does not -------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("op", list(CALLS))
def test_calls_of_the_model_pass(op: str, arch: str) -> None:
    for arguments in calls(op, arch):
        assert table()[op].problem(arch, arguments) is None


def test_every_op_has_calls() -> None:
    assert set(table()) == set(CALLS) == set(BAD) == set(MAY_VARY)
    for op in CALLS:
        assert {arch for arch in ARCHES if calls(op, arch)}, op


@pytest.mark.parametrize(
    ("op", "arch", "change", "words"),
    [(op, *row) for op, rows in BAD.items() for row in rows],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_call_is_refused_with_the_wrong_value(
    op: str, arch: str, change: Arguments, words: str
) -> None:
    reason = table()[op].problem(arch, wrong_call(op, arch, change))
    assert reason is not None and reason.startswith(f"{op}: ") and "\n" not in reason
    assert words in reason, reason


def wrong_call(op: str, arch: str, change: Arguments) -> Arguments:
    """The call `base` (0 if not said) of an architecture, else of any, with something changed;
    `...` takes an argument out."""
    rest = dict(change)
    some = calls(op, arch) or [arguments for _, arguments in CALLS[op]]
    changed = {**some[rest.pop("base", 0)], **rest}
    return {name: value for name, value in changed.items() if value is not ...}


def test_the_holes_of_the_wheels_own_shape_functions_are_closed() -> None:
    """What torch_npu 2.13.0's shape functions accept, though the ops' manuals do not. They accept
    as much of npu_interleave_rope and npu_kv_rmsnorm_rope_cache, which nobody here may call."""
    assert not {"npu_interleave_rope", "npu_kv_rmsnorm_rope_cache"} & set(table())
    attention, indexer = "npu_sparse_flash_attention", "npu_lightning_indexer"
    narrow = tensor("bf16", 64, 128, 1, 500)
    for op, change, words in (
        (attention, dict(query=tensor("bf16", 4, 128, 500), key=narrow, value=narrow), "500"),
        (attention, dict(sparse_indices=tensor("int64", 4, 1, 2048)), "int64"),
        (attention, dict(query=tensor("bf16", 4, 3, 512), query_rope=tensor("bf16", 4, 3, 64)),
         "heads is 3"),
        (indexer, dict(query=tensor("bf16", 4, 128, 128), weights=tensor("fp32", 4, 128)),
         "heads is 128"),
        (indexer, dict(query=tensor("e4m3", 4, 64, 128)), "e4m3"),
        ("npu_grouped_matmul", dict(weight=[tensor("bf16", 256, 7160, 4096)]), "k is 7168"),
        ("npu_grouped_matmul", dict(group_list=tensor("int32", 256)), "int32"),
        ("npu_moe_gating_top_k", dict(k=300), "k is 300"),
    ):  # fmt: skip
        reason = table()[op].problem("a2", wrong_call(op, "a2", change))
        assert reason is not None and words in reason, (op, reason)


# -- one thing changed at a time ----------------------------------------------------------------


def variations(arguments: Arguments) -> Iterator[tuple[str, Arguments]]:
    """Each tensor of a call in other dtypes, of other sizes and ranks, without data, with gaps, and
    all of one dtype in another; each argument left out, and one too many. With the change's name.
    """
    yield "an argument more", {**arguments, "querry": 1}
    for old in {t.dtype for t in map(_one, arguments.values()) if t is not None}:
        for new in DTYPES:
            if DTYPES[new] != old:
                yield f"{NAMES[old]} as {new}", {k: _as(v, old, new) for k, v in arguments.items()}
    for size in {size for t in map(_one, arguments.values()) if t is not None for size in t.shape}:
        yield f"{size} as 0", {k: _without(v, size) for k, v in arguments.items()}
    for name, value in arguments.items():
        yield f"{name} left out", {k: v for k, v in arguments.items() if k != name}
        if value is not None:
            yield f"{name} None", {**arguments, name: None}
        one = _one(value)
        if one is None:
            continue
        for what, changed in _changed(one):
            put = [changed] if isinstance(value, list) else changed
            alike = {n: put for n, v in arguments.items() if v is value}
            yield f"{name} {what}", {**arguments, **alike}
        if isinstance(value, list):
            yield f"{name} twice", {**arguments, name: value * 2}


def _one(value: Any) -> Tensor | None:
    """The tensor that an argument is, or is a list of."""
    value = value[0] if isinstance(value, list) else value
    return value if isinstance(value, Tensor) else None


@cache
def _of(one: Tensor, dtype: str) -> Tensor:
    """A tensor in another dtype: the same one for the same one."""
    return one.to(DTYPES[dtype])


def _as(value: Any, old: torch.dtype, new: str) -> Any:
    """Tensors of a dtype, and dtypes of results, in another."""
    one = _one(value)
    if one is None:
        return DTYPES[new] if value == old else value
    changed = _of(one, new) if one.dtype == old else one
    return [changed] if isinstance(value, list) else changed


def _without(value: Any, size: int) -> Any:
    """Tensors whose axes of a size are empty, and that number as 0."""
    one = _one(value)
    if one is None:
        return 0 if value == size and not isinstance(value, bool) else value
    changed = _sized(one, tuple(0 if axis == size else axis for axis in one.shape))
    return [changed] if isinstance(value, list) else changed


@cache
def _sized(one: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor in another shape: the same one for the same one."""
    return one if one.shape == shape else one.new_empty(shape)


def _changed(one: Tensor) -> Iterator[tuple[str, Tensor]]:
    for dtype in DTYPES:
        if DTYPES[dtype] != one.dtype:
            yield dtype, one.to(DTYPES[dtype])
    yield "rank +1", one[None]
    yield "rank -1", one[0]
    for axis, size in enumerate(one.shape):
        for changed in (size + 1, 0):
            shape = [*one.shape[:axis], changed, *one.shape[axis + 1 :]]
            yield f"axis {axis} {'empty' if not changed else '+1'}", one.new_empty(shape)
    yield "gaps", one.new_empty([*one.shape[:-1], 2 * one.shape[-1]])[..., ::2]


@cache
def varied(op: str) -> list[tuple[str, str, Arguments]]:
    """Every change of every right call of an op: architecture, name of the change, arguments."""
    return [
        (arch, change, changed)
        for arches, arguments in CALLS[op]
        for change, changed in variations(arguments)
        for arch in arches.split()
    ]


@pytest.mark.parametrize("op", list(CALLS))
def test_nothing_may_vary_but_what_is_said(op: str) -> None:
    passed = {change for arch, change, a in varied(op) if table()[op].problem(arch, a) is None}
    assert passed == set(MAY_VARY[op])


# -- mutations ----------------------------------------------------------------------------------


def noticed(mutant: Entry, op: str, base: Entry) -> bool:
    """Whether one of the tests above would fail if the table said this, where it does not for what
    `base` says."""
    bad = ((arch, wrong_call(op, arch, change)) for arch, change, _ in BAD[op])
    changed = ((arch, a) for arch, change, a in varied(op) if change not in MAY_VARY[op])
    return any(
        passes(mutant, arch, arguments) and not passes(base, arch, arguments)
        for arch, arguments in chain(bad, changed)
    )


def passes(entry: Entry, arch: str, arguments: Arguments) -> bool:
    """A rule whose axis nothing names any more raises, which any test would notice too."""
    try:
        return entry.problem(arch, arguments) is None
    except NameError:
        return True


RULES = [(op, n) for op, entry in table().items() for n in range(len(entry.rules))]


@pytest.mark.parametrize(("op", "n"), RULES, ids=lambda value: str(value))
def test_a_lost_rule_is_noticed(op: str, n: int) -> None:
    entry = table()[op]
    rest = (*entry.rules[:n], *entry.rules[n + 1 :])
    assert noticed(replace(entry, rules=rest), op, entry), entry.rules[n].must.text


FORMS = [
    (op, name)
    for op, entry in table().items()
    for name, said in entry.arguments.items()
    if not isinstance(said, Plain)
]


@pytest.mark.parametrize(("op", "name"), FORMS)
def test_a_loosened_argument_is_noticed(op: str, name: str) -> None:
    """Any dtype instead of those said; any size where an axis is fixed; gaps."""
    entry = table()[op]
    forms = entry.arguments[name]
    assert isinstance(forms, tuple)
    for at, form in enumerate(forms):
        for what, loose in loosened(form, entry):
            changed = (*forms[:at], loose, *forms[at + 1 :])
            base = without_rules_on_dtypes(entry) if what == "any dtype" else entry
            mutant = replace(base, arguments={**entry.arguments, **changes(entry, name, changed)})
            assert noticed(mutant, op, base), f"{op} {name}: {form.text} as {what}"


def changes(entry: Entry, name: str, forms: tuple[Form, ...]) -> dict[str, tuple[Form, ...]]:
    """An argument with other forms; key and value are one tensor under two names."""
    pair = ("key", "value")
    return dict.fromkeys(pair if name in pair and "value" in entry.arguments else (name,), forms)


@pytest.mark.parametrize("op", list(CALLS))
def test_no_tensor_may_be_empty(op: str) -> None:
    for arch, change, arguments in varied(op):
        if change.endswith(" as 0") or change.endswith(" empty"):
            assert table()[op].problem(arch, arguments) is not None, change


def loosened(form: Form, entry: Entry) -> Iterator[tuple[str, Form]]:
    yield "any dtype", replace(form, dtypes=tuple(DTYPES))
    if form.dense:
        yield "with gaps", replace(form, dense=False)
    for n, axis in enumerate(form.axes):
        if axis.isdigit() or _shared(axis, entry):
            yield f"[{axis}]", replace(form, axes=(*form.axes[:n], f"_{n}", *form.axes[n + 1 :]))


def without_rules_on_dtypes(entry: Entry) -> Entry:
    """Rules that dtypes be alike would judge what the list of dtypes lets pass."""
    return replace(entry, rules=tuple(r for r in entry.rules if "dtype(" not in r.must.text))


def _shared(axis: str, entry: Entry) -> bool:
    """Whether other tensors' forms name this axis."""
    tensors = {name: said for name, said in entry.arguments.items() if name != "value"}
    forms = [f for said in tensors.values() if isinstance(said, tuple) for f in said]
    return sum(form.axes.count(axis) for form in forms) > 1


def test_a_mutation_that_loosens_nothing_is_told_apart() -> None:
    """The tests of mutations can fail."""
    entry = table()["npu_rms_norm"]
    assert not noticed(replace(entry, aclnn=("other",)), "npu_rms_norm", entry)


# -- the language -------------------------------------------------------------------------------


def test_plain_arguments_have_types() -> None:
    op = "npu_sparse_flash_attention"
    for name, value in (("sparse_mode", 3.0), ("attention_mode", True), ("layout_kv", 2),
                        ("scale_value", "1"), ("return_softmax_lse", 1)):  # fmt: skip
        reason = table()[op].problem("a2", wrong_call(op, "a2", {name: value}))
        assert reason == f"{op}: {name} is {value!r}; expected {_type(op, name)}"


def _type(op: str, name: str) -> str:
    said = table()[op].arguments[name]
    assert isinstance(said, Plain)
    return said.type


def test_one_tensor_under_two_names() -> None:
    pool = torch.zeros(2, 128, 1, 512)
    same = _constraints.ASK["same"]
    assert same(pool, pool) and same(pool, pool.view(2, 128, 1, 512)) and same(None, None)
    assert not same(pool, pool.clone()) and not same(pool[:1], pool[1:]) and not same(pool, None)


@pytest.mark.parametrize("text", ["bf17 [a]", "bf16", "bf16 [a", "list of bf16 [a]"])
def test_a_form_that_is_none_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="constraints"):
        Form.of(text)


def test_the_sources_of_rules_are_explained() -> None:
    head = _constraints.TABLE.read_text().partition("\nops:")[0]
    for source in {rule.source for entry in table().values() for rule in entry.rules}:
        assert f"#   {source} " in head


KINDS = {
    "int": ("int", "dtype"), "float": ("float",), "str": ("str",), "bool": ("bool",),
    "List[int]": ("ints",),
}  # fmt: skip
"""Types of a schema, and those of the table that say the same."""


@pytest.mark.parametrize("version", versions())
@pytest.mark.parametrize("op", list(table()))
def test_the_table_and_the_schemas_agree(op: str, version: str) -> None:
    """Names, types and defaults of arguments, in every version; nothing that must be given is
    unknown to the table."""
    known = {a.name: a for a in torch._C.parse_schema(f"npu::{schemas(version)[op]}").arguments}
    entry = table()[op].arguments
    assert set(entry) <= set(known)
    assert {a.name for a in known.values() if not a.has_default_value()} <= set(entry)
    for name, said in entry.items():
        argument = known[name]
        type_ = re.sub(r"^Optional\[(.*)\]$", r"\1", str(argument.type))
        if isinstance(said, Plain):
            assert said.type in KINDS[type_], name
            defaults = [argument.default_value] if argument.has_default_value() else []
            assert said.default in [_constraints.REQUIRED, *defaults], name
        else:
            assert {"List[Tensor]" if form.listed else "Tensor" for form in said} == {type_}, name


# -- the door -----------------------------------------------------------------------------------


def test_refusal_judges_by_the_target_in_force() -> None:
    op = "npu_quant_lightning_indexer"
    narrow = dict(query=tensor("int8", 4, 4, 128), weights=tensor("fp16", 4, 4),
                  query_dequant_scale=tensor("fp16", 4, 4))  # fmt: skip
    for arch, heads in (("a2", None), ("a3", None), ("950", "heads is 4")):
        with use(target=stand_in(f"npu:{arch}", "cpu")):
            reason = refusal(op, **wrong_call(op, arch, narrow))
        assert reason is None if heads is None else heads in (reason or "")


def test_an_op_that_is_not_in_the_table_is_an_error() -> None:
    with use(target=stand_in("npu:a2", "cpu")), pytest.raises(KeyError, match="npu_absent"):
        refusal("npu_absent")


def test_a_checked_call_is_judged_first() -> None:
    stand = stand_in("npu:a2", "cpu")
    with use(target=stand, checked=True), pytest.raises(BadInput, match="querry"):
        call("npu_swiglu", querry=torch.zeros(2, 4))
    with use(target=stand), pytest.raises(Absent, match=r"torch.ops.npu has no npu_absent"):
        call("npu_absent", x=torch.zeros(1))


def test_an_argument_nobody_named_is_refused_by_name() -> None:
    arguments: dict[str, Any] = {**calls("npu_swiglu", "a2")[0], "glu": 1}
    assert "it is passed glu" in str(table()["npu_swiglu"].problem("a2", arguments))
