"""Op-call logging: one line per call, written before the op runs so that a crash names its culprit.

When off, nothing is wrapped: a selected implementation is the bare function."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

logger = logging.getLogger("dsa_hal")


def enable() -> None:
    """Send op lines to stderr, unless the embedding program has set up handlers of its own."""
    logger.setLevel(logging.INFO)
    if not logger.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("dsa_hal %(message)s"))
        logger.addHandler(handler)


def describe(value: Any) -> str:
    """An argument in few words: dtype and shape of a tensor, `repr` of anything plain."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(describe, value)) + "]"
    return repr(value)


def logged(label: str, fn: Callable[P, R]) -> Callable[P, R]:
    """`fn` with one line before each call."""

    @functools.wraps(fn)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        words = [describe(a) for a in args] + [f"{k}={describe(v)}" for k, v in kwargs.items()]
        logger.info("%s(%s)", label, ", ".join(words))
        return fn(*args, **kwargs)

    return call
