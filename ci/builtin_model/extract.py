"""Pages of documentation as blocks of plain text: what a page says, without its markup.

A block is (kind, text). Kinds: "head1" (the highest) to "head6" and "term" introduce what follows
them, "para" and "item" are prose, "code" keeps its line breaks. Nothing is judged here; clean.py
decides what stays.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from html_pages import html_blocks
from html_pages import page as html_page
from markup import Block, text_blocks
from packages import read

_GROFF = ["groff", "-Kutf8", "-Tutf8", "-P-c", "-t", "-mandoc", "-rLL=900n", "-rHY=0"]
_LONG_LINE = 700  # a line at least this long was broken by groff, so the next one continues it


def page_blocks(path: Path, form: str, name: str) -> list[Block]:
    """Blocks of one file. `form`: a key of the table at the end; `name`: the file's name for the
    formats that state it (a module's docstrings)."""
    return list(_FORMS[form](path, name))


def _man(path: Path, name: str) -> Iterator[Block]:
    source = read(path)
    if source.startswith(b".so "):
        return
    done = subprocess.run(_GROFF, input=source, capture_output=True, check=False)
    lines = done.stdout.decode("utf-8", "replace").splitlines()
    lines = [re.sub(r".\x08|\x1b\[[0-9;]*m", "", line).rstrip() for line in lines]
    lines = [line for line in lines[1:-1] if not re.match(r"^\S+\(\w+\)\s{10,}", line)]
    skipping = False
    yield "head1", path.name.partition(".")[0]
    for group in _groups(lines):
        if group[0][0] != " ":
            title = group.pop(0).strip()
            skipping = title in ("SYNOPSIS", "HISTORY")
            if not skipping:
                yield "head2", title
        if group and not skipping:
            yield from _man_group([line.strip() for line in group])


def _groups(lines: list[str]) -> Iterator[list[str]]:
    group: list[str] = []
    for line in [*lines, ""]:
        if line:
            if group and len(group[-1]) > _LONG_LINE:
                group[-1] += " " + line.strip()
            elif group and line[0] != " ":
                yield group
                group = [line]
            else:
                group.append(line)
        elif group:
            yield group
            group = []


def _man_group(lines: list[str]) -> Iterator[Block]:
    lines = [re.sub(r"^(\S.{0,30}?)\s{2,}(?=\S)", r"\1: ", line) for line in lines]
    lines = [" ".join(line.replace("•: ", "- ").split()) for line in lines]
    if len(lines) > 2 and max(map(len, lines)) < 80:
        yield "code", "\n".join(lines)
        return
    for i, line in enumerate(lines):
        followed = i + 1 < len(lines) and len(line) < 60 and line[-1] not in ".:;"
        yield ("term" if followed else "para"), line


def _docstrings(path: Path, name: str) -> Iterator[Block]:
    """A module's docstrings in order, each after its dotted name and arguments."""
    try:
        tree = ast.parse(read(path).decode("utf-8", "replace"))
    except SyntaxError:
        return
    yield from _members(tree, name)


def _members(node: Any, name: str) -> Iterator[Block]:
    doc = ast.get_docstring(node)
    if doc and (isinstance(node, ast.Module) or len(doc) > 200):
        yield ("head1" if isinstance(node, ast.Module) else "head2"), name + _arguments(node)
        yield from text_blocks(doc)
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            parent = name if isinstance(node, ast.Module) else name.rpartition(".")[2]
            if not child.name.startswith("_"):
                yield from _members(child, f"{parent}.{child.name}")


def _arguments(node: Any) -> str:
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return ""
    args = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    names = [arg.arg for arg in args if arg.arg not in ("self", "cls")]
    text = ", ".join(names)
    return f"({text if len(text) < 60 else ', '.join(names[:4]) + ', ...'})"


def _service(path: Path, name: str) -> Iterator[Block]:
    """A service description of botocore: its operations, then the structures that they use."""
    service = json.loads(read(path))
    shapes = service.get("shapes", {})
    yield "head1", service["metadata"].get("serviceFullName", name)
    yield from html_blocks(f"<body>{service.get('documentation', '')}</body>")
    told = set()

    def members(shape: str) -> Iterator[Block]:
        told.add(shape)
        for member, value in shapes.get(shape, {}).get("members", {}).items():
            blocks = list(html_blocks(f"<body>{value.get('documentation', '')}</body>"))
            if blocks:
                yield "term", f"{member} ({value['shape']})"
                yield from blocks

    for title, operation in service.get("operations", {}).items():
        yield "head2", title
        yield from html_blocks(f"<body>{operation.get('documentation', '')}</body>")
        for side in ("input", "output"):
            if side in operation:
                yield from members(operation[side]["shape"])
    for shape, value in shapes.items():
        if shape not in told and value.get("type") == "structure":
            yield "head2", shape
            yield from html_blocks(f"<body>{value.get('documentation', '')}</body>")
            yield from members(shape)


def _text(path: Path, name: str) -> Iterator[Block]:
    yield from text_blocks(textwrap.dedent(read(path).decode("utf-8", "replace")))


_FORMS = {
    "html": html_page,
    "man": _man,
    "text": _text,
    "docstrings": _docstrings,
    "service": _service,
}
