"""What torch_npu's ops take, read from `constraints.yaml`, and whether one call fits.

The table lists what may be passed: an argument, a dtype, a form that it does not name is refused.
Its language, a readable line a rule:

    query: dense bf16 fp16 [tokens, heads, 128]     dtypes, then axes; `dense` is without gaps
    x: list bf16 [rows, k]                          a list of exactly one such tensor
    block_table: int32 [requests, columns] = None   may be left out; `or None`: said, if only None
    sparse_count: int = 2048                        a plain argument and the schema's default
    key: [bf16 [keys, 1, 128] if layout_key == 'TND', ...]    the first form whose condition holds
    heads <= 64 if arch != '950'                    a rule, and the condition under which it holds

A number among the axes is the size that axis must have. A name is bound by the first axis that
bears it, and every other must agree; `*lead` stands for any leading axes. No tensor may be empty.
Rules speak of axes, plain arguments and `arch`, and may ask `dtype(x)`, `given(x)` (not None),
`same(x, y)` (one tensor under two names).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import CodeType
from typing import Any

import torch
import yaml
from torch import Tensor

TABLE = Path(__file__).with_name("constraints.yaml")

DTYPES = {
    "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "int8": torch.int8,
    "int32": torch.int32, "int64": torch.int64, "e4m3": torch.float8_e4m3fn,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}

PLAIN: dict[str, tuple[type, ...]] = {
    "int": (int,), "float": (int, float), "str": (str,), "bool": (bool,), "ints": (list, tuple),
    "dtype": (torch.dtype,),
}  # fmt: skip

_FORM = re.compile(
    r"(?P<marks>(?:list |dense )*)(?P<dtypes>\w+(?: \w+)*) \[(?P<axes>[^\]]*)\]"
    r"(?P<optional> = None| or None)?"
)
_PLAIN = re.compile(rf"(?P<type>{'|'.join(PLAIN)})(?: = (?P<default>.+))?")

REQUIRED = object()
"""In the place of the default of an argument that has none."""


@dataclass(frozen=True)
class Expression:
    """A condition in the table's words, as text and compiled."""

    text: str
    code: CodeType
    names: tuple[str, ...]

    @classmethod
    def of(cls, text: str) -> Expression:
        tree = ast.parse(text.strip(), mode="eval")
        named = dict.fromkeys(node.id for node in ast.walk(tree) if isinstance(node, ast.Name))
        return cls(
            text.strip(), compile(tree, TABLE.name, "eval"), tuple(n for n in named if n not in ASK)
        )

    def holds(self, facts: Mapping[str, Any]) -> bool:
        return bool(eval(self.code, {"__builtins__": {}, **ASK}, dict(facts)))


def _dtype(x: Tensor | torch.dtype) -> str:
    dtype = x if isinstance(x, torch.dtype) else x.dtype
    return NAMES.get(dtype, str(dtype))


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and _place(a) == _place(b))


def _place(x: Tensor) -> tuple[Any, ...]:
    return x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride()


ASK: dict[str, Any] = {
    "dtype": _dtype, "given": lambda x: x is not None, "same": _same, "len": len, "range": range,
}  # fmt: skip
"""What an expression may call."""


@dataclass(frozen=True)
class Rule:
    """What must hold of a call whose condition `when` holds, and where that is said."""

    must: Expression
    when: Expression | None
    source: str

    @classmethod
    def of(cls, text: str, source: str) -> Rule:
        must, _, when = text.partition(" if ")
        return cls(Expression.of(must), Expression.of(when) if when else None, source)

    def broken(self, facts: Mapping[str, Any]) -> str | None:
        if (self.when is not None and not self.when.holds(facts)) or self.must.holds(facts):
            return None
        named = dict.fromkeys((*self.must.names, *(self.when.names if self.when else ())))
        found = ", ".join(f"{name} is {words(facts.get(name))}" for name in named)
        where = f" where {self.when.text}" if self.when else ""
        return f"{found}; expected {self.must.text}{where} ({self.source})"


@dataclass(frozen=True)
class Form:
    """What one tensor argument, or a list of one tensor, may be."""

    text: str
    dtypes: tuple[str, ...]
    axes: tuple[str, ...]
    listed: bool = False
    dense: bool = False
    may_lack: bool = False
    may_be_none: bool = False
    when: Expression | None = None

    @classmethod
    def of(cls, text: str) -> Form:
        what, _, when = text.partition(" if ")
        found = _FORM.fullmatch(what)
        if found is None:
            raise ValueError(f"{TABLE.name}: {text!r} is no form of a tensor")
        dtypes, marks = tuple(found["dtypes"].split()), found["marks"].split()
        if unknown := set(dtypes) - set(DTYPES):
            raise ValueError(f"{TABLE.name}: {text!r} names dtypes {sorted(unknown)}")
        axes = tuple(axis.strip() for axis in found["axes"].split(",") if axis.strip())
        return cls(
            f"{' '.join(dtypes)} [{', '.join(axes)}]", dtypes, axes, "list" in marks,
            "dense" in marks, found["optional"] == " = None", found["optional"] is not None,
            Expression.of(when) if when else None,
        )  # fmt: skip

    def broken(self, name: str, value: Any, sizes: dict[str, Any]) -> str | None:
        """Why `value` is not of this form; binds the axes that it is the first to name."""
        if self.listed and not (isinstance(value, list | tuple) and len(value) == 1):
            count = f"a list of {len(value)}" if isinstance(value, list | tuple) else "no list"
            return f"{name} is {count}; expected a list of one tensor {self.text}"
        value = value[0] if self.listed else value
        wrong = self._wrong(value, sizes) if isinstance(value, Tensor) else f"expected {self.text}"
        return wrong and f"{name} is {words(value)}; {wrong}"

    def _wrong(self, value: Tensor, sizes: dict[str, Any]) -> str | None:
        axes = [axis for axis in self.axes if not axis.startswith("*")]
        lead = value.ndim - len(axes)
        right_rank = lead == 0 or (lead > 0 and len(axes) < len(self.axes))
        if not right_rank or value.dtype not in [DTYPES[dtype] for dtype in self.dtypes]:
            return f"expected {self.text}"
        for axis, size in zip(axes, value.shape[lead:], strict=True):
            expected = int(axis) if axis.isdigit() else sizes.setdefault(axis, size)
            if size != expected:
                known = "" if axis.isdigit() else f", where {axis} is {expected}"
                return f"expected {self.text}{known}"
        if not value.numel():
            return f"expected {self.text}, and something in it"
        if self.dense and not value.is_contiguous():
            return f"its strides are {list(value.stride())}, expected it without gaps"
        return None


