"""Importing a library that may be absent, too old, or built for another torch."""

import importlib
import inspect
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

from torch import Tensor


@cache
def imported(name: str) -> ModuleType | str:
    """The module, or the sentence why this process cannot import it: a wheel made for another torch
    or CUDA is installed, and yet no reason to break whoever else serves the op."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError, AssertionError) as error:
        what = " ".join(str(error).split()) or "no reason given"
        return f"{name} is installed, but importing it raised {type(error).__name__}: {what}"


def accepts(fn: Callable[..., Any], argument: str) -> bool:
    """Whether a library's function has this argument, which tells generations of its API apart
    where version numbers do not."""
    return argument in inspect.signature(fn).parameters


def dense(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where it has gaps that a library's own checks refuse."""
    return tensor if tensor.is_contiguous() else tensor.contiguous()
