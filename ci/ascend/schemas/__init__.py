"""Schemas of torch_npu's ops as several of its versions declare them: `<version>.txt`, one schema a
line, read out of the wheels without importing them.

    python -m ci.ascend.schemas torch_npu-2.13.0-*.whl ...     write them again

names.txt says which ops: those that the backend calls or may come to call. A call of the backend
has to be valid under every version from OLDEST on.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from packaging.version import Version

HERE = Path(__file__).parent

CURRENT = "2.13.0"
"""The version whose schemas are defined where no torch_npu is imported."""

OLDEST = "2.8.0.post5"
"""The oldest version under which every call has to be valid."""


@cache
def versions() -> tuple[str, ...]:
    """Versions with a file, oldest first."""
    return tuple(sorted((path.stem for path in HERE.glob("[0-9]*.txt")), key=Version))


@cache
def schemas(version: str = CURRENT) -> dict[str, str]:
    """Name of an op, with its overload ("npu_scatter_pa_cache.value") -> its schema."""
    lines = (HERE / f"{version}.txt").read_text().splitlines()
    return {line.partition("(")[0]: line for line in lines}


def names() -> tuple[str, ...]:
    """The ops of names.txt."""
    return tuple((HERE / "names.txt").read_text().split())
