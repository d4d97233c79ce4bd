"""What the installed torch_npu and CANN have of the ops that this backend calls.

torch_npu registers every op it was built with; whether CANN can run one is seen when it is called,
as a missing function of its operator library ("aclnnLightningIndexer ... not in libopapi.so"). So
both are asked beforehand: torch for the op's name, the dynamic linker for CANN's function, in the
libraries in which torch_npu looks (op-plugin, op_plugin/utils/op_api_common.cpp). Asked only for
a target that is a device of this machine; each answer is kept.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch

LIBRARY = "libopapi.so"
"""CANN's operators. Newer CANNs keep some in libraries beside it, libopapi_<family>.so."""

CUSTOM = Path("op_api/lib/libcust_opapi.so")
"""Operators that somebody added, under each folder for such."""

REMEDY = "install CANN 9 or newer, and the torch_npu made for it"


@cache
def missing(op: str, functions: tuple[str, ...]) -> str | None:
    """Why this process cannot run `torch.ops.npu.<op>`, which needs one of CANN's `functions`; None
    if it has what it needs."""
    if not hasattr(torch.ops.npu, op):
        return f"this torch_npu has no {op}; {REMEDY}"
    if not libraries():
        return f"{LIBRARY} cannot be loaded, so that there is no {op}; source CANN's set_env.sh"
    if any(hasattr(library, name) for name in functions for library in libraries()):
        return None
    names = " or ".join(functions)
    return f"{names} is not in this CANN's {LIBRARY}, so that there is no {op}; {REMEDY}"


@cache
def libraries() -> tuple[ctypes.CDLL, ...]:
    """Every library of CANN's operators that this process can load."""
    return tuple(library for name in _names() if (library := _loaded(name)) is not None)


def _names() -> Iterator[str]:
    yield LIBRARY
    home = os.environ.get("ASCEND_HOME_PATH")
    if home:
        yield from sorted(file.name for file in (Path(home) / "lib64").glob("libopapi_*.so"))
    for folder in filter(None, os.environ.get("ASCEND_CUSTOM_OPP_PATH", "").split(":")):
        yield str(Path(folder) / CUSTOM)
    opp = os.environ.get("ASCEND_OPP_PATH")
    if opp:
        yield from (str(file) for file in sorted(Path(opp).glob(f"vendors/*/{CUSTOM}")))


def _loaded(name: str) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None
