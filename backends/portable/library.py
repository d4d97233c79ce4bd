"""Importing a library that may be absent, too old, or built for another torch."""

import importlib
import inspect
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch
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
    """The tensor without gaps and from a multiple of 16 bytes on, which copy engines insist on; a
    copy where it is not so. Axes of size 1 get the stride that libraries' own checks expect."""
    if not tensor.is_contiguous() or tensor.data_ptr() % 16:
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    return tensor.view(-1).view(tensor.shape)


def rows_dense(tensor: Tensor) -> Tensor:
    """The tensor with rows wherever they lie, but without gaps inside a row."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