@dataclass(frozen=True)
class Plain:
    """What a plain argument may be."""

    type: str
    default: Any = REQUIRED

    def broken(self, name: str, value: Any) -> str | None:
        if value is None and self.default is None:
            return None
        flag = isinstance(value, bool)  # which Python takes for a number
        fits = isinstance(value, PLAIN[self.type]) and flag == (self.type == "bool")
        return None if fits else f"{name} is {value!r}; expected {self.type}"


@dataclass(frozen=True)
class Entry:
    """What the table says of one op.

    aclnn      the CANN functions behind it, of which the library must have one
    arguments  name -> the forms it may have, or what plain value
    rules      in the order in which they are asked
    """

    name: str
    aclnn: tuple[str, ...]
    arguments: Mapping[str, tuple[Form, ...] | Plain]
    rules: tuple[Rule, ...]

    @classmethod
    def of(cls, name: str, said: Mapping[str, Any]) -> Entry:
        rules = [
            Rule.of(text, source)
            for source, texts in said.get("rules", {}).items()
            for text in texts
        ]
        return cls(
            name, tuple(said["aclnn"].split(" | ")),
            {k: _argument(v) for k, v in said["arguments"].items()}, tuple(rules),
        )  # fmt: skip

    def problem(self, arch: str, given: Mapping[str, Any]) -> str | None:
        """Why a call with these arguments, by keyword, does not fit; the first reason found."""
        return next((f"{self.name}: {wrong}" for wrong in self._problems(arch, given)), None)

    def _problems(self, arch: str, given: Mapping[str, Any]) -> Iterator[str]:
        for name in given:
            if name not in self.arguments:
                known = ", ".join(self.arguments)
                yield f"it is passed {name}, which is not among its arguments here: {known}"
        facts: dict[str, Any] = {"arch": arch}
        for name, said in self.arguments.items():
            if name not in given and not _may_lack(said):
                yield f"{name} is missing"
            default = said.default if isinstance(said, Plain) else None
            facts[name] = value = given.get(name, default)
            if isinstance(said, Plain) and (wrong := said.broken(name, value)) is not None:
                yield wrong
        for name, said in self.arguments.items():
            if isinstance(said, Plain):
                continue
            form = next((f for f in said if f.when is None or f.when.holds(facts)), None)
            if form is None:
                yield _no_form(name, said, facts)
            elif facts[name] is None and form.may_be_none:
                continue
            elif (wrong := form.broken(name, facts[name], facts)) is not None:
                yield wrong
            elif form.listed:
                facts[name] = facts[name][0]
        for rule in self.rules:
            if (wrong := rule.broken(facts)) is not None:
                yield wrong


def _may_lack(said: tuple[Form, ...] | Plain) -> bool:
    if isinstance(said, Plain):
        return said.default is not REQUIRED
    return any(form.may_lack for form in said)


def _no_form(name: str, forms: tuple[Form, ...], facts: Mapping[str, Any]) -> str:
    named = dict.fromkeys(n for form in forms if form.when for n in form.when.names)
    found = ", ".join(f"{n} is {words(facts[n])}" for n in named)
    known = " or ".join(form.when.text for form in forms if form.when)
    return f"{found}; expected {known}, which says what {name} is"


def _argument(said: str | list[str]) -> tuple[Form, ...] | Plain:
    if isinstance(said, str) and (plain := _PLAIN.fullmatch(said)):
        default = plain["default"]
        return Plain(plain["type"], REQUIRED if default is None else ast.literal_eval(default))
    return tuple(Form.of(text) for text in ([said] if isinstance(said, str) else said))


def words(value: Any) -> str:
    """A value in the table's words."""
    if isinstance(value, Tensor):
        return f"{NAMES.get(value.dtype, str(value.dtype))} {list(value.shape)}"
    return "not given" if value is None else repr(value)


@cache
def table() -> Mapping[str, Entry]:
    """The table, by op."""
    said = yaml.safe_load(TABLE.read_text())
    return {name: Entry.of(name, entry) for name, entry in said["ops"].items()}
