"""The shape of the tree: links, import directions, homes of side effects, docstrings, file
names."""

from __future__ import annotations

import ast
import inspect
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dsa_hal.cli.output import as_csv
from dsa_hal.cli.support import COLUMNS as SUPPORT_COLUMNS
from dsa_hal.cli.support import records as support_records
from dsa_hal.registry import Op
from dsa_hal.selection import OPS, selection, use
from dsa_hal.support import support
from dsa_hal.target import implements, packages

ROOT = Path(__file__).parent.parent
FOLDERS = ("ops", "backends", "autotune", "model")
SOURCES = sorted(
    path
    for folder in (*FOLDERS, "dsa_hal", "tests", "ci")
    for path in (ROOT / folder).rglob("*.py")
    if not any(parent.is_symlink() for parent in path.parents)
)


def room(path: Path) -> str:
    """The folder that decides what a file may do: "ops", "backends/cuda", "core", "cli"."""
    parts = path.relative_to(ROOT).parts
    if parts[0] == "dsa_hal":
        return "cli" if parts[1] in ("cli", "__main__.py") else "core"
    return "/".join(parts[:2]) if parts[0] == "backends" and len(parts) > 2 else parts[0]


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("folder", FOLDERS)
def test_links(folder: str) -> None:
    link = ROOT / "dsa_hal" / folder
    assert link.is_symlink() and os.readlink(link) == f"../{folder}"


MAY_NOT_IMPORT = {
    "ops": ("dsa_hal.backends", "dsa_hal.model", "dsa_hal.cli"),
    "model": ("dsa_hal.backends", "dsa_hal.cli"),
    "autotune": ("dsa_hal.backends", "dsa_hal.model", "dsa_hal.ops", "dsa_hal.cli"),
    "backends": ("dsa_hal.model", "dsa_hal.cli"),
    "core": ("dsa_hal.backends", "dsa_hal.model", "dsa_hal.cli"),
}
VENDORS = ("triton", "torch_npu", "flash_mla", "deep_gemm", "flashinfer", "aiter")


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_rules_of_a_file(path: Path) -> None:
    """Import directions; `print`, `os.environ` and device modules only in their homes; length."""
    text = path.read_text()
    tree, here = ast.parse(text), room(path)
    names = set(imported(tree))
    banned = MAY_NOT_IMPORT.get(here.partition("/")[0], ())
    assert not [n for n in names if n.startswith(banned)] if banned else True
    assert not [n for n in names if n.split(".")[0] in FOLDERS], "import through dsa_hal"
    if here in ("core", "ops", "model", "autotune"):
        assert not [n for n in names if n.split(".")[0] in VENDORS]
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "print", f"line {node.lineno}: print"
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                dotted = f"{node.value.id}.{node.attr}"
                assert dotted not in ("torch.cuda", "torch.npu"), f"line {node.lineno}: {dotted}"
                home = path.name == "env.py" and here == "core"
                assert dotted != "os.environ" or home, f"line {node.lineno}: {dotted}"
    if here == "ops":
        strings = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
        assert not strings & set(packages()), "ops never name a backend"
    assert text.count("\n") <= 500, "a room this long is two rooms"
    assert ast.get_docstring(tree), "a file says what it is"


def test_backend_files_are_named_like_their_ops() -> None:
    """Each file of a backend is an op's name and registers at least one implementation of it."""
    for backend in packages():
        for name in implements(backend):
            assert name in OPS, f"backends/{backend}/{name}.py"
            target = selection().target
            if backend == target.backend:
                own = [i for i in OPS[name].implementations(target) if i.backend == backend]
                assert own, f"backends/{backend}/{name}.py registers nothing"


def test_the_processor_serves_every_op() -> None:
    with use(backend="cpu") as chosen:
        missing = [op.name for op in OPS.values() if not chosen.candidates(op)[0]]
    assert not missing


@pytest.mark.parametrize("op", list(OPS.values()), ids=lambda op: op.name)
def test_declarations_are_complete(op: Op[..., Any]) -> None:
    """Cases awkward and true, declared axes, positive cost, inputs on meta, a docstring that names
    every argument and result, with axes in brackets where it is a tensor."""
    assert len({case.name for case in op.cases}) == len(op.cases), "case names repeat"
    assert any(not case.model for case in op.cases) and any(case.model for case in op.cases)
    for case in op.cases:
        undeclared = set(case.axes) - set(op.constant) - set(op.variable)
        assert not undeclared, f"{case.name}: axes {undeclared} are neither constant nor variable"
        inputs = case.make(op.inputs, "meta")
        tensors = [t for v in inputs.values() for t in (v if isinstance(v, list) else [v])]
        assert all(t.is_meta for t in tensors if isinstance(t, torch.Tensor))
        if case.model:
            cost = op.cost(**inputs)
            assert cost.bytes > 0 and cost.flop >= 0, case.name
            assert all(size > 0 for size in op.sizes(**inputs).values()), case.name
    document = op.__doc__ or ""
    for name, parameter in inspect.signature(op.reference).parameters.items():
        assert re.search(rf"\b{name}\b", document), f"docstring does not mention {name}"
        if parameter.annotation is torch.Tensor:
            assert re.search(rf"^ *(-> )?.*\b{name}\b.*\[", document, re.M), f"{name}: which axes?"
    assert "ource" in document, "where does the definition come from?"


def test_the_support_table_is_current() -> None:
    """The committed table is what this tree answers, so that a diff shows every cell that
    changed."""
    with use(backend="cpu"):
        now = as_csv(SUPPORT_COLUMNS, support_records(support()))
    assert (ROOT / "ci" / "support" / "cpu.csv").read_text() == now, (
        "run: DSA_HAL_BACKEND=cpu dsa-hal support --format csv > ci/support/cpu.csv"
    )


def traps() -> dict[int, str]:
    """The known traps in CONTRIBUTING.md: number -> the cell that says where it is sprung."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| (\d+) \| [^|]+ \| ([^|]+) \|$", text, re.M)
    return {int(number): where.strip() for number, where in rows}


def test_every_known_trap_is_sprung() -> None:
    """Each trap of the table belongs to a case of the ops named, or to a test that exists."""
    table = traps()
    assert sorted(table) == list(range(1, 26))
    sprung: dict[int, set[str]] = {}
    for op in OPS.values():
        for case in op.cases:
            for trap in case.traps:
                sprung.setdefault(trap, set()).add(op.name)
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for number, where in table.items():
        named = re.findall(r"`(\w+)`", where)
        assert named, f"trap {number} names nothing"
        for name in named:
            known = name in sprung.get(number, set()) or f"def {name}(" in tests
            assert known, f"trap {number}: neither a case of op {name} nor a test"
    assert not set(sprung) - set(table)
