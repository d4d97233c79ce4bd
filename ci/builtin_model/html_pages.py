"""An HTML page of documentation as blocks of plain text (extract.py says what a block is).

Knows the layouts of the usual generators: Sphinx, DocBook, Doxygen, rustdoc, Scribble, haddock.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lxml import etree
from markup import Block
from packages import read

FORMULA = "\ufffc"  # stands where a formula was that plain text cannot say

_HEADS = {"h1": 1, "h2": 2, "h3": 3, "h4": 4, "h5": 5, "h6": 6, "summary": 6, "caption": 6}
_BLOCKS = set(_HEADS) | {
    "p", "div", "section", "article", "main", "ul", "ol", "li", "dl", "dt", "dd", "pre", "table",
    "thead", "tbody", "tr", "td", "th", "blockquote", "details", "figure", "figcaption", "body",
    "center", "hr", "header", "fieldset", "address",
}  # fmt: skip
_SKIPPED = {
    "script", "style", "nav", "footer", "form", "button", "svg", "img", "select", "textarea",
    "noscript", "iframe", "object", "template", "aside", "input", "head",
}  # fmt: skip
_SKIPPED_CLASS = re.compile(
    r"(^|[ _-])(headerlink|toctree-wrapper|toc|tocs|local|sphinxsidebar|sidebar|sidebar-.*|related|"
    r"navheader|navfooter|navbar|navigation|breadcrumbs?|footer|indextable|genindextable|viewcode-link|"
    r"linenos|linenodiv|copybtn|footnote-reference|srclink|src|rightside|notable-traits|"
    r"since|tocset|navset.*|toplang|bottomlang|comments_section|fancy_header|nosearch|"
    r"spirit-nav|copyright-footer|mw-editsection|doc-index|link-seesrc|synopsis|seealso|funcsynopsis|api_metadata"
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


def page(path: Path, name: str) -> Iterator[Block]:
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
