"""Pages of documentation as blocks of plain text: what a page says, without its markup.

A block is (kind, text). Kinds: "head1" (the highest) to "head6" and "term" introduce what follows them,
"para" and "item" are prose, "code" keeps its line breaks. Nothing is judged here; clean.py decides what stays.
"""

from __future__ import annotations

import ast
import gzip
import json
import re
import subprocess
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lxml import etree
from markup import text_blocks

Block = tuple[str, str]

FORMULA = "\ufffc"  # stands where a formula was that plain text cannot say

_HEADS = {"h1": 1, "h2": 2, "h3": 3, "h4": 4, "h5": 5, "h6": 6, "summary": 6, "caption": 6}
_BLOCKS = set(_HEADS) | set(
    "p div section article main ul ol li dl dt dd pre table thead tbody tr td th blockquote details "
    "figure figcaption body center hr header fieldset address".split()
)
_SKIPPED = set(
    "script style nav footer form button svg img select textarea noscript iframe object template "
    "aside input head".split()
)
_SKIPPED_CLASS = re.compile(
    r"(^|[ _-])(headerlink|toctree-wrapper|toc|tocs|local|sphinxsidebar|sidebar|sidebar-.*|related|"
    r"navheader|navfooter|navbar|navigation|breadcrumbs?|footer|indextable|genindextable|viewcode-link|"
    r"linenos|linenodiv|copybtn|footnote-reference|srclink|src|rightside|notable-traits|"
    r"since|tocset|navset.*|toplang|bottomlang|comments_section|fancy_header|nosearch|"
    r"spirit-nav|copyright-footer|mw-editsection|doc-index|synopsis|seealso|funcsynopsis|api_metadata"
    r")( |$)|contents (local )?topic"
)
_SKIPPED_ID = re.compile(
    r"^(toc|contents|table-of-contents|trait-implementations.*|synthetic-implementations.*|"
    r"blanket-implementations.*|quickview|menu|sidebar.*|navigation|footer|header|path|page-header|"
    r"indices-and-tables|comments_section|column1|apicontent-toc|gtoc|topbar)$"
)
_MAIN = (
    "//div[@role='main']",
    "//main",
    "//div[@class='body']",
    "//section[@id='main-content']",
    "//div[@id='page-content']",
    "//div[@id='apicontent']",
    "//div[contains(@class,'maincolumn')]",
    "//div[@id='content']",
    "//article",
    "//body",
)
_GROFF = ["groff", "-Kutf8", "-Tutf8", "-P-c", "-t", "-mandoc", "-rLL=900n", "-rHY=0"]
_LONG_LINE = 700  # a line at least this long was broken by groff, so the next one continues it


def read(path: Path) -> bytes:
    data = path.read_bytes()
    return gzip.decompress(data) if path.suffix == ".gz" else data


def page_blocks(path: Path, form: str, name: str) -> list[Block]:
    """Blocks of one file. `form`: a key of the table at the end; `name`: the file's name for the
    formats that state it (a module's docstrings)."""
    return list(_FORMS[form](path, name))


def html_blocks(markup: str) -> Iterator[Block]:
    if not markup.strip():
        return
    root = etree.fromstring(markup.encode(), etree.HTMLParser(encoding="utf-8", huge_tree=True))
    if root is None:
        return
    for query in _MAIN:
        found = root.xpath(query)
        if found:
            yield from _walk(found[0])
            return


def next_page(path: Path) -> str | None:
    """File name that an HTML page's rel="next" link names, relative to the page."""
    found = re.search(
        rb"<link\b(?=[^>]*\brel=[\"']?next)[^>]*\bhref=[\"']([^\"'#?]+)", read(path)[:20000], re.I
    )
    return found.group(1).decode("utf-8", "replace") if found else None


