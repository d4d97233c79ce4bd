"""The ops: what each means. A file per family; a new op is a new function in one, and no list is
edited.

`dsa_hal.ops.sparse_mla`, or, for editors and type checkers, from its family:
`from dsa_hal.ops.attention import sparse_mla`.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from dsa_hal.registry import Op
from dsa_hal.selection import OPS

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"dsa_hal.ops.{_module.name}")


def __getattr__(name: str) -> Op[..., Any]:
    try:
        return OPS[name]
    except KeyError:
        raise AttributeError(f"no op {name!r}; known are {', '.join(sorted(OPS))}") from None


def __dir__() -> list[str]:
    return sorted(OPS)
