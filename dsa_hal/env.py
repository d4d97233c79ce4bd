"""Every environment variable of dsa_hal: its name, type, default and meaning. Read here and nowhere
else."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from dsa_hal.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class Variable(Generic[T]):
    """One environment variable. `read()` parses it anew on each call; callers cache what they
    need."""

    name: str
    type: str
    default: str
    meaning: str
    parse: Callable[[str], T]

    def read(self) -> T:
        """The parsed value; a value that does not parse raises ConfigError with name and value."""
        text = os.environ.get(self.name, "").strip() or self.default
        try:
            return self.parse(text)
        except ValueError as error:
            raise ConfigError(f"{self.name}={text!r}: {error}") from None


def _flag(text: str) -> bool:
    known = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    if text.lower() not in known:
        raise ValueError("expected 1 or 0")
    return known[text.lower()]


def _pairs(text: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        op, equals, impl = item.partition("=")
        if not (equals and op.strip() and impl.strip()):
            raise ValueError(f"{item!r} is not of the form op=implementation")
        if op.strip() in pairs:
            raise ValueError(f"op {op.strip()!r} is named twice")
        pairs[op.strip()] = impl.strip()
    return pairs


def _log_mode(text: str) -> str:
    if text not in ("off", "ops"):
        raise ValueError("known values are off and ops")
    return text


BACKEND = Variable(
    "DSA_HAL_BACKEND",
    "name",
    "auto",
    "Backend that serves every op: auto (the best device present that serves the whole model), or a"
    " backend's name: cpu, cuda, rocm, npu, or one that an installed package adds. A named backend"
    " whose device is absent is an error.",
    str,
)
TARGET = Variable(
    "DSA_HAL_TARGET",
    "backend:arch",
    "",
    "The target to answer for, as rocm:gfx950, cuda:sm90 or npu:a2, whether or not this machine"
    " is one: `support`, `explain`, `tune --static` and compilation work without its device, and"
    " whatever would execute on it is refused.",
    str,
)
IMPL = Variable(
    "DSA_HAL_IMPL",
    "op=name,...",
    "",
    "Implementation per op, as in sparse_mla=gluon,topk=torch. Strict: it runs or it raises."
    " `reference` names an op's fp32 reference.",
    _pairs,
)
DETERMINISTIC = Variable(
    "DSA_HAL_DETERMINISTIC",
    "flag",
    "0",
    "1 refuses every implementation that does not promise bitwise equal repeats.",
    _flag,
)
CHECK = Variable(
    "DSA_HAL_CHECK",
    "flag",
    "0",
    "1 looks at the indices, counts and ranges of every call first, and refuses those that point"
    " outside. It waits for the device, so it is for finding faults, not for serving; graphs cannot"
    " be captured under it.",
    _flag,
)
LOG = Variable(
    "DSA_HAL_LOG",
    "off | ops",
    "off",
    "ops writes a line per op call to stderr before it runs: implementation, shapes, dtypes.",
    _log_mode,
)
CACHE = Variable(
    "DSA_HAL_CACHE",
    "folder",
    "~/.cache/dsa_hal",
    "Where tuning results of this machine are kept.",
    lambda text: Path(text).expanduser(),
)

VARIABLES: tuple[Variable[Any], ...] = (BACKEND, TARGET, IMPL, DETERMINISTIC, CHECK, LOG, CACHE)


def table() -> str:
    """The variables as a Markdown table; the README holds this text and a test compares them."""
    rows = ["| variable | value | default | meaning |", "| --- | --- | --- | --- |"]
    rows += [
        f"| `{v.name}` | {v.type.replace('|', 'or')} | {v.default or 'empty'} | {v.meaning} |"
        for v in VARIABLES
    ]
    return "\n".join(rows)