def _html(path: Path, name: str) -> Iterator[Block]:
    data = read(path)
    declared = re.search(rb"charset=[\"']?([\w-]+)", data[:2000])
    try:
        text = data.decode(declared.group(1).decode() if declared else "utf-8", "replace")
    except LookupError:
        text = data.decode("utf-8", "replace")
    yield from html_blocks(re.sub(r"^\s*<\?xml[^>]*\?>", "", text))


def _is_skipped(node: Any) -> bool:
    if not isinstance(node.tag, str) or node.tag in _SKIPPED:
        return True
    names, identity = node.get("class"), node.get("id")
    return bool(
        (names and _SKIPPED_CLASS.search(names)) or (identity and _SKIPPED_ID.match(identity))
    )


def _inline(node: Any) -> str:
    parts = [node.text or ""]
    for child in node:
        if not _is_skipped(child):
            parts.append(_phrase(child))
        parts.append(child.tail or "")
    return "".join(parts)


def _phrase(node: Any) -> str:
    if node.tag == "br":
        return " "
    text = _inline(node)
    named = (node.get("class") or "").split()
    if "classifier" in named:  # a parameter's type, which Sphinx sets apart by style only
        return f": {text.strip()}"
    if "math" in named:
        plain = text.strip().removeprefix("\\(").removesuffix("\\)")
        return plain if re.fullmatch(r"[\w\s+\-*/=<>,.()]*", plain) else FORMULA
    return text


def _walk(node: Any, kind: str = "para") -> Iterator[Block]:
    """Text runs of a container become blocks; block elements inside it are entered."""
    run = [node.text or ""]

    def flush() -> Iterator[Block]:
        text = " ".join("".join(run).split())
        run.clear()
        if text:
            yield kind, text

    for child in node:
        if _is_skipped(child):
            pass
        elif child.tag in _BLOCKS or any(grand.tag in _BLOCKS for grand in child.iter()):
            yield from flush()
            yield from _element(child, kind)
            if kind in ("item", "term") and child.tag != "pre":
                kind = "para"
        else:
            run.append(_phrase(child))
        run.append(child.tail or "")
    yield from flush()


def _element(node: Any, kind: str) -> Iterator[Block]:
    if node.tag in _HEADS:
        yield f"head{_HEADS[node.tag]}", " ".join(_inline(node).split())
    elif node.tag == "pre":
        yield "code", "".join(node.itertext())
    elif node.tag == "table":
        yield from _table(node)
    elif node.tag == "li":
        yield from _walk(node, "item")
    elif node.tag == "p" and node.get("class") == "rubric":
        yield "head5", " ".join(_inline(node).split())
    elif node.tag == "dt":
        field = "field-" in (node.get("class") or "")  # "Parameters", "Returns"
        yield "head6" if field else "term", " ".join(_inline(node).split())
    elif node.tag in ("dd", "blockquote"):
        yield from _walk(node)
    else:
        yield from _walk(node, kind)


def _table(node: Any) -> Iterator[Block]:
    """Rows that say something in words, a row a line; a table that lays out blocks is entered.

    A table of symbols or numbers gives an empty block: something stood here.
    """
    told = False
    if node.xpath(".//pre | .//table | .//dl | .//td/div/p"):
        for cell in node.iter("td", "th"):
            yield from _walk(cell)
        return
    for row in node.iter("tr"):
        cells = [" ".join(_inline(cell).split()) for cell in row if cell.tag in ("td", "th")]
        cells = [cell.rstrip(" :") for cell in cells]
        cells = [cell for cell in cells if cell]
        if not cells:
            continue
        if all(cell.tag == "th" for cell in row if isinstance(cell.tag, str)):
            continue
        if max(cell.count(" ") for cell in cells) >= 4:
            yield "item", ": ".join(cells) if len(cells) < 3 else "; ".join(cells)
            told = True
    if not told:
        yield "code", ""


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
    "html": _html,
    "man": _man,
    "text": _text,
    "docstrings": _docstrings,
    "service": _service,
}
