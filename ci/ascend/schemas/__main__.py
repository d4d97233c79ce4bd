"""The command: wheels of torch_npu in, one file of schemas for each out.

Registration hands the dispatcher each schema as text, so that it stands in libtorch_npu.so as it
was written; neither torch_npu nor CANN has to be importable.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from ci.ascend.schemas import HERE, names

LIBRARY = "torch_npu/lib/libtorch_npu.so"
SCHEMA = re.compile(rb"[a-z_][a-z0-9_.]*\([ -~]*\) -> [ -~]+")
PRINTABLE = re.compile(rb"[ -~]{8,}")


def read(wheel: Path) -> tuple[str, dict[str, str]]:
    """(version, schema by name) of the ops of names.txt that a wheel has. Raises ValueError where
    it holds two schemas of one name."""
    version = wheel.name.split("-")[1]
    with zipfile.ZipFile(wheel) as archive:
        library = archive.read(LIBRARY)
    wanted, found = frozenset(names()), dict[str, str]()
    for text in PRINTABLE.findall(library):
        if SCHEMA.fullmatch(text) is None:
            continue
        schema = text.decode()
        name = schema.partition("(")[0]
        if name in wanted and found.setdefault(name, schema) != schema:
            raise ValueError(f"{wheel.name} has two schemas of {name}: {found[name]} | {schema}")
    return version, found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ci.ascend.schemas", description=__doc__)
    parser.add_argument("wheels", nargs="+", type=Path, metavar="WHEEL")
    for wheel in parser.parse_args(arguments).wheels:
        version, found = read(wheel)
        path = HERE / f"{version}.txt"
        draft = path.with_suffix(".part")
        draft.write_text("".join(f"{found[name]}\n" for name in sorted(found)))
        os.replace(draft, path)
        lacking = sorted(set(names()) - set(found))
        print(f"{version}: {len(found)} schemas; without {', '.join(lacking) or 'none'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
