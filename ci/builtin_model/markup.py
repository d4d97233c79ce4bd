"""reStructuredText and Markdown, as they stand in docstrings and text files, as blocks of text.

Lenient on purpose: docstrings mix both and follow neither strictly. Blocks are extract.py's.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator

Block = tuple[str, str]

_RULE = re.compile(r"^([=\-~^\"'*+#`.])\1{2,}\s*$")
_BULLET = re.compile(r"^([-*+]|\d{1,2}[.)]|\(\d+\))\s+(?=\S)")
_DIRECTIVE = re.compile(r"^\.\.\s+([\w:-]+)::\s*(.*)$")
_FIELD = re.compile(r"^:(\w[^:`]*):(?:\s+(.*))?$")
_PARAMETER = re.compile(r"^(\*{0,2}\w[\w.]*(?:, \*{0,2}\w+)*)\s:\s(.+)$")
_GOOGLE = re.compile(r"^`*(\*{0,2}\w[\w.]*)`*(\s\(.*?\))?:(\s+\S.*)?$")
_TABLE = re.compile(r"^(={2,}\s+[= ]*=|\+-[-+=]*\+$)")
_MARKS = ("|", "!!!", "///", ":::", "{%", "{{", "% ", "<", "---", "[^")
_TOLD = {
    "note": "Note: ",
    "warning": "Warning: ",
    "tip": "Tip: ",
    "important": "Important: ",
    "caution": "Caution: ",
    "admonition": "",
}
_CODE = {"code", "code-block", "sourcecode", "prompt", "testcode", "parsed-literal", "ipython"}


def text_blocks(text: str) -> Iterator[Block]:
    text = re.sub(r"<!--.*?-->", "", text.expandtabs(8), flags=re.S)
    yield from _blocks(text.splitlines())


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _body(lines: list[str], start: int, above: int) -> int:
    """End of the lines from `start` that are blank or indented deeper than `above`."""
    end = start
    while end < len(lines) and (not lines[end].strip() or _indent(lines[end]) > above):
        end += 1
    return end


def _blocks(lines: list[str]) -> Iterator[Block]:
    i = 0
    literal = False  # the paragraph before ended in "::"
    while i < len(lines):
        line = lines[i]
        if not line.strip():
            i += 1
            continue
        indent, bare = _indent(line), line.strip()
        if literal and indent:
            end = _body(lines, i, indent - 1)
            yield "code", textwrap.dedent("\n".join(lines[i:end]))
            i, literal = end, False
            continue
        literal = False
        if bare.startswith(("```", "~~~")):
            end = next(
                (j for j in range(i + 1, len(lines)) if lines[j].strip().startswith(bare[:3])),
                len(lines),
            )
            yield "code", textwrap.dedent("\n".join(lines[i + 1 : end]))
            i = end + 1
        elif bare.startswith(".."):
            end = _body(lines, i + 1, indent)
            yield from _directive(bare, lines[i + 1 : end])
            i = end
        elif bare.startswith(">>>"):
            end = i
            while end < len(lines) and lines[end].strip():
                end += 1
            yield "code", textwrap.dedent("\n".join(lines[i:end]))
            i = end
        elif bare.startswith("#") and re.match(r"^#{1,6}\s+\S", bare):
            yield f"head{bare.index(' ')}", inline(bare.lstrip("# "))
            i += 1
        elif _TABLE.match(bare):
            while i < len(lines) and lines[i].strip():
                i += 1
            yield "code", ""
        elif _RULE.match(bare) or bare.startswith(_MARKS):
            i += 1
        elif i + 1 < len(lines) and _RULE.match(lines[i + 1].strip()):
            yield "head3", inline(bare)
            i += 2
        else:
            end = i + 1
            while end < len(lines) and lines[end].strip() and _continues(lines[end], indent):
                end += 1
            yield from _paragraph([each.strip() for each in lines[i:end]], lines[i:end])
            literal = lines[end - 1].rstrip().endswith("::")
            i = end


def _continues(line: str, indent: int) -> bool:
    """Whether a line belongs to the paragraph of a line indented by `indent`."""
    bare = line.strip()
    if _indent(line) < indent or bare.startswith((">>>", "```", ".. ")):
        return False
    if _indent(line) > indent:
        return not _BULLET.match(bare)
    return not (_BULLET.match(bare) or _FIELD.match(bare) or _PARAMETER.match(bare)) and not (
        _GOOGLE.match(bare) and indent
    )


def _paragraph(bare: list[str], lines: list[str]) -> Iterator[Block]:
    first, rest = bare[0], bare[1:]
    indented = bool(rest) and _indent(lines[1]) > _indent(lines[0])
    parameter, field, bullet = _PARAMETER.match(first), _FIELD.match(first), _BULLET.match(first)
    if parameter and (indented or not rest):
        yield "item", inline(f"{parameter[1]} ({parameter[2]}): {' '.join(rest)}")
    elif field:
        words = field[1].split()
        named = words[0] in ("param", "arg", "keyword", "ivar")
        label = words[-1] if named else field[1].capitalize()
        if words[0] not in ("type", "rtype", "class", "module"):
            yield "item", inline(f"{label}: {' '.join([field[2] or '', *rest])}")
    elif bullet:
        yield "item", inline(" ".join([first[bullet.end() :], *rest]))
    elif re.match(r"^[A-Z][A-Za-z ]{2,25}:$", first) and indented:
        yield "head4", first.rstrip(":")
        yield from _blocks(lines[1:])  # still indented, which marks its lines as arguments
    elif _GOOGLE.match(first) and _indent(lines[0]):
        yield "item", inline(" ".join(bare))
    elif indented and len(first) < 70 and first[-1] not in ".,:":
        yield "term", inline(first)
        yield from _blocks(textwrap.dedent("\n".join(lines[1:])).splitlines())
    else:
        yield "para", inline(re.sub(r"::$", ":", " ".join(bare)))


def _directive(first: str, body: list[str]) -> Iterator[Block]:
    found = _DIRECTIVE.match(first)
    if not found:
        return
    name, argument = found[1].lower(), found[2]
    kept = [line for line in body if not re.match(r"^\s*:[\w-]+:( |$)", line)]
    inner = textwrap.dedent("\n".join(kept)).splitlines()
    if name in _CODE:
        yield "code", "\n".join(inner)
    elif name in _TOLD or name in ("seealso", "topic", "rubric", "hint"):
        told = list(_blocks([argument, "", *inner]))
        if told and told[0][0] == "para":
            told[0] = ("para", _TOLD.get(name, "") + told[0][1])
        yield from told
    elif name in ("versionadded", "versionchanged", "deprecated"):
        yield from _blocks(inner)
    elif name.rpartition(":")[2] in ("function", "class", "method", "attribute", "data", "option"):
        yield "term", argument
        yield from _blocks(inner)


def inline(text: str) -> str:
    """A line without roles, links, emphasis and literal marks."""
    text = re.sub(r"</?(a|p|b|i|em|br|img|div|span|sup|sub|code|strong|kbd)\b[^>]*>", "", text)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)
    text = re.sub(r"\[([^\]]+)\]\([^)\s]+\)", r"\1", text)
    text = re.sub(r":[\w:+-]+:`([^`<]*?)\s*<[^>`]*>`", r"\1", text)
    text = re.sub(r":[\w:+-]+:`[~!]?([^`]*)`", r"\1", text)
    text = re.sub(r"`([^`<]+?)\s*<[^>`]*>`_{0,2}", r"\1", text)
    text = re.sub(r"`{1,2}~?([^`]+)`{1,2}_{0,2}", r"\1", text)
    text = re.sub(r"\*\*([^*\s][^*]*)\*\*", r"\1", text)
    text = re.sub(r"(?<![\w*])\*([^*\s][^*]*)\*(?![\w*])", r"\1", text)
    text = re.sub(r"\s?\[\d+\]_", "", text)
    return " ".join(text.split())
