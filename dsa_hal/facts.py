"""Short questions to the arguments of a call, as functions written for an op's own arguments, like
the methods of a dataclass: a loop over arguments would cost more than the answers are worth.

The facts of a call are what a predicate may know of it, shapes, dtypes and plain arguments, as one
hashable key. Selection remembers its answers under it, so that a called op does not ask every
predicate on every call. Its description says the same in words that a tuning table can hold.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from torch import Tensor

Described = dict[str, str | int | float]
"""A call in words: argument -> "bfloat16[4096, 7168]" for a tensor, plain values as they are."""

_FACTS: dict[Any, str] = {
    Tensor: "{0}.shape, {0}.dtype",
    Tensor | None: "{0} if {0} is None else ({0}.shape, {0}.dtype)",
    list[Tensor]: "tuple([(t.shape, t.dtype) for t in {0}])",
}


def facts_of(fn: Callable[..., Any]) -> Callable[..., tuple[Hashable, ...]]:
    """A function with the arguments of `fn` that returns the facts of a call."""
    parameters = inspect.signature(fn, eval_str=True).parameters.values()
    return asking(fn, [_FACTS.get(p.annotation, "{0}").format(p.name) for p in parameters])


def described(fn: Callable[..., Any]) -> Callable[..., Described]:
    """A function with the arguments of `fn` that describes a call; what is None is left out."""
    names = list(inspect.signature(fn).parameters)
    ask = asking(fn, names)

    def describe(*args: Any, **kwargs: Any) -> Described:
        values = zip(names, ask(*args, **kwargs), strict=True)
        return {name: _words(value) for name, value in values if value is not None}

    return describe


def _words(value: Any) -> str | int | float:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, list | tuple):
        return " ".join(str(_words(item)) for item in value)
    return value if isinstance(value, str | int | float) else str(value)


def asking(fn: Callable[..., Any], questions: Sequence[str]) -> Callable[..., Any]:
    """A function with the arguments of `fn` that returns the tuple of `questions`, expressions of
    those arguments. A mistaken call raises the TypeError that `fn` would raise."""
    arguments: list[str] = []
    names: dict[str, Any] = {}
    for name, parameter in inspect.signature(fn).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in arguments:
            arguments.append("*")
        if parameter.default is parameter.empty:
            arguments.append(name)
        else:
            arguments.append(f"{name}=_{name}")
            names[f"_{name}"] = parameter.default
    answers = "".join(f"{question}, " for question in questions)
    exec(f"def {fn.__name__}({', '.join(arguments)}): return ({answers})", names)
    made: Callable[..., Any] = names[fn.__name__]
    return made
